"""The place of a client among the clients on its host. It determines its name, also after a restart, and its log."""

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
    """Take the lowest free place among the clients on this host, and yield the client's name and log file."""
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
    """Return the folder with the locks and logs of this user's clients on this host; create it if necessary.

    Raises LaunchError if other users could write to it: they could make a client overwrite any file of this user.
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
        folder.chmod(0o700)  # earlier versions made it readable for others, but not writable
    if not is_private(folder):
        raise LaunchError(f"{folder} is not your own folder with mode 0700: remove it, or set TMPDIR to another folder")
    return folder


def is_private(folder: Path, but_for: int = 0) -> bool:
    """Return whether this is a folder, not a link, of this user, to which others have no access except `but_for`."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # Windows, where others cannot access a user's temporary folder
        return stat.S_ISDIR(found.st_mode)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077 & ~but_for
