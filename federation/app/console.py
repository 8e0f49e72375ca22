"""How an app that runs deep inside Flower's processes talks to the terminal that started it.

SuperLink and SuperNode start their apps as processes of their own, whose output mixes with Flower's log. A line that
begins with PREFIX is for people; one that begins with CONTROL is for the launcher, which reads both. Flower passes on
the output of a ServerApp twice a second only, so that one writes its lines to a named pipe of the launcher as well.
"""

import functools
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # the proxy need not wait for Flower
    from flwr.app import Context
    from flwr.serverapp import Grid

MARK = "FEDERATION_SESSION"  # the environment variable that all processes of a launcher carry
PREFIX = "federation: "
CONTROL = "federation# "
CONSOLE = "FEDERATION_CONSOLE"  # the environment variable that names the launcher's pipe for the ServerApp
FOLDER = "FEDERATION_FOLDER"  # the environment variable that names the folder in which the user started a command

COLOUR = re.compile(r"\x1b\[[\d;]*m")

pipes: list[IO[str]] = []  # the launcher's, in the process of a ServerApp


def print_to_user(text: str) -> None:
    """Show `text` to whoever started this app."""
    for line in text.splitlines():
        _print(PREFIX + "".join(letter for letter in line if letter.isprintable()))


def emit_event(**event: Any) -> None:
    """Tell the launcher, if there is one, `progress=(done, total), doing=what`, or `end=exit_status`."""
    if MARK in os.environ:
        _print(f"{CONTROL}{json.dumps(event)}")


def _print(line: str) -> None:
    for pipe in (None, *pipes):  # None is the standard output, as it is at the time
        with suppress(OSError):
            print(line, file=pipe, flush=True)


def without_colours(line: str) -> str:
    return COLOUR.sub("", line)


def one_line(error: object) -> str:
    """Return an error in one line: Flower's own way of putting it, <class 'X'>:<'text'>, is undone."""
    text = " ".join(str(error).split())
    text = re.sub(r"^<class '[^']*'>:<'(.*)'>$", r"\1", text)
    return re.sub(r"^.*ClientAppException occurred\. Message: ", "", text) or repr(error)


def announce_end(function: "Callable[[Grid, Context], None]") -> "Callable[[Grid, Context], None]":
    """Make a server's main tell how the run ended, and say in one line why it failed."""

    @functools.wraps(function)
    def wrapper(grid: "Grid", context: "Context") -> None:
        if CONSOLE in os.environ and not pipes:
            pipes.append(Path(os.environ[CONSOLE]).open("w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        try:
            function(grid, context)
        except Exception as error:
            print_to_user(f"the run failed: {one_line(error)}")
            emit_event(end=1)
            raise
        emit_event(end=0)

    return wrapper
