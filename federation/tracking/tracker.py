"""What a tracker has to offer, whichever it is."""

from importlib import import_module
from typing import Protocol

from federation.tracking.run import Run


class Tracker(Protocol):
    """One tracked run. Any call may raise whatever its library raises; `open` is then called again."""

    where: str  # people can look at it, once it is open

    def open(self, run: Run, known: str | None, sent: int) -> tuple[str, int]:
        """Open the tracked run of this id, or a new one for None; return its id and how many rounds it has.

        `sent` is how many it was sent, as far as this machine knows.
        """

    def send(self, number: int, values: dict[str, float], time: float) -> None:
        """Add a round, which ended at `time`."""

    def close(self, run: Run) -> None:
        """Add the pictures and the models, and say how the run has ended."""


def module_of(name: str) -> str:
    """Return the module for a tracker, which imports the library behind it."""
    return f"federation.tracking.to_{name}"


def make_tracker(name: str) -> Tracker:
    """Return a tracker that is not open yet."""
    tracker: Tracker = import_module(module_of(name)).Tracker()
    return tracker
