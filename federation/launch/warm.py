"""Warm starts of Flower's commands: scripts of their names, first on a session's PATH, that lead to a fork server.

Only on Linux: frameworks do not survive a fork on macOS, and Windows has none. There, and once a forked child has
crashed, the commands start in the usual way.
"""

import os
import shlex
import shutil
import socket
import sys
from pathlib import Path

from federation.launch.fork_server import COMMANDS

FOLDER = Path(__file__).resolve().parent
SUPPORTED = sys.platform == "linux" and hasattr(os, "pidfd_open")


def write_scripts(folder: Path, address: Path) -> None:
    """Write a script for each command of Flower, which has it run by the fork server at the socket `address`."""
    folder.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name in COMMANDS:
        write_script(folder / name, address, str(shutil.which(name, path=path)))


def write_script(script: Path, address: Path, original: str) -> None:
    # Without site-packages and the environment's settings, Python starts in a hundredth of a second
    line = shlex.join([sys.executable, "-SEI", str(FOLDER / "stand_in.py"), str(address), original])
    script.write_text(f'#!/bin/sh\nexec {line} "$@"\n', "utf-8")
    script.chmod(0o700)


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
