"""What a process no longer needs does not stay with it."""

import gc
import sys
import weakref

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord, RecordDict

from federation.app import memory


def in_use() -> float:
    """Return the resident memory of this process in MB."""
    return float(psutil.Process().memory_info().rss / 1e6)


def test_a_message_that_python_takes_for_long_lived_is_collected() -> None:
    memory.give_back()
    content = RecordDict({"arrays": ArrayRecord([np.ones(3)])})
    gc.collect()  # it outlives a full collection, as in the midst of a long training
    arrays = weakref.ref(content.array_records["arrays"])
    del content
    assert arrays() is not None, "Flower's own cycle; without it, no collection is needed"
    memory.give_back()
    assert arrays() is None


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries do as they like")
def test_what_lies_below_something_in_use_is_given_back() -> None:
    blocks = [np.ones(8_000) for _ in range(4_000)]  # of 64 kB each: too small to be a piece of memory of its own
    kept = blocks[::50]
    before = in_use()
    del blocks
    freed = before - in_use()
    memory.give_back()
    assert freed < 50 and before - in_use() > 200, "of 256 MB"
    assert all((block == 1).all() for block in kept)


def test_a_system_without_such_a_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    memory._trim.cache_clear()
    memory.give_back()
    assert memory._trim()(0) == 0
    memory._trim.cache_clear()
