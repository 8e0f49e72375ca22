"""The place of a client among those on its host: a name that is the same after a restart, and a log file."""

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from federation.launch.network import LaunchError


@contextmanager
def place_on_host() -> Iterator[tuple[str, Path]]:
    """Hold the lowest free place among the clients on this host: a name, the same after a restart, and a log file."""
    folder = private_folder()
    place = 0
    while True:
        try:
            with filelock.FileLock(folder / f"{place}.lock", timeout=0):
                yield f"{socket.gethostname()}/{place}", folder / f"{place}.log"
                return
        except filelock.Timeout:
            place += 1


def private_folder() -> Path:
    """Make a folder for what the clients on this host keep, unless it exists, and return it.

    Raises LaunchError where others could write to it: they could lead a client to overwrite a file of its user's.
    """
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and is_private(runtime):
        folder = runtime / "federation-clients"
    else:
        own = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(tempfile.gettempdir()) / f"federation-clients-{own}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if is_private(folder, but_for=0o055):
        folder.chmod(0o700)  # others could read it, as those that an earlier version has made, but not write to it
    if not is_private(folder):
        raise LaunchError(
            f"{folder} is not a folder of yours with mode 0700: remove it, or set TMPDIR to another folder"
        )
    return folder


def is_private(folder: Path, but_for: int = 0) -> bool:
    """Tell whether this is a folder, no link, that is this user's and closed to others, `but_for` these modes."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # Windows: what is in a user's temporary folder is closed to others
        return stat.S_ISDIR(found.st_mode)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077 & ~but_for
