"""The guard: a process that outlives a launcher, and then kills what it has left behind.

Everything that a launcher starts carries a mark in its environment. The guard waits for its parent to end, however it
ends, and then kills whatever carries the mark: nothing of ours survives Ctrl-C or `kill -9`.
"""

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def guard(variable: str, home: Path) -> None:
    """Wait until the parent closes our standard input or dies, then kill all processes that it has started."""
    with suppress(OSError):
        sys.stdin.read()
    kill_all(variable, home.name)
    shutil.rmtree(home, ignore_errors=True)


def kill_all(variable: str, mark: str) -> None:
    """Kill all processes that carry the mark in an environment variable, and those that they start meanwhile."""
    while marked := [process for process in psutil.process_iter() if _value(process, variable) == mark]:
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=0.2)


def _value(process: psutil.Process, variable: str) -> str | None:
    try:
        return str(process.environ().get(variable)) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):
        return None


if __name__ == "__main__":
    guard(sys.argv[1], Path(sys.argv[2]))
