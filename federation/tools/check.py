"""Check whether a script can be federated, and what would cause problems.

This imports the script, statement by statement, and tries its four functions on a few samples.
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
from federation.tools.new import gaps

LONG = 0.5  # seconds for one statement at module level
LARGE = 10_000  # elements of an array that is created at module level
SAME = 1e-3  # largest distance of equal models, relative to the step between them; rounding causes up to 1e-5


# ------------------------------------------------------------------------------------------------------- importing


class CommandLine(list[str]):
    """A command line that records whether its options have been read."""

    read = False

    def __getitem__(self, index: Any) -> Any:
        self.read |= index != 0
        return super().__getitem__(index)


def import_watched(name: str) -> list[str]:
    """Import the module `name` statement by statement, and return a warning for each that does not belong there.

    Raises ValueError if the module cannot be imported.
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
        seconds = time.perf_counter() - started if len(sys.modules) == modules else 0.0  # without imports
        if effect := import_side_effect(statement, vars(module), seconds, opened, sys.argv.read):
            found.append(f"line {statement.lineno}: {effect}")
    return found


def find(name: str) -> tuple[ModuleSpec, str]:
    """Return the spec and the file of the module `name`. Raises ValueError if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its package does not exist
        spec = None
    if not spec or not spec.origin:
        raise ValueError(f"task {name!r} cannot be imported: there is no {name.replace('.', '/')}.py in {Path.cwd()}")
    return spec, spec.origin


def import_side_effect(
    statement: ast.stmt, names: dict[str, Any], seconds: float, opened: list[Path], command_line: bool
) -> str:
    """Return a warning if a statement at module level has done something that belongs in a function, else ""."""
    if isinstance(statement, ast.Import | ast.ImportFrom | ast.Try | ast.FunctionDef | ast.ClassDef):
        return ""
    if command_line:
        return "the command line is read at import, when it belongs to another program; read it in main()"
    elsewhere = (sys.prefix, sys.base_prefix, "/proc", "/sys")  # files of modules, and files that describe the machine
    files = [path for path in opened if path.is_file() and not any(map(path.is_relative_to, elsewhere))]
    if files := [path for path in files if path.suffix != ".py" and not PACKAGES.intersection(path.parts)]:
        return f"{files[0]} is read at import, in every process for every message; read it in load_data()"
    made = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    if large := [name for name in made if math.prod(getattr(names.get(name), "shape", ())) > LARGE]:
        return f"{', '.join(large)} is created at import, in every process for every message; create it in load_data()"
    if isinstance(statement, ast.For | ast.While) or seconds > LONG:
        return "work is done at import, in every process for every message; move it to main()"
    return ""


# -------------------------------------------------------------------------------------------------- the warnings


def unrepeatable(trial: Trial) -> str:
    """All random numbers should come from a seed: the global one, or the argument."""
    one, other = (weights.from_net(trial.net()) for _ in range(2))
    if weights.sha256(one) != weights.sha256(other):
        return "Net() is not deterministic for a fixed seed, so results cannot be reproduced"
    if not trial.train().equals(trial.train_anew()):
        return ("train() draws random numbers that do not come from its seed: two trainings with the same seed differ, "
                "so results cannot be reproduced")  # fmt: skip
    return ""


def seedless(trial: Trial) -> str:
    """Another seed should give another order of samples."""
    ignored = trial.train().equals(trial.train(seed=SEED + 1))
    return "train() ignores its seed: samples come in the same order in every round, on every client" if ignored else ""


def restarts(trial: Trial) -> str:
    """train() is called again in every round: whatever it keeps between epochs is lost."""
    if trial.train(epochs=2).equals(trial.train(calls=2)):
        return ""
    if trial.step(epochs=2).apart(trial.step(calls=2)) > SAME:
        return ("an optimizer with memory (momentum, Adam) or a learning rate schedule restarts in every call of "
                "train(), so in every round; with more local epochs it restarts less often")  # fmt: skip
    return ("epoch e of train() is not shuffled with seed + e: N rounds of one epoch do not see the same batches as "
            "N epochs")  # fmt: skip


def random_steps(trial: Trial) -> str:
    """A step on all samples at once should not be random."""
    if trial.step().apart(trial.step(seed=SEED + 1)) <= SAME:
        return ""
    return ("train() makes random steps (dropout, augmentation): rung 3 of the ladder, which proves that the mean of "
            "the clients' steps is the step on all data, is skipped")  # fmt: skip


def statistics(trial: Trial) -> str:
    """Weights that change although the learning rate is 0 do not follow a gradient, but describe a client's data."""
    moved = trial.train(lr=0.0).moved()
    if moved == trial.train().moved():
        return "train() ignores its lr"
    if moved:
        return (f"{', '.join(sorted(moved))}: changed although lr is 0. Statistics of the data (BatchNorm) are "
                "averaged, and fit no client if the clients' data differ: GroupNorm has none. Or the learning rate is "
                "fixed in the script")  # fmt: skip
    return ""


def sums(trial: Trial) -> Iterator[str]:
    """Losses should be means, which do not grow with the number of samples or the batch size."""
    loss = trial.train(lr=0.0).mean_loss()
    others = trial.train(lr=0.0, copies=2).mean_loss(), trial.train(lr=0.0, batch_size=2 * BATCH).mean_loss()
    if max(others) > 1.6 * loss > 0:
        yield "train() returns a sum of losses: it grows with the number of samples or the batch size"
    if trial.test_loss(copies=2) > 1.6 * trial.test_loss() > 0:
        yield "test() returns a sum of losses: it grows with the number of samples"
    if 1.6 < trial.step(copies=2).step() / trial.step().step() < 2.4:
        yield "train() follows the sum of the samples' gradients: twice the batch size is twice the learning rate"


def tests_that_train(trial: Trial) -> str:
    """test() should not change the net; in PyTorch, this needs net.eval()."""
    net = trial.net()
    before = weights.from_net(net)
    trial.call("test", net, trial.data())
    return "test() changes the net; is net.eval() missing?" if norm(before, weights.from_net(net)) else ""


def no_rate(trial: Trial) -> str:
    return "train() has no default for lr: every run must set learning-rate" if trial.defaults else ""


CHECKS: tuple[Callable[[Trial], str | Iterator[str]], ...] = (
    seedless, restarts, random_steps, statistics, sums, tests_that_train, no_rate,
)  # fmt: skip


def warnings(trial: Trial) -> Iterator[str]:
    """Yield all warnings. If results cannot be reproduced, the other checks are not possible."""
    for check in tqdm((unrepeatable, *CHECKS), "trying", leave=False, disable=None):
        found = check(trial)
        yield from filter(None, [found] if isinstance(found, str) else found)
        if found and check is unrepeatable:
            return


# --------------------------------------------------------------------------------------------------------- command


def check_script(task: str, data: str) -> int:
    """Check a script, print the warnings, and return the exit status."""
    os.environ |= dict.fromkeys(cores.THREADS, "1") | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    name = module_name(task)
    found = import_watched(name)
    for one in found:
        print(f"{name}, {one}")
    module = load_task(name)
    if left := [f"{name}, {gap}" for gap in gaps(Path(str(module.__file__)))]:
        print(*left, sep="\n")
        raise ValueError(f"{name} cannot be federated yet: fill in what is listed above")
    for one in unresolved(module):
        print(one)
        found.append(one)
    trial = Trial(module, read_data(module, find_data(module, data)))
    try:
        check_usable(trial)
        for one in warnings(trial):
            tqdm.write(f"{name}: {one}")  # above the progress bar
            found.append(one)
    except ValueError as error:
        raise ValueError(f"{name} cannot be federated: {error}") from None
    warned = f" ({len(found)} warning{'s' * (len(found) > 1)} above)" if found else ""
    print(f"{name} can be federated{warned}")
    return 0
