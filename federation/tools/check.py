"""Check whether a script can be federated, and what would go wrong.

Imports the script, statement by statement, and tries its four functions on a few of its samples.
"""

import ast
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from federation.app import cores, weights
from federation.app.config import module_name
from federation.app.console import one_line
from federation.app.sources import PACKAGES, parse, unresolved
from federation.app.task import add_task_folders, find_data, load_task, read_data
from federation.launch.trial import BATCH, SEED, Trial, check_usable, norm

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
    add_task_folders()
    spec, origin = find(name)
    body = parse(Path(origin)).body
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
        sys.argv = CommandLine([origin])
        started, modules = time.perf_counter(), len(sys.modules)
        try:
            exec(compile(ast.Module([*future, statement], []), origin, "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise ValueError(f"{origin}, line {statement.lineno}, breaks the import: {one_line(error)}") from None
        seconds = time.perf_counter() - started if len(sys.modules) == modules else 0.0  # or it has imported others
        if effect := import_side_effect(statement, vars(module), seconds, opened, sys.argv.read):
            found.append(f"line {statement.lineno}: {effect}")
    return found


def find(name: str) -> tuple[ModuleSpec, str]:
    """Return where Python finds the module `name`. Raises ValueError if it does not."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its package is missing
        spec = None
    if not spec or not spec.origin:
        raise ValueError(f"task {name!r} cannot be imported: there is no {name.replace('.', '/')}.py in {Path.cwd()}")
    return spec, spec.origin


def import_side_effect(
    statement: ast.stmt, names: dict[str, Any], seconds: float, opened: list[Path], command_line: bool
) -> str:
    """Return what a statement at module level has done that belongs in a function, "" if nothing."""
    if isinstance(statement, ast.Import | ast.ImportFrom | ast.Try | ast.FunctionDef | ast.ClassDef):
        return ""
    if command_line:
        return "the command line is read at import, when it is another program's; do so only in main()"
    elsewhere = (sys.prefix, sys.base_prefix, "/proc", "/sys")  # what is imported late, and what tells of the machine
    files = [path for path in opened if path.is_file() and not any(map(path.is_relative_to, elsewhere))]
    if files := [path for path in files if not PACKAGES.intersection(path.parts)]:
        return f"{files[0]} is read at import: in every process, for every message; do so in load_data()"
    made = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    if large := [name for name in made if math.prod(getattr(names.get(name), "shape", ())) > LARGE]:
        return f"{', '.join(large)} is made at import: in every process, for every message; do so in load_data()"
    if isinstance(statement, ast.For | ast.While) or seconds > LONG:
        return "work is done at import: in every process, for every message; move it to main()"
    return ""


# ------------------------------------------------------------------------------------------- what hurts, one by one


def unrepeatable(trial: Trial) -> str:
    """All that is random should come from a seed: the global one, or the one that is given."""
    one, other = (weights.from_net(trial.net()) for _ in range(2))
    if weights.sha256(one) != weights.sha256(other):
        return "Net() is not deterministic for a fixed seed, so no result can be repeated"
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
    loss = trial.train(lr=0.0).mean_loss()
    others = trial.train(lr=0.0, copies=2).mean_loss(), trial.train(lr=0.0, batch_size=2 * BATCH).mean_loss()
    if max(others) > 1.6 * loss > 0:
        yield "train() returns a sum of losses: it grows with the number of samples, or with the batch"
    if trial.test_loss(copies=2) > 1.6 * trial.test_loss() > 0:
        yield "test() returns a sum of losses: it grows with the number of samples"
    if 1.6 < trial.step(copies=2).step() / trial.step().step() < 2.4:
        yield "train() steps along the sum of the samples' gradients: twice the batch is twice the learning rate"


def tests_that_train(trial: Trial) -> str:
    """test() should leave the net alone: in PyTorch, by net.eval()."""
    net = trial.net()
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


def check_script(task: str, data: str) -> int:
    """Check a script and say what has been found; return the exit status."""
    os.environ |= dict.fromkeys(cores.THREADS, "1") | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    name = module_name(task)
    found = import_watched(name)
    for one in found:
        print(f"{name}, {one}")
    module = load_task(name)
    for one in unresolved(module):
        print(one)
        found.append(one)
    trial = Trial(module, read_data(module, find_data(module, data)))
    try:
        check_usable(trial)
        for one in warnings(trial):
            print(f"{name}: {one}")
            found.append(one)
    except ValueError as error:
        raise ValueError(f"{name} cannot be federated: {error}") from None
    print(f"{name} can be federated{f', but mind the {len(found)} above' if found else ''}")
    return 0
