"""The server's own part in a run: the model that it begins with, tests and saves, and the data that it tests on."""

from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.app import ArrayRecord

from federation.app import metrics, samples, weights
from federation.app.config import RunConfig
from federation.app.task import build_net, classes_of, find_data, load_task, locate_task, read_data


class GlobalModel:
    """The model of a task, which is loaded here, and its data: all that the task's own script would have."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.task = load_task(config.task)
        self.root = find_data(self.task, config.data)
        self.data = read_data(self.task, self.root)
        self.net = build_net(self.task, config.seed, classes_of(self.task, self.data[0]))
        self.suffix = weights.framework(self.net).suffix

    def initial(self) -> ArrayRecord:
        """Return the weights that a run begins with. Raises ValueError where those in `initial` do not fit."""
        given = self.config.initial
        return weights.read_model(Path(given), self.net) if given else weights.from_net(self.net)

    def test(self, arrays: ArrayRecord) -> metrics.Metrics:
        """Return the server's metrics of a model, none without `server-evaluation`."""
        if not self.config.server_evaluation:
            return {}
        weights.to_net(arrays, self.net)
        return metrics.of_server(self.task.test(self.net, samples.take(self.data[1])))

    def save(self, arrays: ArrayRecord, path: Path) -> None:
        """Save a model in the format of its framework."""
        weights.to_net(arrays, self.net)
        weights.framework(self.net).save(self.net, path)


class BareModel:
    """A model of which the server knows only the weights: it needs no framework and no data, and runs no task."""

    root, data, suffix = "", None, ".npz"

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.initial)
        self.task: ModuleType = locate_task(config.task)

    def initial(self) -> ArrayRecord:
        return weights.read_model(self.path)

    def test(self, arrays: ArrayRecord) -> metrics.Metrics:
        return {}

    def save(self, arrays: ArrayRecord, path: Path) -> None:
        weights.save_arrays(arrays, path)


def load_global_model(config: RunConfig) -> Any:
    """Return the server's model; a bare one where there are weights to begin with and the server does not evaluate."""
    return BareModel(config) if config.bare else GlobalModel(config)
