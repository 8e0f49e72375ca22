"""A run folder, as the page reads it: again when it has changed, and what is damaged is left as it was."""

import json
import re
import time
from pathlib import Path
from threading import Lock
from typing import Any

from federation.app.console import CONTROL, PREFIX
from federation.page.view import View, empty_view, make_view

METRICS, LOG = "metrics.json", "log.txt"
SHARE = 0.05  # of the time, at most, is spent on reading
TAIL_BYTES, TAIL_LINES = 65_536, 200
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def is_run(folder: Path) -> bool:
    """Tell whether a folder is one of a run."""
    return (folder / METRICS).is_file()


class RunFolder:
    """A run folder and what the page shows of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        self.view: View = empty_view(path) | {"version": ""}
        self.read_version, self.due = "", 0.0  # of metrics.json, and when it may be read again

    def refresh(self) -> View:
        """Return what there is to show, read anew if metrics.json has changed."""
        with self.lock:
            version = _version(self.path / METRICS)
            if version != self.read_version and time.monotonic() >= self.due:
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
        return _version(self.path / LOG)

    def log(self) -> list[str]:
        """Return the last lines of the log, without those that are for the launcher."""
        try:
            with (self.path / LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        lines = [COLOUR.sub("", line).replace(PREFIX, "", 1) for line in text.splitlines() if CONTROL not in line]
        return lines[-TAIL_LINES:]


def _version(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "none"
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"
