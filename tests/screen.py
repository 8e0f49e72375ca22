"""What a command prints on a terminal, and what is then on its screen."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT


def printed_on_a_terminal(folder: Path, *arguments: str) -> str:
    """Run Python in `folder` with a terminal of 24 rows and 80 columns, and return all that it prints, to its end."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command, environment = [sys.executable, *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = b""
    with suppress(OSError):  # which is how a terminal ends
        while some := os.read(ours, 10_000):
            printed += some
    os.close(ours)
    assert process.wait(60) == 0, printed
    return printed.decode()


def screen(printed: str) -> list[str]:
    """Return the lines that a terminal shows in the end, where each carriage return goes back to a line's begin."""
    lines = []
    for line in printed.split("\r\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines
