"""A task: any module with Net, load_data, train and test. Loading one, and asking it for what a federation needs."""

import hashlib
import importlib
import inspect
import random
import sys
from types import ModuleType
from typing import Any

import numpy as np

from federation.console import reason

CONTRACT: dict[str, tuple[str, ...]] = {  # each name of a task, with the arguments that it is called with
    "Net": (),
    "load_data": ("root",),
    "train": ("net", "data", "epochs", "lr", "batch_size", "seed"),
    "test": ("net", "data"),
}


def load_task(name: str) -> ModuleType:
    """Import the task `name`. Raises ValueError where it cannot be imported or breaks the contract."""
    try:
        task = importlib.import_module(name)
    except Exception as error:  # whatever the script does when it is imported
        raise ValueError(f"task {name!r} cannot be imported: {reason(error)}") from None
    for function, arguments in CONTRACT.items():
        _check_function(task, function, arguments)
    return task


def _check_function(task: ModuleType, name: str, arguments: tuple[str, ...]) -> None:
    function = getattr(task, name, None)
    if not callable(function):
        raise ValueError(f"{task.__file__} has no {name}(); a task has {', '.join(CONTRACT)}")
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if missing := [argument for argument in arguments if argument not in parameters and not open_ended]:
        raise ValueError(f"{task.__file__}: {name}() takes no {', '.join(missing)}")


def find_data(task: ModuleType, root: str) -> str:
    """Return the place that the task would read for `root`, where the task can say so."""
    return str(task.find_data(root or None)) if hasattr(task, "find_data") else root


def initial_net(task: ModuleType, seed: int) -> Any:
    """Build the model from `seed`: given to Net if it takes one, and to each random generator that is loaded."""
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
    return task.Net(seed=seed) if "seed" in inspect.signature(task.Net).parameters else task.Net()


def client_seed(seed: int, partition: int, first_epoch: int) -> int:
    """Return the shuffling seed of a client that has seen `first_epoch` epochs.

    It counts on from epoch to epoch, and partition 0 starts at the run's own seed: one client alone thus shuffles
    as the centralized script does, whose epoch e is drawn from seed + e. Partitions lie a million epochs apart.
    """
    return (seed + partition * 1_000_003 + first_epoch) % 2**31


def data_digest(data: Any) -> str:
    """Digest all labels of `((x_train, y_train), (x_test, y_test))`: it tells a copy of a data set from another one."""
    digest = hashlib.sha256()
    for _, labels in data:
        digest.update(np.ascontiguousarray(labels).tobytes() + b"|")
    return digest.hexdigest()[:16]
