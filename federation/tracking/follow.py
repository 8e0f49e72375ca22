"""Follows a run and sends it to trackers; or sends one that has ended."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Event

from federation.tracking.sender import Sender
from federation.tracking.tracker import module_of

GIVE_UP = 10.0  # seconds after the end of a run after which a tracker that fails is left alone
PATIENCE = 60.0  # the same for one that only takes long


def follow(folder: Path, names: list[str], since: float, say: Callable[[str], None]) -> None:
    """Send what a run writes down, until standard input ends. What is in it then is how many seconds are left."""
    ended = Event()
    senders = start(folder, names, since, ended, say)
    patience = float(sys.stdin.read() or PATIENCE)
    ended.set()
    finish(senders, patience)
    os._exit(0)  # a library may wait for its tracker otherwise


def send(folder: Path, names: list[str], say: Callable[[str], None]) -> bool:
    """Send a run that has ended; return whether the trackers have all of it."""
    ended = Event()
    ended.set()
    return finish(start(folder, names, 0, ended, say), PATIENCE)


def start(folder: Path, names: list[str], since: float, ended: Event, say: Callable[[str], None]) -> list[Sender]:
    for name in names:
        with suppress(Exception):  # the sender, which imports it again, says what is wrong with it
            import_module(module_of(name))
    senders = [Sender(name, folder, since, ended, say) for name in names]
    for sender in senders:
        sender.start()
    return senders


def finish(senders: list[Sender], patience: float) -> bool:
    """Wait until all is sent, at most `patience` seconds, and say so of what is not; return whether all is."""
    began = time.monotonic()
    for sender in senders:
        while sender.is_alive() and time.monotonic() - began < min(patience, GIVE_UP if sender.failing else PATIENCE):
            sender.join(0.1)
        if not sender.complete:
            sender.say(f"tracking={sender.tracker_name} lacks the end of the run: federate track {sender.folder} "
                       f"--tracking {sender.tracker_name} sends it, and so does --resume")  # fmt: skip
    return all(sender.complete for sender in senders)
