"""Trying a task on a few of its samples: whether its functions take and return what a federation needs."""

import functools
import inspect
import io
import math
import random
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from traceback import extract_tb
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from federation.app import metrics, weights
from federation.app.console import one_line
from federation.app.fingerprint import fingerprint, some_rows
from federation.app.samples import count, is_arrays, item, take
from federation.app.task import build_net, classes_of, seed_generators

SAMPLES, BATCH, SEED = 96, 16, 7


class Outcome(NamedTuple):
    """The weights of a model before and after training, by name, and what train() has returned."""

    before: ArrayRecord
    after: ArrayRecord
    loss: Any

    def mean_loss(self) -> float:
        return metrics.named("train", self.loss)["loss"]

    def moved(self) -> set[str]:
        """Return the names of the weights that have changed."""
        return {name for name, array in self.after.items() if array.data != self.before[name].data}

    def equals(self, other: "Outcome") -> bool:
        return weights.sha256(self.after) == weights.sha256(other.after)

    def apart(self, other: "Outcome") -> float:
        """Return how far both are apart, as a part of the step that has led to this one."""
        return norm(self.after, other.after) / self.step()

    def step(self) -> float:
        return norm(self.after, self.before)


def norm(one: ArrayRecord, other: ArrayRecord) -> float:
    """Return the Euclidean distance of two models."""
    return math.hypot(*(float(np.linalg.norm(one[name].numpy().astype(float) - other[name].numpy())) for name in one))


class Trial:
    """A task, and some of its training samples to try it on."""

    def __init__(
        self, task: ModuleType, data: Any, most: int = SAMPLES, settings: Mapping[str, Any] | None = None
    ) -> None:
        """`settings` are further arguments of train()."""
        self.task, self.settings = task, dict(settings or {})
        self.samples, self.test_samples = data
        self.rows = some_rows(count(self.samples), most)
        self.classes = classes_of(task, self.samples)
        parameter = inspect.signature(task.train).parameters.get("lr")
        self.defaults = {"lr": 0.01} if parameter and parameter.default is parameter.empty else {}
        self.train: Callable[..., Outcome] = functools.cache(self.train_anew)  # most checks compare with the same ones

    def data(self, copies: int = 1) -> Any:
        """Return the samples, each of them `copies` times. Raises ValueError where rows cannot be picked."""
        return pick(self.samples, np.concatenate([self.rows] * copies))

    def train_anew(self, calls: int = 1, copies: int = 1, seed: int = SEED, **given: Any) -> Outcome:
        """Train a new net, in one call of train() or several that count on the seed."""
        given = {"epochs": 1, "batch_size": BATCH} | self.defaults | self.settings | given
        net, data = self.net(), self.data(copies)
        before = weights.from_net(net)
        seed_generators(random.SystemRandom().randrange(2**31))  # what it draws is to come from its seed
        for call in range(calls):
            loss = self.call("train", net, data, seed=seed + call * given["epochs"], **given)
        return Outcome(before, weights.from_net(net), loss)

    def test(self, copies: int = 1) -> Any:
        return self.call("test", self.net(), self.data(copies))

    def test_loss(self, copies: int = 1) -> float:
        return metrics.named("test", self.test(copies))["loss"]

    def net(self) -> Any:
        return build_net(self.task, SEED, self.classes)

    def call(self, function: str, *given: Any, **named: Any) -> Any:
        """Call train() or test(). Raises ValueError where it fails."""
        try:
            with redirect_stdout(io.StringIO()):  # what scripts print as they train is for whoever trains
                return getattr(self.task, function)(*given, **named)
        except Exception as error:
            lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == self.task.__file__]
            where = f"in line {lines[-1]}" if lines else "where it is called"
            raise ValueError(f"{function}() with {named} failed {where}: {one_line(error)}") from None

    def step(self, copies: int = 1, **given: Any) -> Outcome:
        """Train a new net on all samples at once."""
        return self.train(copies=copies, batch_size=copies * len(self.rows), **given)


def pick(split: Any, rows: NDArray[np.int64]) -> Any:
    """Return those rows of a split. Raises ValueError where they cannot be picked."""
    try:
        picked = take(split, rows)
        lengths = {len(part) for part in (picked if is_arrays(split) else [picked])}
        if not is_arrays(split):
            item(split, int(rows[0]))
    except Exception as error:
        kinds = " and ".join(type(part).__name__ for part in (split if is_arrays(split) else [split]))
        raise ValueError(f"load_data() should return arrays, from which rows can be picked by an array of their "
                         f"numbers, or map-style data sets; it has {kinds}: {one_line(error)}") from None  # fmt: skip
    if lengths != {len(rows)}:
        raise ValueError(f"load_data() should return arrays; of {len(rows)} rows picked from one, there are {lengths}")
    return picked


def check_usable(trial: Trial) -> None:
    """Raise ValueError where one of the four functions does something that no federation can use."""
    for split in (trial.samples, trial.test_samples):
        pick(split, some_rows(count(split), BATCH))
    fingerprint((trial.samples, trial.test_samples))
    trained, tested = trial.train(), trial.test()
    metrics.named("train", trained.loss)
    metrics.named("test", tested)
    if not trained.moved():
        raise ValueError("train() leaves the net that it is given as it was: it should train that one, not a copy")
