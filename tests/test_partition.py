"""Who holds which samples: IID partitions are disjoint, complete, even, seeded and balanced."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.partition import iid

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Return a number of samples and a number of partitions that it suffices for."""
    samples = draw(st.integers(1, 3000))
    return samples, draw(st.integers(1, min(samples, 200)))


@given(sizes(), SEEDS)
def test_partitions_are_disjoint_complete_even_and_ascending(size: tuple[int, int], seed: int) -> None:
    samples, partitions = size
    parts = iid(samples, partitions, seed)
    assert len(parts) == partitions
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    assert {len(part) for part in parts} <= {samples // partitions, -(-samples // partitions)}
    for part in parts:
        assert part.dtype == np.int32
        assert (np.diff(part) > 0).all()


@given(sizes(), SEEDS)
def test_same_seed_same_partitions(size: tuple[int, int], seed: int) -> None:
    for one, other in zip(iid(*size, seed), iid(*size, seed), strict=True):
        assert one.tobytes() == other.tobytes()


@given(st.integers(100, 3000), st.integers(2, 10), SEEDS)
def test_another_seed_gives_other_partitions(samples: int, partitions: int, seed: int) -> None:
    pairs = zip(iid(samples, partitions, seed), iid(samples, partitions, seed + 1), strict=True)
    assert any(one.tolist() != other.tolist() for one, other in pairs)


@given(st.integers(0, 100), st.integers(1, 100), SEEDS)
def test_fewer_samples_than_partitions_are_refused(samples: int, more: int, seed: int) -> None:
    with pytest.raises(ValueError, match=f"{samples} samples cannot be split among {samples + more} clients"):
        iid(samples, samples + more, seed)


@given(st.integers(1, 3000), SEEDS)
def test_a_lone_client_holds_all_rows_in_order(samples: int, seed: int) -> None:
    (part,) = iid(samples, 1, seed)
    assert part.tolist() == list(range(samples))


@given(st.integers(2, 10), SEEDS)
def test_classes_are_balanced_even_if_the_samples_are_sorted_by_class(partitions: int, seed: int) -> None:
    labels = np.repeat(np.arange(10), 500)  # as an image folder has them
    for part in iid(len(labels), partitions, seed):
        counts = np.bincount(labels[part], minlength=10)
        expected = 500 / partitions
        assert abs(counts - expected).max() < 6 * expected**0.5  # six standard deviations
