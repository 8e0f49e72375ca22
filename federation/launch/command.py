"""Running a program to its end: its exit status, its one line of error, and the signals that stop it."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NoReturn

from federation.app.console import FOLDER
from federation.launch.network import LaunchError


def run_command(command: Callable[[], int], name: str = "") -> NoReturn:
    """Run a program and exit with its status, with 1 and one line if it fails, 130 after Ctrl-C, SIGTERM or SIGHUP."""
    catch_signals()
    os.environ[FOLDER] = str(Path.cwd())
    name = name or Path(sys.argv[0]).name
    try:
        sys.exit(command())
    except (LaunchError, ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        say_stopped(name)
        sys.exit(130)


def catch_signals() -> None:
    """Take the signals that end a program for Ctrl-C; SIGINT is one of them even where a shell has it ignored, for `&`.

    SIGHUP is what a closed terminal sends; nohup has it ignored, and that is left so.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def interruptible(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines that a thread reads, so that a signal is handled within a second.

    In a read by the main thread, a signal that comes just before it would be left until the next line.
    """
    arrived: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        try:
            for line in lines:
                arrived.put(line)
        finally:
            arrived.put(None)

    Thread(target=read, daemon=True).start()
    while True:
        with suppress(Empty):
            line = arrived.get(timeout=1)  # seconds
            if line is None:
                return
            yield line


def say_stopped(name: str) -> None:
    try:
        print(f"{name}: stopped", file=sys.stderr)
    except OSError:  # the terminal has been closed: whatever is still to be printed would change the exit status
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
