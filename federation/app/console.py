"""How an app that runs deep inside Flower's processes talks to the terminal that started it.

SuperLink and SuperNode start their apps as processes of their own, whose output mixes with Flower's log. A line that
begins with PREFIX is for people; one that begins with CONTROL is for the launcher, which reads both.
"""

import functools
import json
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the proxy need not wait for Flower
    from flwr.app import Context
    from flwr.serverapp import Grid

MARK = "FEDERATION_SESSION"  # the environment variable that all processes of a launcher carry
PREFIX = "federation: "
CONTROL = "federation# "
FOLDER = "FEDERATION_FOLDER"  # the environment variable that names the folder in which the user started a command


def print_to_user(text: str) -> None:
    """Show `text` to whoever started this app."""
    for line in text.splitlines():
        print(PREFIX + "".join(letter for letter in line if letter.isprintable()), flush=True)


def emit_event(**event: Any) -> None:
    """Tell the launcher, if there is one, `progress=(done, total), doing=what`, or `end=exit_status`."""
    if MARK in os.environ:
        print(f"{CONTROL}{json.dumps(event)}", flush=True)


def one_line(error: object) -> str:
    """Return an error in one line: Flower's own way of putting it, <class 'X'>:<'text'>, is undone."""
    text = " ".join(str(error).split())
    text = re.sub(r"^<class '[^']*'>:<'(.*)'>$", r"\1", text)
    return re.sub(r"^.*ClientAppException occurred\. Message: ", "", text) or repr(error)


def announce_end(function: "Callable[[Grid, Context], None]") -> "Callable[[Grid, Context], None]":
    """Make a server's main tell how the run ended, and say in one line why it failed."""

    @functools.wraps(function)
    def wrapper(grid: "Grid", context: "Context") -> None:
        try:
            function(grid, context)
        except Exception as error:
            print_to_user(f"the run failed: {one_line(error)}")
            emit_event(end=1)
            raise
        emit_event(end=0)

    return wrapper
