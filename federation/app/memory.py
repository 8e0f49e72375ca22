"""Memory that a process has freed, and that its C library keeps."""

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Give the system back what this process has freed.

    On Linux, the C library (glibc) keeps it wherever something in use lies above it. A process that trains models of
    one client after another then grows by some megabytes in each round. Other systems are left alone.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    trim: Callable[[int], int] = getattr(library, "malloc_trim", lambda _: 0)  # which glibc has, but musl has not
    return trim
