"""Memory that a process no longer needs, and keeps all the same."""

import ctypes
import functools
import gc
import sys
from collections.abc import Callable


def give_back() -> None:
    """Give the system back what a process that answers one message after another no longer needs.

    What Flower's `RecordDict.array_records` returns refers to itself and to its message, whose models therefore stay
    until Python's next full collection, which is rare. On Linux, the C library (glibc) also keeps what is freed,
    wherever something in use lies above it. Without this, such a process grows by some megabytes in each round.
    """
    _set_aside()
    gc.collect()
    _trim()(0)


@functools.cache
def _set_aside() -> None:
    """Keep what is loaded so far out of each later collection, which would take tenths of a second.

    The first message is part of it, and stays: at most 32 MiB of models each way.
    """
    gc.collect()
    gc.freeze()


@functools.cache
def _trim() -> Callable[[int], int]:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    trim: Callable[[int], int] = getattr(library, "malloc_trim", lambda _: 0)  # which glibc has, but musl has not
    return trim
