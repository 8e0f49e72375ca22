"""What a run leaves behind: a line per round, metrics.json, curves.png and the final model."""

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast
from weakref import WeakMethod

import numpy as np
from flwr.app import ArrayRecord

from federation.app import metrics, samples, tracking, weights
from federation.app.archive import Records
from federation.app.checkpoint import check_same, checkpoints, load_checkpoint, save_checkpoint
from federation.app.client_state import forget, last_trained
from federation.app.config import RunConfig
from federation.app.console import MARK, one_line, print_to_user
from federation.app.live import Live
from federation.app.metrics_file import MetricsText
from federation.app.partition import Rows
from federation.app.privacy import note_local
from federation.app.roster import Past
from federation.app.run_folder import METRICS, lock_run_folder, write_atomically
from federation.app.summary import summary

MOST_SHOWN = 2  # metrics besides the loss
MOST_CLASSES = 1000  # with more of them, labels are taken for something else
KEYS = (
    "round", "train_loss", "clients_loss", "server_loss", "clients", "seconds", "waiting_seconds", "samples",
    "client_seconds", "dropped", "left_out", "bytes_down", "bytes_up", "trained", "tested", "fairness",
)  # fmt: skip


class Report:
    """The run folder. It is written anew, atomically, after every round, so that it can be watched, and resumed."""

    def __init__(self, config: RunConfig, model: Any) -> None:
        self.config, self.model = config, model
        self.folder = Path.home() / config.out
        self.started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_run_folder(self.folder) if MARK not in os.environ else None  # else the launcher's
        self.header = ""  # of the table, as it was printed last
        self.arrays: ArrayRecord | None = None  # the global model after the last round that is complete
        self.state: Records = {}  # and what the strategy carries along
        self.live, self.text = Live(), MetricsText()
        root = model.root
        train, test = map(samples.count, model.data) if model.data else (0, 0)
        self.metrics: dict[str, Any] = {
            "task": config.task,
            "dataset": {"name": root or config.task, "train": train, "test": test},
            "seed": config.seed,
            "config": config.values(),
            "versions": {"python": sys.version.split()[0], "flwr": version("flwr")} | _frameworks(),
            "final_weights_sha256": None,
            "status": "running",
            "partitions": {},
            "clients": {},  # which client, by key, has or had which partition
            "best": None,  # the round with the best model, by `best-metric`
            "rounds": [],
            "run": uuid.uuid4().hex,  # its name, under which clients keep their state
        }
        if config.resume:
            self._resume()
        else:
            forget(self.folder)
        self._write()
        if MARK not in os.environ and config.trackers:
            tracking.check_installed(config.trackers)
            self.follower = tracking.follow(self.folder, config.trackers)  # it ends after this process
        if model.data:
            where = root or "its own data"
            print_to_user(f"{config.task} on {where}: {train:,} training and {test:,} test samples")
        else:
            print_to_user(f"{config.task}: initial weights from {Path(config.initial).name}, no data on the server")
        if config.personal:
            print_to_user(f"entries that match {config.personal!r} stay with the clients, which test their own models; "
                          "the server tests, and saves, the model with the initial ones")  # fmt: skip

    def _resume(self) -> None:
        saved, records = load_checkpoint(self.folder)
        check_same(saved["config"], self.config, self.folder)
        if saved["dataset"] != self.metrics["dataset"]:
            raise ValueError(f"cannot resume {self.folder}: it was begun with other data, {saved['dataset']['name']}")
        self.arrays, self.state = records.pop("arrays"), records
        self.metrics |= {key: saved[key] for key in ("rounds", "clients", "partitions", "best", "run")}
        print_to_user(f"resuming after round {saved['rounds'][-1]['round']}")
        if self.metrics["best"] and self.metrics["best"]["round"] == saved["rounds"][-1]["round"]:
            self._save_model("best_model")  # the end may have come before that

    def past(self) -> Past:
        """Return what is known of the run, when it begins or is resumed, before its clients join."""
        partitions = len(self.metrics["partitions"].get("train", ()))
        trained = last_trained(self.metrics["rounds"])
        write = WeakMethod(self._write)  # or the two would keep each other, and the lock of the run folder
        self.live.write = lambda: cast(Callable[[], None], write())()
        return Past(self.metrics["run"], dict(self.metrics["clients"]), partitions, trained, self.live)

    def remaining_rounds(self) -> Iterator[int]:
        """Yield the number of each round to be played; `patience` and `dp-target-epsilon` may end that early."""
        while self.next_round <= self.config.num_server_rounds and not self._is_at_its_end():
            yield self.next_round

    def _is_at_its_end(self) -> bool:
        return self._is_out_of_patience() or self._has_spent_its_epsilon()

    def _has_spent_its_epsilon(self) -> bool:
        target, last = self.config.dp_target_epsilon, (self.metrics["rounds"] or [{}])[-1]
        if not target or (last.get("epsilon_next") or 0) <= target:
            return False
        print_to_user(f"ended after round {last['round']}: another one could spend epsilon {last['epsilon_next']:.4g} "
                      f"(dp-target-epsilon={target:g})")  # fmt: skip
        return True

    def _is_out_of_patience(self) -> bool:
        best, patience = self.metrics["best"], self.config.patience
        if not patience or best is None or self.next_round - 1 - best["round"] < patience:
            return False
        print_to_user(f"ended after round {self.next_round - 1}: {best['metric']} has not improved since round "
                      f"{best['round']} (patience={patience})")  # fmt: skip
        return True

    @property
    def next_round(self) -> int:
        """The number of the first round that is not complete. Round 0 is the initial model."""
        return len(self.metrics["rounds"])

    def partitions(self, parts: dict[str, list[Rows]], data: Any) -> None:
        """Note how many samples of each class each client holds."""
        whole = (data[0], data[0 if self.config.validation_fraction else 1]) if data else ()
        for (split, held), source in zip(parts.items(), whole, strict=False):
            self.metrics["partitions"][split] = count(samples.labels(source, one_pass=False), held)
        if parts:
            self._write()

    def round(self, arrays: ArrayRecord, state: Records, places: Mapping[str, int], **numbers: Any) -> None:
        """Add a round that has made the global model `arrays`, with the strategy in `state`, and show it.

        `places` says which client, by key, has which partition.
        """
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        seconds -= numbers.get("waiting_seconds", 0.0)
        row = self._empty_row(numbers) | {"round": self.next_round} | numbers | {"seconds": round(seconds, 3)}
        row["left_out"] = self.live.end_round()
        if self.config.dp == "local":
            note_local(self.config, self.metrics["rounds"], row)
        self.metrics["rounds"].append(row)
        self.metrics["clients"] = dict(places)
        self.arrays = arrays
        is_best = self._note_best(row)
        with self._saving("a checkpoint"):
            save_checkpoint(self.metrics, {"arrays": arrays, **state}, self.folder)
        if is_best:
            self._save_model("best_model")
        self._write()
        self._show(row)

    def _note_best(self, row: Mapping[str, Any]) -> bool:
        """Tell whether the model of a round is the best so far, and note it.

        Raises ValueError if the round lacks the metric that was chosen.
        """
        key, _, order = self.config.best_key.partition(":")
        value, best = row.get(key), self.metrics["best"]
        if row["round"] and value is None and self.config.best_metric != "server_loss":
            known = [f"{side}_{name}" for side in ("server", "clients", "train") for name in metrics.of_side(side, row)]
            raise ValueError(f"best-metric={key}: a round has only {', '.join(known)}")
        sign = -1 if order == "max" or (not order and not key.endswith("_loss")) else 1
        is_best = value is not None and (best is None or sign * value < sign * best["value"])
        if is_best:
            self.metrics["best"] = {"round": row["round"], "metric": key, "value": value}
        return is_best

    def _save_model(self, name: str) -> str:
        assert self.arrays is not None
        self._save(f"{name}{self.model.suffix}", partial(self.model.save, self.arrays))
        return f"{name}{self.model.suffix}"

    def _empty_row(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row in which each metric that is known is None."""
        own = [f"{side}_{name}" for name in self._own_metrics(numbers) for side in ("clients", "server")]
        apart = ["consensus"] if self.config.topology != "star" else []
        apart += ["epsilon", "epsilon_next"] if self.config.dp != "none" else []
        return dict.fromkeys([*KEYS, *own, *apart])

    def _own_metrics(self, numbers: Mapping[str, Any]) -> list[str]:
        """Return the metrics besides the loss that test() has returned, here or at clients."""
        found = {**metrics.of_side("server", numbers), **metrics.of_side("clients", numbers)}
        before = metrics.of_side("server", self.metrics["rounds"][-1]) if self.metrics["rounds"] else {}
        return [name for name in (found or before) if name != "loss"]

    def _show(self, row: Mapping[str, Any]) -> None:
        """Print a row of the table, and its header if there is another one than before."""
        columns = [column for column in _columns(self._own_metrics(row)[:MOST_SHOWN]) if column[1] in row]
        header = "  ".join(heading for heading, _, _ in columns)
        if header != self.header:
            print_to_user(header)
        self.header = header
        print_to_user("  ".join(_cell(row[key], len(heading), form) for heading, key, form in columns))

    def finish(self) -> None:
        """Save the final model."""
        assert self.arrays is not None
        model = self._save_model("final_model")
        self.metrics |= {"final_weights_sha256": weights.sha256(self.arrays), "status": "finished"}
        self._write()
        if self.metrics["rounds"][-1]["fairness"]:
            print_to_user(_extremes(self.metrics["rounds"][-1]))
        print_to_user(summary(self.config, self.metrics["rounds"], self.metrics["best"]))
        print_to_user(f"saved {model} and metrics.json in {self.folder}")

    def draw(self) -> None:
        """Draw the curves of the run, and who holds what."""
        from federation.app import picture  # here, since matplotlib takes a second that no round should pay for

        for name, draw in {"curves": picture.curves, "partitions": picture.partitions}.items():
            if name == "curves" or self.metrics["partitions"]:
                self._save(f"{name}.png", partial(draw, self.metrics))

    @contextmanager
    def marking_failure(self) -> Iterator[None]:
        """Note it in metrics.json if the run fails."""
        try:
            yield
        except Exception:
            self.metrics["status"] = "failed"
            with suppress(RuntimeError):  # what has gone wrong may be that nothing can be saved
                self._write()
            raise

    def _write(self) -> None:
        started = time.monotonic()
        text = self.text.encode(self.metrics | self.live.facts())
        self._save(METRICS, lambda path: path.write_text(text, "utf-8"))
        self.live.postpone(started)

    def _save(self, name: str, write: Callable[[Path], object]) -> None:
        with self._saving(name):
            write_atomically(self.folder / name, write)

    @contextmanager
    def _saving(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = [f"; {path.name} is whole: make room, and go on by --resume" for path in checkpoints(self.folder)]
            why = error.strerror or one_line(error)
            raise RuntimeError(f"cannot save {name} in {self.folder}: {why}{''.join(kept[-1:])}") from None


def count(labels: Any, held: list[Rows]) -> list[list[int]]:
    """Return how many samples of each class each client holds; or just their number where labels are not classes."""
    classes, numbers = np.unique([] if labels is None else np.asarray(labels), return_inverse=True)
    whole = classes.dtype.kind != "f" or np.array_equal(classes, np.rint(classes))  # of a regression, they are not
    if labels is None or len(classes) > MOST_CLASSES or numbers.size != len(labels) or not whole:
        return [[len(rows)] for rows in held]
    return [np.bincount(numbers.ravel()[rows], minlength=len(classes)).tolist() for rows in held]


def _frameworks() -> dict[str, str]:
    names = ("torch", "torchvision", "jax", "flax", "optax", "keras", "tensorflow")
    return {name: str(sys.modules[name].__version__).split("+")[0] for name in names if sys.modules.get(name)}


def _columns(own: list[str]) -> list[tuple[str, str, str]]:
    """Return the headings of the table, with the key in metrics.json of each and how it is shown."""
    own = [name.rjust(8) for name in own]
    return [
        ("round", "round", "d"), ("train loss", "train_loss", ".4f"), ("clients' loss", "clients_loss", ".4f"),
        *((name, f"clients_{name.strip()}", ".4f") for name in own),
        ("server's loss", "server_loss", ".4f"), *((f" {name}", f"server_{name.strip()}", ".4f") for name in own),
        ("consensus", "consensus", ".4f"), ("epsilon", "epsilon", ".3f"),
        ("clients", "clients", "d"), ("seconds", "seconds", ".1f"), ("waiting", "waiting_seconds", ".1f"),
    ]  # fmt: skip


def _cell(value: float | None, width: int, form: str) -> str:
    text = "-" if value is None else format(value, form)
    return (text if len(text) <= width or form == "d" else f"{value:.3g}").rjust(width)


def _extremes(row: Mapping[str, Any]) -> str:
    """Say which clients have the largest and the smallest loss, and how unequal all of them are."""
    tested, found = row["tested"], row["fairness"]
    shown = metrics.names(tested)[: 1 + MOST_SHOWN]

    def of(client: int) -> str:
        values = (f"{name} {tested[name][tested['client'].index(client)]:.4f}" for name in shown)
        return f"client {client} ({', '.join(values)})"

    spread = ", ".join(f"{name} {found['standard_deviation'][name]:.4f}" for name in shown)
    return f"worst: {of(found['worst'])}; best: {of(found['best'])}; standard deviation over clients: {spread}"
