"""The guard: a process that outlives a launcher and then kills the processes that the launcher leaves behind.

All processes that a launcher starts have a mark in their environment. The guard waits until its parent ends, for
whatever reason, and then kills all processes with this mark, so that none survives Ctrl-C or `kill -9`.
"""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def guard(variable: str, home: Path) -> None:
    """Wait until the parent ends or closes this process's standard input, then kill all processes that it started."""
    with suppress(OSError):
        sys.stdin.read()
    kill_all(variable, home.name)
    shutil.rmtree(home, ignore_errors=True)


def kill_all(variable: str, mark: str) -> None:
    """Kill all processes with the mark in an environment variable, including those that they start meanwhile.

    Ray's agents overwrite their environment with their title. They are found by their session: all processes with the
    mark are in sessions that were created by a launcher.
    """
    sessions: set[int] = set()
    while marked := _marked(variable, mark, sessions):
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=0.2)


def _marked(variable: str, mark: str, sessions: set[int]) -> list[psutil.Process]:
    """Return the processes that have the mark or are in one of `sessions`; add their sessions to `sessions`."""
    alive = [process for process in psutil.process_iter() if _is_alive(process)]
    carriers = {process.pid for process in alive if _value(process, variable) == mark}
    sessions |= {_session(pid) for pid in carriers} - {_session(0), 0}
    return [process for process in alive if process.pid in carriers or _session(process.pid) in sessions]


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _session(pid: int) -> int:
    """Return the session of a process (0: of this process), or 0 if there are no sessions, as on Windows."""
    with suppress(OSError, AttributeError):
        return os.getsid(pid)
    return 0


def _value(process: psutil.Process, variable: str) -> str | None:
    with suppress(psutil.Error, OSError):
        return str(process.environ().get(variable))
    return None


if __name__ == "__main__":
    guard(sys.argv[1], Path(sys.argv[2]))
