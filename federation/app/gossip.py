"""No server that averages: D-PSGD (Lian et al. 2017, algorithm 1), with a round's local training as its gradient step.

In every round, each client mixes its model with those of its neighbours and trains the result. The server only relays.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from federation.app.mixing import mean, relayed
from federation.app.topology import graph, metropolis
from federation.app.weights import restore_dtypes

Values = dict[str, NDArray[Any]]


class Gossip(FedAvg):
    """Relays the clients' models to their neighbours; see topology.py for who they are, mixing.py for what they do.

    Those mix whose models of the round before have arrived, and who are there: a client that failed or was late goes
    on alone for a round, from the last model that it sent. Their mean is computed for the report only.
    """

    state = ("initial", "models", "trained")  # of a checkpoint

    def __init__(self, topology: str, neighbours: int, seed: int, **sampling: Any) -> None:
        super().__init__(**sampling)
        self.topology, self.neighbours, self.seed = topology, neighbours, seed
        self.initial: Values = {}  # the model with which each client begins
        self.models: Values = {}  # the last one of each client, its entries by "CLIENT NAME"
        self.trained: Values = {}  # the round of it, by client

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client its own last model and its neighbours', to mix and to train."""
        self.initial = self.initial or {name: array.numpy() for name, array in arrays.items()}
        messages = super().configure_train(server_round, arrays, config, grid)
        return self._relay(messages, server_round, arrays, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client the same models as for the next round, to mix and to test."""
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return self._relay(messages, server_round + 1, arrays, grid)

    def _relay(
        self, messages: Iterable[Message], server_round: int, like: ArrayRecord, grid: Grid
    ) -> Iterable[Message]:
        here = set(grid.get_node_ids())
        mixing = [client for client in map(int, self.trained) if self._is_fresh(client, server_round, here)]
        matrix = metropolis(graph(self.topology, mixing, self.neighbours, self.seed, server_round))
        models: dict[int, ArrayRecord] = {}
        for message in messages:
            own = message.metadata.dst_node_id
            row = matrix.get(own, {own: 1.0})
            models |= {client: self._model(client, like) for client in row if client not in models}
            records = relayed(models[own], [models[client] for client in row if client != own], [*row.values()])
            message.content = RecordDict({**records, self.configrecord_key: message.content[self.configrecord_key]})
            yield message

    def _is_fresh(self, client: int, server_round: int, here: set[int]) -> bool:
        return client in here and self.trained[str(client)] == server_round - 1

    def _model(self, client: int, like: ArrayRecord) -> ArrayRecord:
        """Return the last model of a client, in the dtypes of another one."""
        values = {name: self.models.get(f"{client} {name}", self.initial[name]) for name in like}
        return restore_dtypes(like, ArrayRecord({name: Array(value) for name, value in values.items()}))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep the clients' models; return their mean, in which all weigh the same, for the report.

        "consensus" in the metrics is how far the models that were sent are from that mean: see `consensus`.
        """
        sent = {reply.metadata.src_node_id: reply.content for reply in replies if reply.has_content()}
        if not sent:
            return None, None
        models = {client: content.array_records[self.arrayrecord_key] for client, content in sent.items()}
        for client, model in models.items():
            self.models |= {f"{client} {name}": array.numpy() for name, array in model.items()}
            self.trained[str(client)] = np.array(server_round)
        average = mean([*models.values()], [1 / len(models)] * len(models))
        metrics = self.train_metrics_aggr_fn([*sent.values()], self.weighted_by_key)
        return average, MetricRecord({**metrics, "consensus": consensus([*models.values()], average)})


def consensus(models: list[ArrayRecord], average: ArrayRecord) -> float:
    """Return the consensus distance: the square root of the mean of |x_i - average|^2 over the models x_i.

    Integer entries, such as counters, do not count.
    """
    real = [name for name, array in models[0].items() if array.numpy().dtype.kind in "fc"]
    squares = (np.abs(model[name].numpy() - average[name].numpy()) ** 2 for model in models for name in real)
    return float(np.sqrt(sum(float(square.sum()) for square in squares) / len(models)))
