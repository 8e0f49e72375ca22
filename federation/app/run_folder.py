"""The run folder: one run at a time writes to it, and every file in it is whole."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock


def lock_run_folder(folder: Path) -> filelock.BaseFileLock:
    """Take a run folder for this process, as long as it lives. Raises ValueError if another run is writing to it."""
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another run is writing to {folder}; stop that, or choose another --out") from None
    for unfinished in folder.glob("*.unfinished*"):  # by a run that was killed
        unfinished.unlink(missing_ok=True)
    return lock


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Own a run folder; at the end note in it that the run is not going on any more, unless it ended by itself."""
    with lock_run_folder(folder):
        try:
            yield
        finally:
            with suppress(OSError):
                _mark_failed(folder / "metrics.json")


def _mark_failed(path: Path) -> None:
    if path.exists() and '"status": "running"' in (text := path.read_text("utf-8")):
        failed = text.replace('"status": "running"', '"status": "failed"')
        write_atomically(path, lambda unfinished: unfinished.write_text(failed, "utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and move it there once it is whole."""
    unfinished = path.with_name(f"{path.stem}-{os.getpid()}.unfinished{path.suffix}")
    try:
        write(unfinished)
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())  # or a power cut might leave the new name with nothing in it
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
