"""The source files of a task: its own, and those that it imports from beside it, wherever in them it does so."""

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple

from federation.app.layout import SCRIPTS

PACKAGES = {"site-packages", "dist-packages"}
OURS = "federation", "client", "server", ""  # modules that every process has anyway


class Import(NamedTuple):
    """A module that a file imports, or "" where only running the file can tell which one that is."""

    name: str
    line: int
    optional: bool  # it is in a `try`


def sources(task: ModuleType, modules: Iterable[str] = ()) -> dict[str, Path]:
    """Return the files of a task, by their paths from the folder in which Python has found it. It needs no others.

    These are those that its imports name, and those of `modules`, if they are beside it or among the project's scripts.
    An installed task has none.
    """
    base, found, waiting = _base(task), {}, [task.__name__, *modules]
    while waiting:
        for name, file in _files(waiting.pop(), base).items():
            if name not in found:
                found[name] = file
                waiting += [one.name for one in imports(file, name)]
    return dict(sorted(found.items()))


def compared(task: ModuleType) -> dict[str, Path]:
    """Return the files of which all clients need the same version: `sources`, or the file of an installed task."""
    file = Path(str(task.__file__)).absolute()
    return sources(task) or {file.relative_to(_base(task)).as_posix(): file}


def digests(names: Iterable[str]) -> list[str]:
    """Return a digest of each file that Python would import here by that name, "" for one that is not here."""
    folders = [Path(folder or ".") for folder in sys.path]
    found = [next((folder / name for folder in folders if (folder / name).is_file()), None) for name in names]
    return [digest(file) if file else "" for file in found]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def parse(file: Path) -> ast.Module:
    """Return the syntax tree of a file. Raises ValueError if it is not valid Python."""
    try:
        return ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}, is not valid Python: {error.msg}") from None


@functools.cache
def imports(file: Path, name: str) -> list[Import]:
    """Return what a file imports, at its top and inside of functions; `name` is its path from where Python finds it."""
    tree = parse(file)
    package = PurePosixPath(name).parent.parts
    optional = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    found = ((name, node) for node in ast.walk(tree) for name in _names(node, package))
    return [Import(name, node.lineno, node in optional) for name, node in found]  # type: ignore[attr-defined]


def _names(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Return the full names of what a statement in a file of a package imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        return [".".join(filter(None, [*above, node.module, alias.name])) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        name = getattr(node.args[0], "value", "") if node.args else ""
        return [name if isinstance(name, str) and not name.startswith(".") else ""]
    return []


def unresolved(task: ModuleType) -> Iterator[str]:
    """Yield, for each import of a task that clients may not be able to follow, where it is and what to do."""
    base = _base(task)
    for name, file in sources(task).items():
        for one in imports(file, name):
            if not one.name:
                yield f"{name}, line {one.line}: which module that imports can only be seen when it runs; name it"
            elif not one.optional and (elsewhere := _elsewhere(one.name.split(".")[0], base)):
                yield f"{name}, line {one.line}: {one.name} {elsewhere}"


def _elsewhere(module: str, base: Path) -> str:
    """Say where a module is that is neither beside the task nor installed nor ours, "" if it is one of these."""
    if module in OURS or _files(module, base) or any((folder / module).is_dir() for folder in (base, SCRIPTS)):
        return ""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return "is not installed here"
    places = [spec.origin] if spec.origin else [*(spec.submodule_search_locations or ())]
    if not places or places[0] in ("built-in", "frozen") or _is_installed(Path(places[0])):
        return ""
    return f"is at {places[0]} and is not sent to clients; put it beside the task, or install it on each client"


def _is_installed(path: Path) -> bool:
    """Tell whether a path lies in the folders of Python's own modules, or of packages."""
    folders = sys.prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")
    return any(map(path.is_relative_to, folders)) or bool(PACKAGES.intersection(path.parts))


def _base(task: ModuleType) -> Path:
    """Return the folder in which Python has found a task: for a module of a package, the one above that."""
    file = Path(str(task.__file__)).absolute()
    return file.parents[task.__name__.count(".") + (file.name == "__init__.py")]


def _files(module: str, base: Path) -> dict[str, Path]:
    """Return the files that Python runs to import a module from `base`, or else from the project's scripts.

    They are keyed by their paths from there. A module may also be a name in one: `module.name`.
    """
    if module.split(".")[0] in OURS:
        return {}
    return ({} if _is_installed(base) else _files_below(base, module)) or _files_below(SCRIPTS, module)


def _files_below(folder: Path, module: str) -> dict[str, Path]:
    found = []
    for depth in range(1, module.count(".") + 2):
        path = folder.joinpath(*module.split(".")[:depth])
        found += [file for file in (path / "__init__.py", path.with_name(f"{path.name}.py")) if file.is_file()][:1]
    return {file.relative_to(folder).as_posix(): file for file in found}
