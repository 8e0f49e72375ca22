"""What a client does for differential privacy: it clips the model that it sends, and with dp=local adds noise to it.

Flower's mods do that. They want a message with one record of arrays and one of settings, and ours have several.
"""

import json
import math
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable

from federation.app.client_state import state_of
from federation.app.config import RunConfig, validate
from federation.app.console import print_to_user
from federation.app.job import order_of
from federation.app.noise import check_entries, gaussian_deviation, moved, new_key, secret_noise
from federation.app.run_folder import write_atomically

CLIPPING = {"client-fixed": fixedclipping_mod, "client-adaptive": adaptiveclipping_mod}


def protect(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip what a ClientApp (as a mod of it) has trained, and with dp=local add noise, before it is sent."""
    config, reply = validate(context.run_config), call_next(message, context)
    training = message.metadata.message_type == MessageType.TRAIN
    if not training or config.dp not in (*CLIPPING, "local") or reply.has_error():
        return reply
    whole = message.content
    sent, trained = whole.array_records["arrays"], reply.content.array_records
    check_entries(sent)
    trained["arrays"] = moved(trained["arrays"], sent)
    order = order_of(message)
    message.content = RecordDict({name: whole[name] for name in ("arrays", "config")})
    try:
        if config.dp == "local":
            return _with_noise(message, context, reply, order)
        return CLIPPING[config.dp](message, context, lambda *_: reply)
    finally:
        message.content = whole


def _with_noise(message: Message, context: Context, reply: Message, order: dict[str, Any]) -> Message:
    """Add noise to a reply, from a key of this client: the server, which knows the seed, could subtract it else."""
    config, server_round = validate(context.run_config), order["server-round"]
    ledger = Ledger(state_of(context, config, order).ledger)
    with secret_noise(ledger.key, server_round, [reply.content.array_records["arrays"]]):
        noisy = local_mod(config)(message, context, lambda *_: reply)
    replies = ledger.add(server_round)
    print_to_user(f"round {server_round}: {replies} replies have spent epsilon {replies * config.dp_epsilon:g} "
                  f"and delta {replies * config.dp_delta:g}")  # fmt: skip
    return noisy


def local_mod(config: RunConfig) -> LocalDpMod:
    """Return Flower's mod, with noise of which one reply spends dp-epsilon, whatever the client's data are.

    Two models that are clipped to the norm C are at most 2 C apart. The mod computes its noise by a formula that holds
    for an epsilon below 1 only, so it gets the one with which that comes to the right deviation.
    """
    delta = config.dp_delta
    formula = math.sqrt(2 * math.log(1.25 / delta)) / gaussian_deviation(config.dp_epsilon, delta)
    return LocalDpMod(config.dp_clipping_norm, 2 * config.dp_clipping_norm, formula, delta)


class Ledger:
    """A client's secret key in a run, and the rounds in which it has sent a model: a file that is never sent.

    The key is the same from the first message on, also where the server repeats a round: two replies with noise of
    their own to the same model would spend twice as much.
    """

    def __init__(self, path: Path) -> None:
        """Read the file, or begin one. Raises ValueError where it is damaged."""
        self.path = path
        saved: dict[str, Any] = {"key": new_key().hex(), "rounds": []}
        try:
            if path.exists():
                saved = json.loads(path.read_text("utf-8"))
            self.key, self.rounds = bytes.fromhex(saved["key"]), set(saved["rounds"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged; begin a new run") from None

    def add(self, server_round: int) -> int:
        """Note a round, and return how many there are."""
        self.rounds.add(server_round)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": self.key.hex(), "rounds": sorted(self.rounds)})
        write_atomically(self.path, lambda unfinished: _write_secret(unfinished, text))
        return len(self.rounds)


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, "utf-8")
