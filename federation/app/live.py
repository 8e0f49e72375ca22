"""What a run is doing now, who takes part and who was left out and why: what metrics.json says within a round."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

PAUSE = 1.0  # seconds between two writings within a round, or more:
SHARE = 0.02  # of the time, at most, is spent on them
MOST_NOTED = 20  # reasons of a round, and refusals of a run
LONGEST_REASON, LONGEST_NAME = 300, 100  # letters: both may come from strangers


class Live:
    """What changes within a round. `sources` return it by its key in metrics.json; `write` has them written."""

    def __init__(self, write: Callable[[], object] = lambda: None) -> None:
        self.write = write
        self.left_out: list[dict[str, Any]] = []  # in this round
        self.refused: list[dict[str, Any]] = []
        self.sources: dict[str, Callable[[], Any]] = {"left_out": self.left_out.copy, "refused": self.refused.copy}
        self.written: dict[str, Any] = {}
        self.due = time.monotonic() + PAUSE
        self.began = round(time.time(), 1)  # when this round did
        self.begin("starting")

    def begin(self, doing: str) -> None:
        """Note what the run is doing from now on."""
        self.doing, self.since = doing, round(time.time(), 1)

    def leave_out(self, doing: str, reason: str, clients: Iterable[int]) -> None:
        """Note that these clients were left out of a round."""
        if len(self.left_out) < MOST_NOTED:
            self.left_out.append({"doing": doing, "reason": reason[:LONGEST_REASON], "clients": sorted(clients)})

    def end_round(self) -> list[dict[str, Any]]:
        """Return who was left out of a round that is complete: the next one begins."""
        popped = self.left_out.copy()
        self.left_out.clear()
        self.began = round(time.time(), 1)
        return popped

    def refuse(self, name: str, reason: str) -> None:
        """Note that somebody could not join."""
        noted = {"name": name[:LONGEST_NAME], "reason": reason[:LONGEST_REASON], "time": round(time.time(), 1)}
        self.refused[:] = [*self.refused, noted][-MOST_NOTED:]

    def facts(self) -> dict[str, Any]:
        """Return what metrics.json says of all this."""
        self.written = {key: source() for key, source in self.sources.items()}
        return self.written

    def tick(self) -> None:
        """Write what has changed, if the last time was long enough ago. A full disk is the end of the round to notice.

        A writing that takes long, because a run has many rounds and clients, makes the next one wait.
        """
        if (started := time.monotonic()) < self.due:
            return
        before = self.written
        if self.facts() != before:
            with suppress(RuntimeError):
                self.write()
        self.postpone(started)

    def postpone(self, started: float) -> None:
        """Leave out writings for a while after one that began at this time."""
        now = time.monotonic()
        self.due = now + max(PAUSE, (now - started) / SHARE)
