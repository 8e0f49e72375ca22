"""What a process has freed does not stay with it."""

import sys

import numpy as np
import psutil
import pytest

from federation.app import memory


def in_use() -> float:
    """Return the resident memory of this process in MB."""
    return float(psutil.Process().memory_info().rss / 1e6)


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
