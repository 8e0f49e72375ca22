"""A task: any module with Net, load_data, train and test. Loading one, and asking it for what a federation needs."""

import functools
import gc
import importlib
import importlib.util
import inspect
import os
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from federation.app import hide_tensorflow, samples
from federation.app.config import RunConfig, SettingError, parse
from federation.app.console import FOLDER, one_line
from federation.app.fingerprint import fingerprint
from federation.app.layout import SCRIPTS

CONTRACT: dict[str, tuple[str, ...]] = {  # each name of a task, with the arguments that it is called with
    "Net": (),
    "load_data": ("root",),
    "train": ("net", "data", "epochs", "lr", "batch_size", "seed"),
    "test": ("net", "data"),
}
NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
SETTABLE = bool | int | float | str | None  # defaults of arguments that the run config can set
EXTRAS = {"jax": "[jax]", "flax": "[jax]", "optax": "[jax]", "keras": "[keras]", "tensorflow": "[keras]"}
EXTRAS |= {"torch": "", "torchvision": ""}  # what is installed without any
MAIN_ONLY = "it exits when it is imported; move what only the script itself does below: if __name__ == '__main__':"


def load_task(name: str) -> ModuleType:
    """Import the task `name`, from the folder in which the program was started if it is there.

    Raises ValueError where it cannot be imported or breaks the contract.
    """
    add_task_folders()
    hide_tensorflow.reveal()
    try:
        task = importlib.import_module(name)
    except SystemExit as error:
        why = error.code if isinstance(error.code, str) else MAIN_ONLY
        raise ValueError(f"task {name!r} cannot be imported: {why}") from None
    except Exception as error:  # whatever the script does when it is imported
        extra = EXTRAS.get((getattr(error, "name", None) or "").split(".")[0])
        remedy = "" if extra is None else f"; install it by: pip install '.{extra}'"
        raise ValueError(f"task {name!r} cannot be imported: {one_line(error)}{remedy}") from None
    check_contract(task)
    return task


def add_task_folders() -> None:
    """Let Python look for tasks in the folder in which the program was started, and last among the project's own."""
    if FOLDER in os.environ and os.environ[FOLDER] not in sys.path:
        sys.path.insert(0, os.environ[FOLDER])
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))


@functools.cache
def check_contract(task: ModuleType) -> None:
    """Raise ValueError where a task breaks the contract."""
    breaches = [_breach(task, function, arguments) for function, arguments in CONTRACT.items()]
    if any(breaches):
        names = ", ".join(f"{function}({', '.join(arguments)})" for function, arguments in CONTRACT.items())
        raise ValueError(f"{task.__file__} {', and it '.join(filter(None, breaches))}; a task has {names}")


def _breach(task: ModuleType, name: str, arguments: tuple[str, ...]) -> str:
    """Return what is wrong with one of the four names, "" if nothing is."""
    function = getattr(task, name, None)
    if not callable(function):
        return f"has no {name}()"
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [argument for argument in arguments if argument not in parameters and not open_ended]
    line = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_firstlineno", "?")
    return f"has a {name}() in line {line} that takes no {', '.join(missing)}" if missing else ""


def locate_task(name: str) -> ModuleType:
    """Return the module of the task `name`, which is not run: only where it is becomes known.

    Raises ValueError where it is not found.
    """
    add_task_folders()
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise ValueError(f"task {name!r} cannot be found in {Path.cwd()}")
    module = ModuleType(name)
    module.__file__ = spec.origin
    return module


def find_data(task: ModuleType, root: str) -> str:
    """Return the place that the task would read for `root`, where the task can say so."""
    if hasattr(task, "find_data"):
        return str(task.find_data(root or None))
    return str(Path(root).expanduser().absolute()) if root and Path(root).expanduser().exists() else root


def read_data(task: ModuleType, root: str | None) -> Any:
    """Return the task's training and test split (see samples.py). Raises ValueError where they are something else."""
    try:
        data = task.load_data(root or None)
    except Exception as error:  # whatever the script's own reading may come upon
        raise ValueError(f"{task.__name__}.load_data({root or None!r}) failed: {one_line(error)}") from None
    try:
        train, test = data
        for split in (train, test):
            samples.check(split)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{task.__file__}: load_data() should return (x_train, y_train), (x_test, y_test), a label "
                         f"for each sample, or two map-style data sets; here: {one_line(error)}") from None  # fmt: skip
    return train, test


@functools.lru_cache(maxsize=1)
def open_data(task: ModuleType, root: str) -> tuple[Any, str]:
    """Return the task's data and their fingerprint. A process that answers many messages reads them once."""
    data = read_data(task, root)
    return data, fingerprint(data)


def build_net(task: ModuleType, seed: int, classes: int = 0) -> Any:
    """Build the model from `seed`: given to Net if it takes one, and to each random generator that is loaded.

    A Net that takes `classes` is given how many there are, where that is known. Raises ValueError where Net fails.
    """
    if keras := sys.modules.get("keras"):
        _freeze(task)
        # Or the names of weights would count on, and memory grow: but a full collection takes its time
        keras.utils.clear_session(free_memory=any(value is keras for value in vars(task).values()))
    seed_generators(seed)
    try:
        given = {"seed": seed} | ({"classes": classes} if classes else {})
        return task.Net(**{name: value for name, value in given.items() if _takes(task.Net, name)})
    except Exception as error:
        raise ValueError(f"{task.__name__}.Net() failed: {one_line(error)}") from None


@functools.cache
def _freeze(task: ModuleType) -> None:
    """Keep what is loaded so far out of each later collection, which would look through all of TensorFlow."""
    gc.freeze()


@functools.cache
def _takes(net: Any, name: str) -> bool:
    """Tell whether Net takes an argument: as a function or a class. A metaclass may hide what __init__ takes."""
    return any(name in inspect.signature(function).parameters for function in (net, net.__init__))


def classes_of(task: ModuleType, train: Any) -> int:
    """Return the number of classes in a training split, 0 where Net does not ask for it."""
    return samples.num_classes(train) if _takes(task.Net, "classes") else 0


@functools.lru_cache(maxsize=1)
def train_settings(task: ModuleType, config: RunConfig) -> dict[str, Any]:
    """Return what train() is called with, besides net, data and seed: the same for every client of a node.

    Raises SettingError where the run config's train-arguments are unknown to it, or of another type than its defaults.
    """
    parameters = {name: one for name, one in inspect.signature(task.train).parameters.items() if one.kind in NAMED}
    settable = {name: one.default for name, one in parameters.items() if name not in CONTRACT["train"]}
    settable = {name: default for name, default in settable.items() if isinstance(default, SETTABLE)}
    given = parse(config.train_arguments)
    for name, value in given.items():
        if name not in settable:
            known = ", ".join(settable) or "none"
            raise SettingError(f"train-arguments: {task.__name__}.train() takes no {name}; what can be set: {known}")
        if not _is_like(value, settable[name]):
            kind = type(settable[name]).__name__
            raise SettingError(f"train-arguments: {name}={value!r} should be of type {kind}, as its default in train()")
    fractions = {name: float(value) for name, value in given.items() if isinstance(settable[name], float)}
    return config.train_settings() | fractions


def _is_like(value: Any, default: Any) -> bool:
    """Tell whether a value can be given where a function has this default; whole numbers count as fractions, too."""
    return default is None or type(value) is type(default) or (type(default) is float and type(value) is int)


def seed_generators(seed: int) -> None:
    """Seed each global random generator that is loaded. JAX has none."""
    if keras := sys.modules.get("keras"):
        keras.utils.set_random_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed) if torch.accelerator.is_available() else torch.default_generator.manual_seed(seed)


def client_seed(seed: int, partition: int, first_epoch: int) -> int:
    """Return the shuffling seed of a client that has seen `first_epoch` epochs.

    It counts on from epoch to epoch, and partition 0 starts at the run's own seed: one client alone thus shuffles
    as the centralized script does, whose epoch e is drawn from seed + e. Partitions lie a million epochs apart.
    """
    return (seed + partition * 1_000_003 + first_epoch) % 2**31
