"""SCAFFOLD: control variates correct the drift of clients whose data differ (Karimireddy et al. 2020, algorithm 1)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from federation.app.mixing import mean


class Scaffold(FedAvg):
    """SCAFFOLD's server, with option II of its clients, for which see corrections.py.

    Of S sampled clients of N, the next model is x + eta / S * sum(y_i - x), and the next control variate
    c + 1 / N * sum(c_i+ - c_i): means in which all clients weigh the same, as in the paper.
    """

    def __init__(self, num_clients: int, server_learning_rate: float = 1.0, **sampling: Any) -> None:
        """`num_clients` is N, `server_learning_rate` eta."""
        super().__init__(**sampling)
        self.num_clients, self.server_learning_rate = num_clients, server_learning_rate
        self.model: dict[str, NDArray[Any]] = {}
        self.variates: dict[str, NDArray[Any]] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model and the control variate."""
        self.model = {name: array.numpy() for name, array in arrays.items()}
        if self.variates is None:
            self.variates = {name: np.zeros_like(value) for name, value in self.model.items() if _is_real(value)}
        variates = ArrayRecord({name: Array(value) for name, value in self.variates.items()})
        messages = [*super().configure_train(server_round, arrays, config, grid)]
        for message in messages:
            message.content["variates"] = variates
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next model and the next control variate."""
        contents = [reply.content for reply in replies if reply.has_content()]
        if not contents or self.variates is None:
            return None, None
        models = [content.array_records["arrays"] for content in contents]
        changes = [content.array_records["variates"] for content in contents]
        shift = mean(changes, [1 / self.num_clients] * len(changes))
        average = mean(models, [1 / len(models)] * len(models))
        for name, value in self.variates.items():
            self.variates[name] = np.asarray(value + shift[name].numpy(), value.dtype)
        new = {
            name: old + self.server_learning_rate * (average[name].numpy() - old) for name, old in self.model.items()
        }
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return ArrayRecord({name: Array(np.asarray(value)) for name, value in new.items()}), metrics


def _is_real(value: NDArray[Any]) -> bool:
    return value.dtype.kind == "f"
