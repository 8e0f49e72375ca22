"""Sends one run to one tracker, in a thread of its own, and goes on where it has stopped."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from federation.app.console import one_line
from federation.app.run_folder import write_atomically
from federation.tracking.run import Run, numbers, read_run
from federation.tracking.tracker import Tracker, make_tracker

POLL = 0.5  # seconds between two looks at the run folder
LONGEST_PAUSE = 30.0  # seconds between two attempts while the run lasts


class Sender(Thread):
    """Sends the rounds that the tracker lacks; once the run has `ended`, also what belongs to its end.

    What was sent is noted in `tracking-NAME.json` in the run folder. Lines for people go to `say`.
    """

    def __init__(self, name: str, folder: Path, since: float, ended: Event, say: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.tracker_name, self.folder, self.since, self.ended, self.say = name, folder, since, ended, say
        self.tracker: Tracker | None = None
        self.note: dict[str, Any] = {}
        self.complete = self.failing = self.complained = False

    def run(self) -> None:
        """Send until the run has ended and all is sent, however often that fails."""
        pause = POLL
        while not self.complete:
            last = self.ended.is_set()  # before the folder is read: what is found then is all
            try:
                self._catch_up(last)
                self.failing, pause = False, POLL
            except Exception as error:  # of libraries that raise what they like
                self._complain(error)
                self.failing, self.tracker, pause = True, None, min(2 * pause, LONGEST_PAUSE)
            time.sleep(POLL) if last and not self.complete else self.ended.wait(pause)

    def _catch_up(self, last: bool) -> None:
        if found := read_run(self.folder, self.since):
            self._send(found, last)
        else:
            self.complete = last

    def _send(self, run: Run, last: bool) -> None:
        """Send what the tracker lacks. Nothing where that is nothing."""
        if self.note.get("run") != run.identity:
            self.note = self._noted(run)
        if self.note["rounds"] >= len(run.rounds) and (self.note["complete"] or not last):
            self.complete = last
            return
        tracker = self.tracker = self.tracker or self._open(run)
        for number in range(self.note["rounds"], len(run.rounds)):
            tracker.send(number, numbers(run.rounds[number]), run.times[number])
            self._write_note(rounds=number + 1, complete=False)
        if last:
            tracker.close(run)
            self._write_note(complete=True)
            self.complete = True

    def _open(self, run: Run) -> Tracker:
        tracker = make_tracker(self.tracker_name)
        known, rounds = tracker.open(run, self.note["id"], self.note["rounds"])
        if self.note["id"] != known or not self.complained:
            self.say(f"tracking={self.tracker_name}: {tracker.where}")
        self._write_note(id=known, rounds=rounds, complete=False)
        return tracker

    def _noted(self, run: Run) -> dict[str, Any]:
        """Return what was noted of this run; of an earlier one in the same folder, nothing counts."""
        new = {"run": run.identity, "id": None, "rounds": 0, "complete": False}
        path = self._path
        noted = json.loads(path.read_text("utf-8")) if path.exists() else new
        return noted if noted["run"] == run.identity else new

    @property
    def _path(self) -> Path:
        return self.folder / f"tracking-{self.tracker_name}.json"

    def _write_note(self, **changes: Any) -> None:
        self.note |= changes
        text = json.dumps(self.note)
        write_atomically(self._path, lambda path: path.write_text(text + "\n", "utf-8"))

    def _complain(self, error: Exception) -> None:
        """Say once that the tracker does not take what it is sent."""
        if not self.complained:
            self.complained = True
            self.say(f"tracking={self.tracker_name} does not work for now, and the run goes on without it: "
                     f"{one_line(error):.300}")  # fmt: skip
