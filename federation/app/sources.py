"""The source files of a task: its own, and the modules that it imports from its folder, anywhere in its code."""

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from federation.app.layout import SCRIPTS

PACKAGES = {"site-packages", "dist-packages"}
OURS = "federation", "client", "server", ""  # modules that every process has


class Import(NamedTuple):
    """A module that a file imports, or "" if only running the file can tell which one."""

    name: str
    line: int
    optional: bool  # whether it is in a `try`


def sources(task: ModuleType, modules: Iterable[str] = ()) -> dict[str, Path]:
    """Return the files that a task needs, by their paths from the folder in which Python found them.

    These are its own file, and those that it imports, directly or not, from its folder or the project's; also those of
    `modules`, if they are there. A task that is installed as a package needs none.
    """
    base, found = _base(task), {}
    waiting = [file for name in (task.__name__, *modules) for file in _files(name, base).items()]
    while waiting:
        name, file = waiting.pop()
        if name not in found:
            found[name] = file
            waiting += [other for one in imports(file, name) for other in _files(one.name, base).items()]
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
    """Return what a file imports, at its top and inside of functions. `name` is its path from where Python looks."""
    tree = parse(file)
    package = Path(name).parent.parts
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
    """Yield, for each import of a task that clients may be unable to resolve, where it is and what to do."""
    base = _base(task)
    for name, file in sources(task).items():
        for one in imports(file, name):
            if not one.name:
                yield f"{name}, line {one.line}: which module this imports is only known at run time; name it"
            elif not one.optional and (elsewhere := _elsewhere(one.name.split(".")[0], base)):
                yield f"{name}, line {one.line}: {one.name} {elsewhere}"


def _elsewhere(module: str, base: Path) -> str:
    """Return where a module is if it is neither beside the task nor installed, otherwise ""."""
    if module in OURS or _files(module, base) or (base / module).is_dir():
        return ""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return "is not installed here"
    places = [spec.origin] if spec.origin else [*(spec.submodule_search_locations or ())]
    if not places or places[0] in ("built-in", "frozen") or _is_installed(Path(places[0])):
        return ""
    return f"is at {places[0]} and is not sent to clients; move it next to the task, or install it on each client"


def _is_installed(path: Path) -> bool:
    """Return whether a path is in a folder of the standard library or of installed packages."""
    folders = sys.prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")
    return any(map(path.is_relative_to, folders)) or bool(PACKAGES.intersection(path.parts))


def _base(task: ModuleType) -> Path:
    """Return the folder in which Python found a task: for a module of a package, the folder of the package."""
    file = Path(str(task.__file__)).absolute()
    return file.parents[task.__name__.count(".") + (file.name == "__init__.py")]


def _files(module: str, base: Path) -> dict[str, Path]:
    """Return the files in `base`, or else in the project's folder, that Python runs to import a module or a name in it.

    The keys are their paths from that folder.
    """
    parts = module.split(".")
    if parts[0] in OURS:
        return {}
    for folder in (base, SCRIPTS):  # a task in another folder may import cifar_data, too
        files = [_file(folder.joinpath(*parts[:depth])) for depth in range(1, len(parts) + 1)]
        if any(files) and (folder == SCRIPTS or not _is_installed(folder)):
            return {file.relative_to(folder).as_posix(): file for file in files if file}
    return {}


def _file(path: Path) -> Path | None:
    """Return the file of the module at `path`, which has no suffix, if there is one."""
    return next(filter(Path.is_file, (path / "__init__.py", path.with_name(f"{path.name}.py"))), None)
