"""Whether a file has changed: all that a launcher needs to know before somebody looks at the page."""

from pathlib import Path


def version_of(path: Path) -> str:
    """Return a text that changes whenever a file does."""
    try:
        found = path.stat()
    except OSError:
        return "none"
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"
