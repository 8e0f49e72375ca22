"""What a message asks of a client: its task, settings, seed and samples, and the reply."""

import time
from types import ModuleType
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict

from federation.app import weights
from federation.app.config import validate
from federation.app.console import print_to_user
from federation.app.cores import share_cores
from federation.app.fingerprint import difference
from federation.app.task import build_net, client_seed, load_task, open_data


class Job:
    """A message to a client, with all that the client needs to answer it.

    `task` is the module that is federated, `settings` what its train() is called with, besides the seed.
    """

    def __init__(self, message: Message, context: Context) -> None:
        share_cores()
        self.message, self.context = message, context
        self.config = validate(context.run_config)
        self.task: ModuleType = load_task(self.config.task)
        records = message.content.config_records.values()
        self.order: dict[str, Any] = {key: value for record in records for key, value in record.items()}
        self.settings = self.config.train_arguments()

    @property
    def seed(self) -> int:
        """The seed of this client in this round."""
        epochs_before = (self.order["server-round"] - 1) * self.config.local_epochs
        return client_seed(self.config.seed, self.order["position"], epochs_before)

    def global_model(self, seed: int) -> Any:
        """Return a net that is built from `seed`, with the weights that the message brings."""
        net = build_net(self.task, seed)
        weights.to_net(self.message.content.array_records["arrays"], net)
        return net

    def data(self) -> tuple[Any, str]:
        """Return the whole data set, this client's own or else the one that the server names, and its fingerprint."""
        return open_data(self.task, str(self.context.node_config.get("data") or self.order["data"]))

    def samples(self, split: str) -> tuple[Any, Any]:
        """Return the x and y of this client: the rows that the server names, or all if the data are its own.

        Raises ValueError if the data have changed since the client joined.
        """
        self.started = time.perf_counter()
        data, found = self.data()
        x, y = data[0] if split == "train" else data[1]
        if "rows" not in self.message.content:
            return x, y
        if changed := difference(found, self.order["fingerprint"]):
            raise ValueError(f"the data here are not the server's any more: {changed}; start the client again")
        mask = self.message.content.array_records["rows"]["mask"].numpy()
        rows = np.flatnonzero(np.unpackbits(mask, count=len(y)))
        return x[rows], y[rows]

    def reply(self, data: tuple[Any, Any], net: Any = None, **results: float) -> Message:
        """Return the reply: `results`, the number of samples, and the weights of `net`, if there is one."""
        seconds, samples = time.perf_counter() - self.started, len(data[1])
        shown = ", ".join(f"{name.removeprefix('train-')} {float(value):.4f}" for name, value in results.items())
        did = "trained" if net is not None else "tested"
        print_to_user(f"round {self.order['server-round']}: {did} on {samples:,} samples, {shown}, {seconds:.1f} s")
        numbers = {name: float(value) for name, value in results.items()}
        content = RecordDict({"metrics": MetricRecord({"num-examples": samples, **numbers, "seconds": seconds})})
        if net is not None:
            content["arrays"] = weights.from_net(net)
        return Message(content, reply_to=self.message)
