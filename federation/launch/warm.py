"""Warm starts: scripts of the names of Flower's commands, first on a session's PATH, that lead to a fork server.

Only on Linux: frameworks do not survive a fork on macOS, and Windows has none. There, and once a forked child has
crashed, the commands start in the usual way.
"""

import ast
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from federation.launch.fork_server import COMMANDS, FRAMEWORKS, PREPARE

FOLDER = Path(__file__).resolve().parent
CODE = f"import sys; sys.path.insert(0, {str(FOLDER.parents[1])!r}); from federation.launch.prepare import main; main()"
PLAIN = [sys.executable, "-P", "-c", CODE]  # `prepare`, started in the usual way
SUPPORTED = sys.platform == "linux" and hasattr(os, "pidfd_open")


def write_scripts(folder: Path, address: Path) -> None:
    """Write a script for each command, which has it run by the fork server at the socket `address`."""
    folder.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name in COMMANDS:
        write_script(folder / name, address, str(shutil.which(name, path=path)))
    write(plain := folder.parent / PREPARE, PLAIN)
    write_script(folder / PREPARE, address, str(plain))


def write_script(script: Path, address: Path, original: str) -> None:
    # Without site-packages and the environment's settings, Python starts in a hundredth of a second
    write(script, [sys.executable, "-SEI", str(FOLDER / "stand_in.py"), str(address), original])


def write(script: Path, command: list[str]) -> None:
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', "utf-8")
    script.chmod(0o700)


def frameworks_of(task: str, folders: Iterable[Path], with_tensorflow: bool = True) -> list[str]:
    """Guess which modules of frameworks a task needs, from the imports at the top of its file in one of `folders`.

    None where it needs TensorFlow and that is not to be imported.
    """
    files = (folder / f"{task.replace('.', os.sep)}.py" for folder in folders)
    with suppress(OSError, SyntaxError, ValueError, StopIteration):
        tree = ast.parse(next(file for file in files if file.is_file()).read_bytes())
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
        found = [name for name in names if name.partition(".")[0] in FRAMEWORKS]
        if with_tensorflow or not any(name.startswith(("keras", "tensorflow")) for name in found):
            return found
    return []


def listen(address: Path) -> socket.socket:
    """Return a socket that takes requests at `address`, and keeps them while there is no fork server to answer them."""
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(1000)
    return listener


def fork_server(listener: socket.socket, address: Path) -> list[str]:
    """Return the command that starts a fork server; it needs to inherit `listener`."""
    return [sys.executable, "-P", str(FOLDER / "fork_server.py"), str(listener.fileno()), str(address)]
