"""Is a script a task, and what of it would hurt in a federation?

    python -m federation.check my_script --data DIR

Imports the script, statement by statement, and tries its four functions on a few of its samples. Exit status: 0 if it
can be federated, with or without warnings, 1 if it cannot, 2 for a wrong command line.
"""

import argparse
import ast
import functools
import importlib.util
import inspect
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, NamedTuple, SupportsFloat

import numpy as np
from flwr.app import ArrayRecord
from tqdm import tqdm

from federation import launch, weights
from federation.console import reason
from federation.task import build_net, find_data, load_task, read_data, seed_generators

SAMPLES, BATCH, SEED = 96, 16, 7
LONG = 0.5  # seconds for one statement of an import
LARGE = 10_000  # elements of an array that an import leaves behind
SAME = 1e-3  # how far two models may be apart, as a part of the step that led to them; rounding makes up to 1e-5 of it


# ------------------------------------------------------------------------------------------------------- importing


class CommandLine(list[str]):
    """A command line that knows whether its options have been looked at."""

    read = False

    def __getitem__(self, index: Any) -> Any:
        self.read |= index != 0
        return super().__getitem__(index)


def import_watched(name: str) -> list[str]:
    """Import the module `name` one statement after the other; return what each does that an import should not do.

    Raises ValueError where it cannot be imported.
    """
    spec = importlib.util.find_spec(name)
    if not spec or not spec.origin:
        raise ValueError(f"task {name!r} cannot be imported: there is no {name.replace('.', '/')}.py in {Path.cwd()}")
    try:
        body = ast.parse(Path(spec.origin).read_bytes(), spec.origin).body
    except SyntaxError as error:
        raise ValueError(f"{spec.origin}, line {error.lineno}, is no Python: {error.msg}") from None
    future: list[ast.stmt] = [one for one in body if isinstance(one, ast.ImportFrom) and one.module == "__future__"]
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    opened: list[Path] = []

    def note(event: str, given: Any) -> None:
        if event == "open" and "r" in (given[1] or "r"):
            opened.append(Path(str(given[0])))

    sys.addaudithook(note)
    found = []
    for statement in body:
        opened.clear()
        sys.argv = CommandLine([spec.origin])
        started, modules = time.perf_counter(), len(sys.modules)
        try:
            exec(compile(ast.Module([*future, statement], []), spec.origin, "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise ValueError(f"{spec.origin}, line {statement.lineno}, breaks the import: {reason(error)}") from None
        seconds = time.perf_counter() - started if len(sys.modules) == modules else 0.0  # or it has imported others
        if deed := deed_of(statement, vars(module), seconds, opened, sys.argv.read):
            found.append(f"line {statement.lineno}: {deed}")
    return found


def deed_of(statement: ast.stmt, names: dict[str, Any], seconds: float, opened: list[Path], command_line: bool) -> str:
    """Return what a statement at module level has done that belongs into a function, "" if nothing."""
    if isinstance(statement, ast.Import | ast.ImportFrom | ast.Try | ast.FunctionDef | ast.ClassDef):
        return ""
    if command_line:
        return "the command line is read at import, when it is another program's; do so only in main()"
    elsewhere = (sys.prefix, sys.base_prefix, "/proc", "/sys")  # what is imported late, and what tells of the machine
    if files := [path for path in opened if path.is_file() and not any(map(path.is_relative_to, elsewhere))]:
        return f"{files[0]} is read at import: in every process, for every message; do so in load_data()"
    made = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    if large := [name for name in made if math.prod(getattr(names.get(name), "shape", ())) > LARGE]:
        return f"{', '.join(large)} is made at import: in every process, for every message; do so in load_data()"
    if isinstance(statement, ast.For | ast.While) or seconds > LONG:
        return "work is done at import: in every process, for every message; move it to main()"
    return ""


# ---------------------------------------------------------------------------------------------------------- trying


class Outcome(NamedTuple):
    """The weights of a model before and after training, by name, and what train() has returned."""

    before: ArrayRecord
    after: ArrayRecord
    loss: Any

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

    def __init__(self, task: ModuleType, root: str) -> None:
        self.task = task
        self.samples, _ = read_data(task, find_data(task, root))
        self.rows = np.sort(np.random.default_rng(0).permutation(len(self.samples[1]))[:SAMPLES]).astype(np.int32)
        parameter = inspect.signature(task.train).parameters.get("lr")
        self.defaults = {"lr": 0.01} if parameter and parameter.default is parameter.empty else {}
        self.train: Callable[..., Outcome] = functools.cache(self.train_anew)  # most checks compare with the same ones

    def data(self, copies: int = 1) -> Any:
        """Return the samples, each of them `copies` times. Raises ValueError where rows cannot be picked."""
        rows = np.concatenate([self.rows] * copies)
        try:
            return tuple(part[rows] for part in self.samples)
        except Exception as error:
            kinds = " and ".join(type(part).__name__ for part in self.samples)
            raise ValueError(f"load_data() should return arrays, from which rows can be picked by an array of their "
                             f"numbers; it returns {kinds}: {reason(error)}") from None  # fmt: skip

    def train_anew(self, calls: int = 1, copies: int = 1, seed: int = SEED, **given: Any) -> Outcome:
        """Train a new net, in one call of train() or several that count on the seed."""
        given = {"epochs": 1, "batch_size": BATCH} | self.defaults | given
        net, data = build_net(self.task, SEED), self.data(copies)
        before = weights.from_net(net)
        seed_generators(random.SystemRandom().randrange(2**31))  # what it draws is to come from its seed
        for call in range(calls):
            loss = self.call("train", net, data, seed=seed + call * given["epochs"], **given)
        return Outcome(before, weights.from_net(net), loss)

    def test(self, copies: int = 1) -> Any:
        return self.call("test", build_net(self.task, SEED), self.data(copies))

    def call(self, function: str, *given: Any, **named: Any) -> Any:
        """Call train() or test(). Raises ValueError where it fails."""
        try:
            return getattr(self.task, function)(*given, **named)
        except Exception as error:
            lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == self.task.__file__]
            where = f"in line {lines[-1]}" if lines else "where it is called"
            raise ValueError(f"{function}() with {named} failed {where}: {reason(error)}") from None

    def step(self, copies: int = 1, **given: Any) -> Outcome:
        """Train a new net on all samples at once."""
        return self.train(copies=copies, batch_size=copies * len(self.rows), **given)


def check_usable(trial: Trial) -> None:
    """Raise ValueError where one of the four functions does something that no federation can use."""
    trained, tested = trial.train(), trial.test()
    if not isinstance(trained.loss, SupportsFloat):
        raise ValueError(f"train() returns {type(trained.loss).__name__}, but it should train the net that it is "
                         "given, and return the mean loss per sample")  # fmt: skip
    if not trained.moved():
        raise ValueError("train() leaves the net that it is given as it was: it should train that one, not a copy")
    if not isinstance(tested, tuple) or len(tested) != 2 or not all(isinstance(one, SupportsFloat) for one in tested):
        raise ValueError(f"test() returns {tested!r}, but it should return (mean loss per sample, accuracy)")
    if not 0 <= float(tested[1]) <= 1:
        raise ValueError(f"test() returns an accuracy of {float(tested[1]):g}; it should lie in 0..1")


# ------------------------------------------------------------------------------------------- what hurts, one by one


def unrepeatable(trial: Trial) -> str:
    """All that is random should come from a seed: the global one, or the one that is given."""
    one, other = (weights.from_net(build_net(trial.task, SEED)) for _ in range(2))
    if weights.sha256(one) != weights.sha256(other):
        return "Net() is another one for the same seed, so that no result can be repeated"
    if not trial.train().equals(trial.train_anew()):
        return ("train() draws random numbers that do not come from its seed: two trainings with one seed differ, "
                "so that no result can be repeated")  # fmt: skip
    return ""


def seedless(trial: Trial) -> str:
    """Another seed should mean another order."""
    ignored = trial.train().equals(trial.train(seed=SEED + 1))
    return "train() ignores its seed: samples come in one order in every round, at every client" if ignored else ""


def restarts(trial: Trial) -> str:
    """In every round train() is called anew: whatever it keeps from epoch to epoch is lost."""
    if trial.train(epochs=2).equals(trial.train(calls=2)):
        return ""
    if trial.step(epochs=2).apart(trial.step(calls=2)) > SAME:
        return ("an optimizer with a memory (momentum, Adam) or a schedule restarts with every call of train(), and so "
                "in every round: give it more local epochs, or a constant rate")  # fmt: skip
    return "epoch e of train() is not shuffled by seed + e: an epoch in each of N rounds does not see N epochs' batches"


def random_steps(trial: Trial) -> str:
    """A step on all samples at once should have nothing random about it."""
    if trial.step().apart(trial.step(seed=SEED + 1)) <= SAME:
        return ""
    return ("train() makes random steps (dropout, augmentation): rung 3 of the ladder, the proof that clients' steps "
            "average to the step on all data, is skipped")  # fmt: skip


def statistics(trial: Trial) -> str:
    """What moves without a learning rate follows no gradient: it describes the data that a client has seen."""
    moved = trial.train(lr=0.0).moved()
    if moved == trial.train().moved():
        return "train() ignores its lr"
    if moved:
        return (f"{', '.join(sorted(moved))}: changed though lr is 0. Statistics of the data (BatchNorm) are averaged, "
                "and fit no client where data differ: GroupNorm has none; a fixed rate obeys no config")  # fmt: skip
    return ""


def sums(trial: Trial) -> Iterator[str]:
    """Losses should be means: neither more samples nor larger batches make them larger."""
    loss = float(trial.train(lr=0.0).loss)
    others = trial.train(lr=0.0, copies=2).loss, trial.train(lr=0.0, batch_size=2 * BATCH).loss
    if max(map(float, others)) > 1.6 * loss > 0:
        yield "train() returns a sum of losses: it grows with the number of samples, or with the batch"
    if float(trial.test(copies=2)[0]) > 1.6 * float(trial.test()[0]) > 0:
        yield "test() returns a sum of losses: it grows with the number of samples"
    if 1.6 < trial.step(copies=2).step() / trial.step().step() < 2.4:
        yield "train() steps along the sum of the samples' gradients: twice the batch is twice the learning rate"


def tests_that_train(trial: Trial) -> str:
    """test() should leave the net alone: in PyTorch, by net.eval()."""
    net = build_net(trial.task, SEED)
    before = weights.from_net(net)
    trial.call("test", net, trial.data())
    return "test() changes the net (no net.eval()?)" if norm(before, weights.from_net(net)) else ""


def no_rate(trial: Trial) -> str:
    return "train() has no default for lr: every run has to set learning-rate" if trial.defaults else ""


CHECKS: tuple[Callable[[Trial], str | Iterator[str]], ...] = (
    seedless, restarts, random_steps, statistics, sums, tests_that_train, no_rate,
)  # fmt: skip


def warnings(trial: Trial) -> Iterator[str]:
    """Yield all that hurts. Where nothing can be repeated, nothing can be compared either."""
    for check in tqdm((unrepeatable, *CHECKS), "trying", leave=False, disable=None):
        found = check(trial)
        yield from filter(None, [found] if isinstance(found, str) else found)
        if found and check is unrepeatable:
            return


# --------------------------------------------------------------------------------------------------------- command


def command() -> int:
    """Read the command line, check a script and say what has been found; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m federation.check", description=__doc__.split("\n")[0])
    parser.add_argument("task", help="the name of the script, as for import: my_script, or package.my_script")
    parser.add_argument("--data", default="", metavar="DIR", help="its data (default: the script's own choice)")
    args = parser.parse_args()
    os.environ |= dict.fromkeys(launch.THREADS, "1") | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    found = import_watched(args.task)
    for one in found:
        print(f"{args.task}, {one}")
    trial = Trial(load_task(args.task), args.data)
    try:
        check_usable(trial)
        for one in warnings(trial):
            print(f"{args.task}: {one}")
            found.append(one)
    except ValueError as error:
        raise ValueError(f"{args.task} cannot be federated: {error}") from None
    print(f"{args.task} can be federated{f', but mind the {len(found)} above' if found else ''}")
    return 0


if __name__ == "__main__":
    launch.run_command(command)
