"""What a run leaves behind: a line per round, metrics.json, curves.png and the final model."""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from federation import weights
from federation.config import Config
from federation.console import say

COLUMNS = {  # heading: key in metrics.json, and how it is shown
    "round": ("round", "5d"),
    "train loss": ("train_loss", "10.4f"),
    "clients' loss": ("clients_loss", "13.4f"),
    "accuracy": ("clients_accuracy", "8.4f"),
    "server's loss": ("server_loss", "13.4f"),
    " accuracy": ("server_accuracy", "9.4f"),
    "clients": ("clients", "7d"),
    "seconds": ("seconds", "7.1f"),
}
KEYS = [key for key, _ in COLUMNS.values()] + ["client_seconds", "dropped", "bytes_down", "bytes_up"]


class Report:
    """The run folder. It is written anew, atomically, after every round, so that it can be watched."""

    def __init__(self, config: Config, root: str, data: Any) -> None:
        self.folder = Path.home() / str(config["out"])
        self.started = time.perf_counter()
        (x_train, _), (x_test, _) = data
        self.metrics: dict[str, Any] = {
            "task": config["task"],
            "dataset": {"name": root or str(config["task"]), "train": len(x_train), "test": len(x_test)},
            "seed": config["seed"],
            "config": config,
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in ("flwr", *_frameworks())},
            "final_weights_sha256": None,
            "status": "running",
            "rounds": [],
        }
        self.write()
        say(f"{config['task']} on {root or 'its own data'}: {len(x_train):,} training and {len(x_test):,} test samples")

    def round(self, **numbers: float | None) -> None:
        """Add a round, and show it."""
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        row = dict.fromkeys(KEYS) | numbers | {"seconds": round(seconds, 3)}
        if not self.metrics["rounds"]:
            say("  ".join(COLUMNS))
        self.metrics["rounds"].append(row)
        self.write()
        say("  ".join(_cell(row[key], form) for key, form in COLUMNS.values()))

    def finish(self, arrays: ArrayRecord, net: Any) -> None:
        """Save the final model and the picture."""
        weights.to_net(arrays, net)
        write_atomically(self.folder / "final_model.pt", lambda path: weights.save(net, path))
        self.metrics |= {"final_weights_sha256": weights.sha256(arrays), "status": "finished"}
        write_atomically(self.folder / "curves.png", lambda path: plot(self.metrics, path))
        self.write()
        say(f"saved final_model.pt, metrics.json and curves.png in {self.folder}")

    def fail(self) -> None:
        self.metrics["status"] = "failed"
        self.write()

    def write(self) -> None:
        text = json.dumps(self.metrics, indent=2)
        write_atomically(self.folder / "metrics.json", lambda path: path.write_text(text + "\n", "utf-8"))


def mark_failed(folder: Path) -> None:
    """Note in a run folder that the run is not going on any more, unless it ended by itself."""
    path = folder / "metrics.json"
    if path.exists() and '"status": "running"' in (text := path.read_text("utf-8")):
        failed = text.replace('"status": "running"', '"status": "failed"')
        write_atomically(path, lambda unfinished: unfinished.write_text(failed, "utf-8"))


def _frameworks() -> list[str]:
    return [name for name in ("torch", "torchvision", "jax", "flax", "keras", "tensorflow") if name in sys.modules]


def _cell(value: float | None, form: str) -> str:
    return "-".rjust(int(form.rstrip("df").split(".")[0])) if value is None else format(value, form)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and move it there once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}-{os.getpid()}.unfinished{path.suffix}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Draw accuracy and loss per round."""
    from matplotlib.figure import Figure  # here, since it takes a second that no round should pay for

    rounds = metrics["rounds"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    _curve(accuracy, rounds, "server_accuracy", "server, whole test set", "-o", "#0072b2")
    _curve(accuracy, rounds, "clients_accuracy", "clients, weighted mean", "x", "#d55e00")
    _curve(loss, rounds, "server_loss", "server, whole test set", "-o", "#0072b2")
    _curve(loss, rounds, "clients_loss", "clients, weighted mean", "x", "#d55e00")
    _curve(loss, rounds, "train_loss", "clients, training", "--s", "#009e73")
    for axes, what in ((accuracy, "accuracy"), (loss, "mean loss per sample")):
        axes.set(xlabel="round", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    dataset = metrics["dataset"]
    figure.suptitle(f"{metrics['task']} on {Path(dataset['name']).name} ({dataset['train']:,} samples), federated")
    figure.savefig(path, dpi=120)


def _curve(axes: Any, rounds: list[dict[str, Any]], key: str, label: str, style: str, colour: str) -> None:
    points = [(row["round"], row[key]) for row in rounds if row[key] is not None]
    axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=8) if points else None
