"""A saved model, and what metrics.json beside it says about the run that made it."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from federation.app import weights
from federation.app.config import module_name
from federation.app.console import one_line
from federation.app.run_folder import METRICS
from federation.app.task import build_net, load_task

DEFAULT_TASK = "cifar"
NAME = "final_model"  # of the model in a run folder


class Record(NamedTuple):
    """What is known of a run. Without metrics.json, that is only the task."""

    task: str
    data: str = ""  # what load_data() was given by the server
    seed: int = 0
    classes: int = 0  # how many there are; 0 where that is unknown
    rounds: int = 0
    personal: str = ""  # patterns of the entries that stayed with the clients


class SavedModel(NamedTuple):
    """A model that is loaded, with its task and its record."""

    path: Path
    record: Record
    task: ModuleType
    net: Any


def find_model(path: Path) -> Path:
    """Return the file of a model; of a run folder, that of its final model. Raises ValueError where there is none."""
    if not path.is_dir():
        return path
    found = sorted(one for one in path.glob(f"{NAME}.*") if ".unfinished" not in one.name)
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or f"no {NAME}.*"
        raise ValueError(f"{path} has {names}; name one file by --model")
    return found[0]


def read_record(path: Path, task: str = "") -> Record:
    """Return the record of the run that made the model at `path`, where it is one of the task that is asked for.

    Raises ValueError where metrics.json is damaged.
    """
    source, task = path.with_name(METRICS), module_name(task)
    if not source.is_file():
        return Record(task or DEFAULT_TASK)
    try:
        found = json.loads(source.read_text("utf-8"))
        record = _record(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{source} is no record of a run: {why}; move the model elsewhere and give --task") from None
    return record if task in ("", record.task) else Record(task)


def _record(metrics: dict[str, Any]) -> Record:
    held, name, task = metrics["partitions"].get("train") or [[0]], metrics["dataset"]["name"], metrics["task"]
    counted = len(held[0])  # 1 where labels are not classes
    data = "" if name == task else name
    rounds = len(metrics["rounds"]) - 1
    return Record(task, data, metrics["seed"], counted if counted > 1 else 0, rounds, metrics["config"]["personal"])


def load_model(path: Path, record: Record, classes: int) -> SavedModel:
    """Load a model into the Net() of its task, with so many classes where the record does not say how many.

    Raises ValueError where it is missing, damaged or another one.
    """
    if not path.is_file():
        raise ValueError(f"there is no model {path}")
    task = load_task(record.task)
    net = build_net(task, record.seed, record.classes or classes)
    weights.to_net(weights.read_model(path, net), net)
    return SavedModel(path, record, task, net)


def about(model: SavedModel) -> str:
    """Say in a line or two what a model is."""
    rounds = f", {model.record.rounds} rounds" if model.record.rounds else ""
    line = f"{model.path} of {model.record.task}{rounds}"
    if not model.record.personal:
        return line
    return (f"{line}\nentries that match {model.record.personal!r} stayed with the clients; in this model they have "
            "their initial values, so its predictions are not those of any client")  # fmt: skip
