"""The run folder: one run at a time writes to it, and no file in it is ever incomplete."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

METRICS = "metrics.json"  # its file with what is known of the run


def lock_run_folder(folder: Path) -> filelock.BaseFileLock:
    """Lock a run folder for as long as this process lives. Raises ValueError if another run is writing to it."""
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another run is writing to {folder}; stop it, or choose another --out") from None
    for unfinished in folder.glob("*.unfinished*"):  # left behind by a run that was killed
        unfinished.unlink(missing_ok=True)
    return lock


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder. A run that is still marked as running at the end is then marked as failed."""
    with lock_run_folder(folder):
        try:
            yield
        finally:
            with suppress(OSError):
                _mark_failed(folder / METRICS)


def _mark_failed(path: Path) -> None:
    if path.exists() and '"status": "running"' in (text := path.read_text("utf-8")):
        failed = text.replace('"status": "running"', '"status": "failed"')
        write_atomically(path, lambda unfinished: unfinished.write_text(failed, "utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file next to `path`, and move it to `path` when it is complete."""
    unfinished = path.with_name(f"{path.stem}-{os.getpid()}.unfinished{path.suffix}")
    try:
        write(unfinished)
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())  # otherwise a power failure might leave an empty file
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
