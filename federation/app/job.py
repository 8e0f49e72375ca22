"""What a message asks of a client: its task, settings, seed and samples, and the reply."""

import time
from types import ModuleType
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from federation.app import metrics, samples, weights
from federation.app.config import validate
from federation.app.console import print_to_user
from federation.app.cores import share_cores
from federation.app.fingerprint import difference
from federation.app.partition import hold_back
from federation.app.task import build_net, classes_of, client_seed, load_task, open_data, train_settings


class Job:
    """A message to a client, with all that the client needs to answer it.

    `task` is the module that is federated, `settings` what its train() is called with, besides net, data and seed.
    """

    def __init__(self, message: Message, context: Context) -> None:
        share_cores()
        self.message, self.context = message, context
        self.config = validate(context.run_config)
        self.task: ModuleType = load_task(self.config.task)
        records = message.content.config_records.values()
        self.order: dict[str, Any] = {key: value for record in records for key, value in record.items()}

    @property
    def settings(self) -> dict[str, Any]:
        return train_settings(self.task, self.config)

    @property
    def seed(self) -> int:
        """The seed of this client in this round."""
        epochs_before = (self.order["server-round"] - 1) * self.config.local_epochs
        return client_seed(self.config.seed, self.order["position"], epochs_before)

    def global_model(self, seed: int) -> Any:
        """Return a net that is built from `seed`, with the weights that the message brings."""
        classes = self.order["classes"] or classes_of(self.task, self.data()[0][0])
        net = build_net(self.task, seed, classes)
        weights.to_net(self.message.content.array_records["arrays"], net)
        return net

    def data(self) -> tuple[Any, str]:
        """Return the whole data set, this client's own or else the one that the server names, and its fingerprint."""
        return open_data(self.task, str(self.context.node_config.get("data") or self.order["data"]))

    def sizes(self) -> dict[str, int]:
        """Return how many samples there are to train and to test on, if all are this client's."""
        (train, test), _ = self.data()
        if not self.config.validation_fraction:
            return {"train": samples.count(train), "test": samples.count(test)}
        held = hold_back(np.arange(samples.count(train)), self.config, 0)
        return {split: len(rows) for split, rows in held.items()}

    def samples(self, split: str) -> Any:
        """Return this client's samples: the rows that the server names, or all if the data are its own.

        With a `validation-fraction`, those to test on are held back from its training samples. Raises ValueError if
        the data have changed since the client joined.
        """
        self.started = time.perf_counter()
        data, found = self.data()
        whole = data[0] if split == "train" or self.config.validation_fraction else data[1]
        return samples.take(whole, self._rows(split, samples.count(whole), found))

    def _rows(self, split: str, count: int, found: str) -> NDArray[Any] | None:
        if "rows" not in self.message.content:
            held = self.config.validation_fraction
            return hold_back(np.arange(count), self.config, self.order["position"])[split] if held else None
        if changed := difference(found, self.order["fingerprint"]):
            raise ValueError(f"the data here are not the server's any more: {changed}; start the client again")
        mask = self.message.content.array_records["rows"]["mask"].numpy()
        return np.flatnonzero(np.unpackbits(mask, count=count))

    def reply(self, data: Any, returned: Any, net: Any = None) -> Message:
        """Return the reply: what train() or test() has returned, how many samples, and the weights of `net`, if any."""
        function, did, prefix = ("test", "tested", "") if net is None else ("train", "trained", "train-")
        seconds, count = time.perf_counter() - self.started, samples.count(data)
        numbers = metrics.named(function, returned)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        print_to_user(f"round {self.order['server-round']}: {did} on {count:,} samples, {shown}, {seconds:.1f} s")
        named = {f"{prefix}{name}": value for name, value in numbers.items()}
        content = RecordDict({"metrics": MetricRecord({"num-examples": count, **named, "seconds": seconds})})
        if net is not None:
            content["arrays"] = weights.from_net(net)
        return Message(content, reply_to=self.message)
