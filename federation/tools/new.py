"""Writing a task: one that runs at once, or one that adapts a script of others, which stays as it is."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from federation.app.sources import parse

TAKEN = {"client", "server", "federation"} | sys.stdlib_module_names
SKELETON = Path(__file__).with_name("skeleton.py")


def write_new(path: Path, script: Path | None) -> None:
    """Write a task to a new file: the skeleton, or what adapts `script`. Raises ValueError where that cannot be."""
    if path.suffix != ".py" or not path.stem.isidentifier() or path.stem in TAKEN:
        raise ValueError(f"{path} cannot be imported as a task: give it another name, such as my_task.py")
    if script and (script.absolute().parent != path.absolute().parent or not script.stem.isidentifier()):
        raise ValueError(f"{path} could not import {script}: write it beside that, and name both like my_task.py")
    text = _adapter(script, path) if script else SKELETON.read_text("utf-8").replace("skeleton", path.stem)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} exists, and is left as it is: choose another name") from None


def _adapter(script: Path, path: Path) -> str:
    from federation.tools.adapter import Adapter

    return Adapter(script).text(path.stem)


def gaps(file: Path) -> Iterator[str]:
    """Yield, for each gap that is left in a task, in which line it is and what to do."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = getattr(node.exc.args[0], "value", "")
            if isinstance(text, str) and text.startswith("TODO: "):
                yield f"line {node.lineno}: {text}"
