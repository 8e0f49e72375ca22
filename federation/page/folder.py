"""A run folder, as the page reads it: again when it has changed, and what is damaged is left as it was."""

import json
import time
from pathlib import Path
from threading import Lock
from typing import Any

from federation.app.console import CONTROL, PREFIX, without_colours
from federation.app.run_folder import METRICS
from federation.page.version import version_of
from federation.page.view import View, empty_view, make_view

LOG = "log.txt"
SHARE = 0.05  # of the time, at most, is spent on reading
TAIL_BYTES, TAIL_LINES = 65_536, 200


def is_run(folder: Path) -> bool:
    """Tell whether a folder is one of a run."""
    return (folder / METRICS).is_file()


class RunFolder:
    """A run folder and what the page shows of it.

    Of a run that only begins, `stale` is what `version_of` an earlier one's metrics.json was.
    """

    def __init__(self, path: Path, stale: str | None = None) -> None:
        self.path, self.stale, self.lock = path, stale, Lock()
        self.view: View = empty_view(path, "unknown" if stale is None else "starting") | {"version": ""}
        self.read_version, self.due = "", 0.0  # of metrics.json, and when it may be read again

    def refresh(self) -> View:
        """Return what there is to show, read anew if metrics.json has changed."""
        with self.lock:
            version = version_of(self.path / METRICS)
            if version not in (self.read_version, self.stale) and time.monotonic() >= self.due:
                self._read(version)
            return self.view

    def _read(self, version: str) -> None:
        started = time.monotonic()
        try:
            metrics: Any = json.loads((self.path / METRICS).read_text("utf-8"))
            self.view = make_view(self.path, metrics) | {"version": version}
        except Exception as error:  # a file that somebody else has written, or is writing, can raise many kinds
            damage = f"{METRICS} cannot be read: {type(error).__name__}"
            self.view = self.view | {"damage": damage, "version": version}
        self.read_version = version
        self.due = time.monotonic() + (time.monotonic() - started) / SHARE

    def log_version(self) -> str:
        """Return a text that changes whenever the log does."""
        return version_of(self.path / LOG)

    def log(self) -> list[str]:
        """Return the last lines of the log, without those that are for the launcher."""
        try:
            with (self.path / LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        lines = [without_colours(line).replace(PREFIX, "", 1) for line in text.splitlines() if CONTROL not in line]
        return lines[-TAIL_LINES:]
