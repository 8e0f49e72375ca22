"""What a client keeps from one round for the next, on its own disk: control variates, personal layers and the like.

It is never sent. Flower's Context, in which the ClientApp finds it, would be lost with a SuperNode that is killed, and
every message would carry it between processes; so the Context is filled from a file before a message is answered, and
emptied after. A file is of one round: a run that is resumed finds the state that its last complete round has left.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable

from federation.app.archive import Records, read_archive, write_archive
from federation.app.config import RunConfig, validate
from federation.app.console import one_line
from federation.app.job import order_of

FOLDER = "client-state"  # in the run folder of a simulation
KEPT = 3  # rounds: a server that resumes from the older one of its two checkpoints asks for the last but two


class ClientState:
    """The files of one client in one run."""

    def __init__(self, folder: Path, run: str, position: int) -> None:
        """`run` is the server's name for the run, of letters and digits."""
        if not re.fullmatch("[0-9a-f]{1,64}", run):
            raise ValueError(f"the server names its run {run!r:.80}")
        self.folder, self.position = folder / run, position

    def path(self, server_round: int) -> Path:
        return self.folder / f"client-{self.position}-round-{server_round}.npz"

    @property
    def ledger(self) -> Path:
        """The file of what dp=local needs (see client_privacy.py). It is of no round: a reply cannot be taken back."""
        return self.folder / f"client-{self.position}-privacy.json"

    def load(self, server_round: int) -> Records:
        """Return what the client has kept of a round. Raises ValueError if that is missing or damaged."""
        path = self.path(server_round)
        if not path.exists():
            raise ValueError(f"what this client has kept of round {server_round} is not in {self.folder}: start it "
                             "where that is, by --state, or begin a new run")  # fmt: skip
        try:
            return read_archive(path)[1]
        except Exception as error:  # a damaged file can raise many kinds
            raise ValueError(f"{path} is damaged ({one_line(error)}); begin a new run") from None

    def save(self, server_round: int, records: Records) -> None:
        """Write what is kept of a round, and remove what no server can ask for any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_archive(self.path(server_round), {}, records)
        files = self.folder.glob(f"client-{self.position}-round-*.npz")
        rounds = {int(path.stem.rpartition("-")[2]): path for path in files}
        past = sorted(number for number in rounds if number <= server_round)
        for number in {*past[:-KEPT], *(number for number in rounds if number > server_round)}:
            rounds[number].unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove what the clients of earlier simulations with this run folder have kept."""
    for path in (folder / FOLDER).glob("*/client-*"):
        path.unlink(missing_ok=True)


def check_kept(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Raise ValueError where a simulation that is to be resumed lacks what its clients have kept."""
    for client, last in last_trained(metrics["rounds"]).items():
        try:
            ClientState(folder / FOLDER, metrics["run"], client).load(last)
        except ValueError:
            lost = f"what client {client} has kept of round {last} is missing or damaged in {FOLDER}"
            raise ValueError(f"cannot resume {folder}: {lost}; begin a new run") from None


def last_trained(rounds: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Return the last round in which each client has trained, of the rounds in metrics.json."""
    trained = [(row["round"], (row["trained"] or {}).get("client", ())) for row in rounds]
    return {client: number for number, clients in trained for client in clients}


def state_of(context: Context, config: RunConfig, order: Mapping[str, Any]) -> ClientState:
    """Return the files of the client that a message orders something of."""
    folder = Path(str(context.node_config.get("state") or Path.home() / config.out / FOLDER))
    return ClientState(folder, order["run"], order["position"])


def keep_state(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Give a ClientApp (as a mod of it) the client's state in its Context, and keep what it leaves there."""
    config, training = validate(context.run_config), message.metadata.message_type == MessageType.TRAIN
    if not config.keeps_state or not (training or message.metadata.message_type == MessageType.EVALUATE):
        return call_next(message, context)
    order = order_of(message)
    state = state_of(context, config, order)
    context.state.clear()
    if order["kept"]:
        context.state.update(state.load(order["kept"]))
    try:
        reply = call_next(message, context)
        if training:
            state.save(order["server-round"], dict(context.state.array_records))
    finally:
        context.state.clear()
    return reply
