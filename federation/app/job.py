"""What a message asks of a client: its task, settings, seed and samples, and the reply."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from federation.app import metrics, samples, weights
from federation.app.config import validate
from federation.app.console import print_to_user
from federation.app.cores import share_cores
from federation.app.corrections import ControlVariates, proximal
from federation.app.fingerprint import difference
from federation.app.mixing import mixed
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
        self.order = order_of(message)
        self.variates: ControlVariates | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What train() is called with, besides net, data and seed; the rate may be another one in each round."""
        settings = train_settings(self.task, self.config)
        return settings | {"lr": self.order["lr"]} if "lr" in self.order else settings

    @property
    def seed(self) -> int:
        """The seed of this client in this round."""
        epochs_before = (self.order["server-round"] - 1) * self.config.local_epochs
        return client_seed(self.config.seed, self.order["position"], epochs_before)

    def global_model(self, seed: int) -> Any:
        """Return a net that is built from `seed`, with the weights that the message brings, and this client's own."""
        classes = self.order["classes"] or classes_of(self.task, self.data()[0][0])
        net = build_net(self.task, seed, classes)
        records = self.message.content.array_records
        arrays = mixed(records)
        if "personal" in records:
            arrays = ArrayRecord({**arrays, **self.context.state.array_records.get("personal", records["personal"])})
        weights.to_net(arrays, net)
        return net

    @contextmanager
    def correcting(self, net: Any) -> Iterator[None]:
        """Let the strategy change the gradients of `net`, if it is one that does."""
        records = self.message.content.array_records
        if mu := self.order.get("proximal-mu"):
            with proximal(net, mu):
                yield
        elif "variates" in records:
            own = self.context.state.array_records.get("variates", ArrayRecord())
            server, mine = ({name: array.numpy() for name, array in one.items()} for one in (records["variates"], own))
            self.variates = ControlVariates(net, server, mine)
            with self.variates.applied():
                yield
        else:
            yield

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
        rows = self._rows(split, samples.count(whole), found)
        self.count = samples.count(whole) if rows is None else len(rows)
        if split == "train" and self.config.local_steps:
            rows = self._rows_of_steps(np.arange(self.count) if rows is None else rows)
        return samples.take(whole, rows)

    def _rows_of_steps(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return the rows of this round's `local-steps`: each epoch of them is a new permutation of all."""
        wanted = self.config.local_steps * self.config.batch_size
        first = (self.order["server-round"] - 1) * wanted
        epochs = range(first // len(rows), (first + wanted - 1) // len(rows) + 1)
        seeds = (client_seed(self.config.seed, self.order["position"], epoch) for epoch in epochs)
        order = np.concatenate([np.random.default_rng(seed).permutation(rows) for seed in seeds])
        return order[first - epochs[0] * len(rows) :][:wanted]

    def _rows(self, split: str, count: int, found: str) -> NDArray[Any] | None:
        if "rows" not in self.message.content:
            held = self.config.validation_fraction
            return hold_back(np.arange(count), self.config, self.order["position"])[split] if held else None
        if changed := difference(found, self.order["fingerprint"]):
            raise ValueError(f"the data here are not the server's any more: {changed}; start the client again")
        mask = self.message.content.array_records["rows"]["mask"].numpy()
        return np.flatnonzero(np.unpackbits(mask, count=count))

    def reply(self, data: Any, returned: Any, net: Any = None) -> Message:
        """Return the reply: what train() or test() has returned, how many samples, and the weights of `net`, if any.

        A client weighs as much as it has samples, also where `local-steps` have used some of them.
        """
        function, did, prefix = ("test", "tested", "") if net is None else ("train", "trained", "train-")
        seconds = time.perf_counter() - self.started
        numbers = metrics.named(function, returned)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        used = samples.count(data)
        print_to_user(f"round {self.order['server-round']}: {did} on {used:,} samples, {shown}, {seconds:.1f} s")
        named = {f"{prefix}{name}": value for name, value in numbers.items()}
        content = RecordDict({"metrics": MetricRecord({"num-examples": self.count, **named, "seconds": seconds})})
        if net is not None:
            content["arrays"] = self._share(weights.from_net(net))
        if self.variates:
            self.context.state["variates"], content["variates"] = self.variates.renewed()
        return Message(content, reply_to=self.message)

    def _share(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return what the server is to see of a model, and keep the rest."""
        shared, personal = weights.split(arrays, self.config.personal)
        if personal:
            self.context.state["personal"] = personal
        return shared


def order_of(message: Message) -> dict[str, Any]:
    """Return all that a message tells besides arrays."""
    return {key: value for record in message.content.config_records.values() for key, value in record.items()}
