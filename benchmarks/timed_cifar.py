"""cifar.py as a task that notes when it does what, for seconds.py; timed_fedavg.py notes the server's part.

Each note is a line of JSON in the file that the environment names. Times are seconds since the machine was started, as
in /proc/PID/stat, so that those of different processes can be compared.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


IMPORTING = now()
import torch  # noqa: F401, E402  (named here so that the launcher finds it, as it does in cifar.py)

import cifar  # noqa: E402
from cifar import find_data  # noqa: E402

IMPORTED = now()
__all__ = ["Net", "find_data", "load_data", "test", "train"]
FILE = "FEDERATION_SECONDS"  # the variable that names it


@contextmanager
def noting(what: str, number: int | None = None) -> Iterator[None]:
    """Note when the context begins and ends, and of which process it is."""
    begin = now()
    yield
    if path := os.environ.get(FILE):
        process = {"pid": os.getpid(), "started": started(), "importing": IMPORTING, "imported": IMPORTED}
        line = json.dumps({"what": what, "round": number, "begin": begin, "end": now(), **process}) + "\n"
        with open(path, "a") as notes:  # noqa: PTH123 (one write, so that the lines of several processes do not mix)
            notes.write(line)


@functools.cache
def started() -> float:
    """Return when this process was started, or forked."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        with noting(what):
            return function(*args, **settings)

    return call


class Net(cifar.Net):
    def __init__(self, classes: int = 10) -> None:
        with noting("net"):
            super().__init__(classes)


load_data, train, test = noted("load", cifar.load_data), noted("train", cifar.train), noted("test", cifar.test)
