"""Before a server opens: finds the task's data and files, and tries it on a few samples, so that errors show at once.

In a process of its own, so that the one that waits for the end of the run holds no framework in memory.
"""

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from federation.app import metrics, weights
from federation.app.config import RunConfig, SettingError, validate
from federation.app.noise import check_entries
from federation.app.partition import BY_GROUP, check_enough, split_data
from federation.app.run_folder import write_atomically
from federation.app.samples import count
from federation.app.sources import sources
from federation.app.strategy import find, make_strategy
from federation.app.task import CONTRACT, find_data, load_task, locate_task, read_data, train_settings
from federation.app.weights import read_model
from federation.launch.fork_server import frameworks
from federation.launch.trial import Trial, check_usable

SAMPLES = 16


def prepare(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield where the task's `data` are, and its `files` by name; and once more when the task has been tried.

    By then, some of its imports have shown that do not before they happen, and `imports` are the modules of frameworks
    that clients will need. Raises ValueError where it cannot be federated.
    """
    make_strategy(config, {})
    if config.bare:
        yield {"data": "", "files": _files(locate_task(config.task)), "imports": []}
        return
    before = set(sys.modules)
    task = load_task(config.task)
    root = find_data(task, config.data)
    data = read_data(task, root)
    settings = {name: value for name, value in train_settings(task, config).items() if name not in CONTRACT["train"]}
    check_enough(min(map(count, data[:1] if config.validation_fraction else data)), config.num_clients)
    yield {"data": root, "files": _files(task)}
    if config.partitioner in BY_GROUP:
        split_data(data, config.num_clients, config)  # for others, that takes long, and hardly ever fails
    trial = Trial(task, data, SAMPLES, settings)
    if trial.defaults and not config.learning_rate:
        raise ValueError(f"{task.__name__}.train() has no default for lr: the run config needs a learning-rate")
    if config.initial:
        read_model(Path(config.initial), trial.net())
    check_federated(config, trial.net())
    try:
        check_usable(trial)
        check_best(config, trial)
    except SettingError:
        raise
    except ValueError as error:
        raise ValueError(f"{task.__name__} cannot be federated: {error}") from None
    imports = [name for name in frameworks() if name.count(".") <= 1]  # these import all others
    yield {"data": root, "files": _files(task, sys.modules.keys() - before), "imports": imports}


def check_federated(config: RunConfig, net: Any) -> None:
    """Raise SettingError where a model does not go with what the run config makes of it."""
    framework = weights.framework(net)
    if find(config.strategy).hooks and not isinstance(framework, weights.Torch):
        raise SettingError(f"strategy={config.strategy} changes gradients by hooks, which a {framework.model} does not "
                           "have: only PyTorch models have them")  # fmt: skip
    try:
        shared, _ = weights.split(weights.from_net(net), config.personal)
        if config.dp != "none":
            check_entries(shared)
    except ValueError as error:
        raise SettingError(str(error)) from None


def check_best(config: RunConfig, trial: Trial) -> None:
    """Raise SettingError where the metric by which the best model is to be kept does not exist."""
    side, _, name = config.best_key.partition(":")[0].partition("_")
    tested = list(metrics.named("test", trial.test()))
    known = {"train": list(metrics.named("train", trial.train().loss)), "clients": tested, "server": tested}
    if name not in known[side] or (side == "server" and not config.server_evaluation):
        there = [f"{one}_{name}" for one, names in known.items() if one != "server" or config.server_evaluation
                 for name in names]  # fmt: skip
        raise SettingError(f"best-metric={config.best_metric}: there is no such metric; there are {', '.join(there)}")


def _files(task: ModuleType, modules: Iterable[str] = ()) -> dict[str, str]:
    return {name: str(path) for name, path in sources(task, modules).items()}


def main() -> None:
    """Read a run config from the first argument; write what has been found, or an error, to the file in the second."""
    config, report = json.loads(sys.argv[1]), Path(sys.argv[2])
    logging.getLogger("flwr").setLevel(logging.ERROR)  # the ServerApp makes the strategy, too, and logs the same

    def write(found: dict[str, Any]) -> None:
        write_atomically(report, lambda path: path.write_text(json.dumps(found), "utf-8"))

    try:
        for found in prepare(validate(config)):
            write(found)
    except (ValueError, OSError) as error:
        write({"error": str(error), "setting": isinstance(error, SettingError)})
