"""Who holds which samples: partitions are disjoint, complete, seeded, and skewed as they say, or they are refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federation.app.config import RunConfig, choices, validate
from federation.app.partition import BY_GROUP, REMEDIES, Rows, iid, split

SEEDS = st.integers(0, 2**31 - 1)
OF_LABELS = [name for name in choices("partitioner") if name not in BY_GROUP]
BY_CLASS = ("dirichlet", "pathological", "shards")
SAMPLES, CLASSES = 300, 5
LABELS, TEST_LABELS = np.arange(SAMPLES) % CLASSES, np.arange(100) % CLASSES


def few(examples: int) -> Callable[[Any], Any]:
    """Return a decorator that tries so many examples: Flower Datasets takes some 10 ms for each client of each."""
    return settings(deadline=None, max_examples=examples)


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


# ------------------------------------------------------------------------------------------- all five partitioners


def config(partitioner: str, **changed: Any) -> RunConfig:
    """Return a run config; min_partition_size=1 stands for min-partition-size=1."""
    changes = {key.replace("_", "-"): value for key, value in changed.items()}
    return validate({"partitioner": partitioner, "min-partition-size": 1} | changes)


def counts(parts: list[Rows], labels: Any) -> NDArray[np.int64]:
    """Return how many samples of each class each client holds: clients × classes."""
    classes, numbers = np.unique(np.asarray(labels), return_inverse=True)
    return np.stack([np.bincount(numbers.ravel()[part], minlength=len(classes)) for part in parts])


def check_whole(parts: list[Rows], samples: int, clients: int) -> None:
    """Check that `parts` are disjoint, complete, in order, and that there is one for each client, with something."""
    assert len(parts) == clients and all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    for part in parts:
        assert part.dtype == np.int32 and (np.diff(part) > 0).all()


@st.composite
def labels(draw: st.DrawFn, most: int = 200) -> NDArray[Any]:
    """Return labels as a task might have them: of some classes, even or uneven, sorted or not, of some kind."""
    classes, evenness = draw(st.integers(1, 12)), draw(st.sampled_from([0, 1, 3]))
    weights = 1 / np.arange(1, classes + 1) ** evenness
    random = np.random.default_rng(draw(st.integers(0, 100)))
    drawn = random.choice(classes, size=draw(st.integers(0, most)), p=weights / weights.sum())
    drawn = np.sort(drawn) if draw(st.booleans()) else drawn
    shifted = drawn - draw(st.sampled_from([0, 3]))
    return shifted.astype(draw(st.sampled_from(["int64", "int32", "int8", ">i4", "uint64", "uint8"])))


CONFIGS = st.builds(
    config,
    st.sampled_from(OF_LABELS),
    seed=SEEDS,
    alpha=st.sampled_from([1e-3, 0.01, 0.1, 0.5, 10.0, 1e6]),
    min_partition_size=st.sampled_from([1, 10, 10**9]),
    labels_per_client=st.integers(1, 4) | st.just(10**9),
    shards_per_client=st.integers(1, 4) | st.just(10**9),
)


@given(labels(), labels(60), st.integers(1, 12), CONFIGS)
@few(60)
def test_whatever_is_asked_is_done_or_refused_in_a_line(
    train: NDArray[Any], test: NDArray[Any], clients: int, config: RunConfig
) -> None:
    try:
        parts = split(train, test, clients, config)
    except ValueError as error:
        said = str(error)
        if min(len(train), len(test)) < clients:
            assert said.endswith(f"samples cannot be split among {clients} clients: each needs at least one")
        else:
            name = config.partitioner
            assert said.startswith(f"partitioner={name} cannot split {len(train)} samples among {clients} clients")
            assert said.endswith(REMEDIES[name]) and "\n" not in said
    else:
        assert list(parts) == ["train", "test"]
        check_whole(parts["train"], len(train), clients)
        check_whole(parts["test"], len(test), clients)


@pytest.mark.parametrize("partitioner", OF_LABELS)
@given(st.integers(2, 6), SEEDS)
@few(5)
def test_every_partitioner_is_seeded(partitioner: str, clients: int, seed: int) -> None:
    def rows(seed: int) -> list[bytes]:
        chosen = config(partitioner, seed=seed, alpha=1.0, labels_per_client=CLASSES, shards_per_client=3)
        return [part.tobytes() for parts in split(LABELS, TEST_LABELS, clients, chosen).values() for part in parts]

    assert rows(seed) == rows(seed)
    assert rows(seed) != rows(seed ^ 1)


@pytest.mark.parametrize("partitioner", OF_LABELS)
def test_the_rows_do_not_go_by_the_order_of_the_samples(partitioner: str) -> None:
    """Each client should have rows of all of the data set, not a stretch of it: neighbours are often alike."""
    parts = split(LABELS, TEST_LABELS, 3, config(partitioner, labels_per_client=CLASSES, shards_per_client=10))
    assert all(part.min() < SAMPLES / 4 and part.max() > 3 * SAMPLES / 4 for part in parts["train"])


@pytest.mark.parametrize("partitioner", OF_LABELS)
def test_a_lone_client_holds_everything(partitioner: str) -> None:
    parts = split(LABELS, TEST_LABELS, 1, config(partitioner, labels_per_client=CLASSES))
    assert parts["train"][0].tolist() == list(range(SAMPLES)) and parts["test"][0].tolist() == list(range(100))


@pytest.mark.parametrize("partitioner", BY_CLASS)
@given(st.lists(st.integers(30, 90), min_size=1, max_size=6), st.integers(0, 9), st.integers(0, 90), st.data())
@few(6)
def test_the_test_set_is_dealt_out_as_the_training_set_is(
    partitioner: str, sizes: list[int], times: int, unseen: int, data: st.DataObject
) -> None:
    """Class by class, to the nearest sample, but for the one that a client who would have none is given."""
    clients, each = data.draw(st.integers(len(sizes), 8)), data.draw(st.integers(1, len(sizes)))
    train = np.repeat(np.arange(len(sizes)), sizes)
    test = np.concatenate([np.tile(train, times), np.repeat(len(sizes), unseen + 8)])[::-1]  # and one unknown class
    parts = split(train, test, clients, config(partitioner, alpha=10.0, labels_per_client=each))
    held = np.column_stack([counts(parts["train"], train), [len(part) for part in parts["train"]]])
    ratios = np.bincount(test) / held.sum(0)
    given_one = sum(len(part) == 1 for part in parts["test"])
    dealt = np.stack([np.bincount(test[part], minlength=len(sizes) + 1) for part in parts["test"]])
    assert abs(dealt - held * ratios).max() <= 1 + given_one + 1e-9


def test_a_client_whose_share_of_the_test_set_is_less_than_a_sample_gets_one() -> None:
    labels = np.repeat([0, 1], [991, 9])
    parts = split(labels, np.array([0] * 10 + [1]), 10, config("size-skewed"))["test"]
    assert [len(part) for part in parts] == [1, 1, 1, 1, 1, 1, 1, 1, 1, 2]


# ------------------------------------------------------------------------------------------------ what each promises


def skew(labels: Any, clients: int, chosen: RunConfig) -> float:
    """Return the share of a client's most frequent class, averaged over the clients."""
    held = counts(split(labels, labels, clients, chosen)["train"], labels)
    return float((held.max(1) / held.sum(1)).mean())


@given(SEEDS)
@few(6)
def test_dirichlet_is_the_more_skewed_the_smaller_alpha_is(seed: int) -> None:
    labels = np.arange(2000) % 10
    strong, weak, none = (
        skew(labels, 5, config("dirichlet", seed=seed, alpha=alpha)) for alpha in (0.05, 5.0, 1e6)
    )  # fmt: skip
    assert strong > 1.5 * weak and weak > 1.2 * none
    assert none < 0.12, "as good as iid, where each of ten classes has a share of a tenth"


@given(st.integers(2, 8), st.sampled_from([0.003, 0.01, 0.1, 0.5, 5.0]), st.integers(1, 30), SEEDS)
@few(25)
def test_dirichlet_keeps_to_the_smallest_size_and_gives_nothing_more_to_who_has_his_share(
    clients: int, alpha: float, least: int, seed: int
) -> None:
    chosen = config("dirichlet", seed=seed, alpha=alpha, min_partition_size=least)
    try:
        held = counts(split(LABELS, TEST_LABELS, clients, chosen)["train"], LABELS)
    except ValueError:
        assume(False)
    assert held.sum(1).min() >= least
    before = held.cumsum(1) - held  # what a client had when the samples of a class were dealt out
    more = held[before > SAMPLES / clients]
    assert more.max(initial=0) <= 1, "but for what is left over by rounding; where Flower gets 0 / 0, it is a class"


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), SEEDS)
@few(25)
def test_pathological_clients_hold_so_many_classes(classes: int, each: int, clients: int, seed: int) -> None:
    labels = np.arange(20 * classes) % classes
    chosen = config("pathological", seed=seed, labels_per_client=each)
    if each > classes or clients + each - 1 < classes:  # more than there are, or some class has no holder
        with pytest.raises(ValueError, match=f"pathological cannot split {20 * classes} samples among {clients} cl"):
            split(labels, labels, clients, chosen)
        return
    held = counts(split(labels, labels, clients, chosen)["train"], labels)
    assert (np.count_nonzero(held, axis=1) == each).all()
    for of_class in held.T:
        shares = of_class[of_class > 0]
        assert shares.max() - shares.min() <= 1, "those who hold a class hold as much of it"


def test_which_classes_pathological_clients_hold_depends_on_the_seed() -> None:
    def held(seed: int) -> list[list[bool]]:
        chosen = config("pathological", seed=seed)
        return (counts(split(LABELS, LABELS, 2 * CLASSES, chosen)["train"], LABELS) > 0).tolist()

    assert held(0) == held(0) and len({str(held(seed)) for seed in range(4)}) == 4


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 12), SEEDS)
@few(25)
def test_shards_of_one_class_give_a_client_no_more_classes_than_shards(
    clients: int, each: int, size: int, classes: int, seed: int
) -> None:
    assume(clients * each % classes == 0)  # each class is cut into whole shards
    labels = np.arange(clients * each * size) % classes
    chosen = config("shards", seed=seed, shards_per_client=each)
    held = counts(split(labels, labels, clients, chosen)["train"], labels)
    assert (held.sum(1) == each * size).all()
    assert (np.count_nonzero(held, axis=1) <= each).all()
    assert (held % size == 0).all()


@given(labels(), st.integers(1, 6), st.integers(1, 4), SEEDS)
@few(25)
def test_shards_of_any_classes(labels: NDArray[Any], clients: int, each: int, seed: int) -> None:
    """The pieces are equal, and only where a class ends in the midst of one has this one more class than one."""
    labels = labels[: len(labels) // (clients * each) * clients * each]
    assume(len(labels))
    chosen = config("shards", seed=seed, shards_per_client=each)
    held = counts(split(labels, labels, clients, chosen)["train"], labels)
    assert (held.sum(1) == len(labels) / clients).all()
    assert np.count_nonzero(held) <= clients * each + held.shape[1] - 1


@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 40), SEEDS)
@few(25)
def test_shards_can_always_be_dealt_out(samples: int, clients: int, each: int, seed: int) -> None:
    """Shards of what cannot be cut evenly are as many as asked for, or more and smaller ones."""
    assume(samples >= clients)
    labels = np.arange(samples) % 3
    parts = split(labels, labels, clients, config("shards", seed=seed, shards_per_client=each))["train"]
    check_whole(parts, samples, clients)
    size = max(1, -(-samples // (clients * each)))
    assert max(map(len, parts)) <= size * each + size


@given(st.integers(1, 400), st.integers(1, 12), SEEDS)
@few(25)
def test_size_skewed_sizes_grow_evenly(samples: int, clients: int, seed: int) -> None:
    """They are rounded down, and the last client gets what is left. Flower computes them in floats: hence the 1.01."""
    expected = np.arange(1, clients + 1) * samples / (clients * (clients + 1) / 2)
    assume(expected[0] >= 1.01)
    parts = split(np.zeros(samples), np.zeros(samples), clients, config("size-skewed", seed=seed))
    for part in parts.values():
        check_whole(part, samples, clients)
    over = np.array([len(part) for part in parts["train"]]) - expected
    assert (abs(over[:-1]) < 1.01).all() and -1e-9 <= over[-1] < clients


# ---------------------------------------------------------------------------------------------------- kinds of labels


@pytest.mark.parametrize("partitioner", OF_LABELS)
@pytest.mark.parametrize(
    "kind",
    [
        np.ndarray.tolist, torch.tensor, lambda y: y[:, None], lambda y: torch.tensor(y)[:, None],
        lambda y: y.astype(np.uint8), lambda y: y.astype(">i4"), lambda y: y.astype(np.uint64) + (2**64 - 10),
    ],
    ids=["list", "tensor", "column", "column tensor", "uint8", "big-endian", "uint64"],
)  # fmt: skip
def test_whole_numbers_of_any_kind_are_classes(partitioner: str, kind: Callable[[Any], Any]) -> None:
    chosen = config(partitioner, labels_per_client=CLASSES)
    for split_name, parts in split(LABELS, TEST_LABELS, 3, chosen).items():
        others = split(kind(LABELS), kind(TEST_LABELS), 3, chosen)[split_name]
        assert [part.tolist() for part in parts] == [part.tolist() for part in others]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS / 2, r"float64 of shape \(300,\)"),
        (torch.tensor(LABELS).float(), r"float32 of shape \(300,\)"),
        (np.eye(CLASSES, dtype=int)[LABELS], r"int64 of shape \(300, 5\)"),
        (np.zeros((SAMPLES, 8, 8), np.uint8), r"uint8 of shape \(300, 8, 8\)"),
        (np.array(["cat", "dog", "eel"])[LABELS % 3], r"<U3 of shape \(300,\)"),
        (np.array([None, 1])[LABELS % 2], r"object of shape \(300,\)"),
    ],
    ids=["floats", "float tensor", "one-hot", "masks", "words", "objects"],
)
def test_labels_that_are_no_classes(labels: Any, said: str) -> None:
    for partitioner in BY_CLASS:
        for train, test in ((labels, TEST_LABELS), (LABELS, labels)):
            with pytest.raises(ValueError, match=f"^partitioner={partitioner} needs one whole number .* are {said}$"):
                split(train, test, 3, config(partitioner, labels_per_client=CLASSES))
    for partitioner in ("iid", "size-skewed"):
        parts = split(labels, labels, 3, config(partitioner))
        check_whole(parts["train"], SAMPLES, 3)
        check_whole(parts["test"], SAMPLES, 3)


# -------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("partitioner", OF_LABELS)
@pytest.mark.parametrize(
    ("train", "test", "clients"), [(300, 4, 5), (4, 300, 5), (300, 0, 1), (0, 300, 1), (0, 0, 2), (300, 300, 100_000)]
)
def test_fewer_samples_than_clients_are_refused(partitioner: str, train: int, test: int, clients: int) -> None:
    train_labels, test_labels = np.arange(train) % CLASSES, np.arange(test) % CLASSES
    few = train if train < clients else test
    said = f"^{few} samples cannot be split among {clients} clients: each needs at least one$"
    with pytest.raises(ValueError, match=said):
        split(train_labels, test_labels, clients, config(partitioner))


@pytest.mark.parametrize(
    ("clients", "chosen"),
    [
        (2, config("pathological", labels_per_client=2)),  # of five classes, one has no holder
        (2, config("pathological", labels_per_client=6)),
        (150, config("pathological", labels_per_client=3)),  # 90 holders for each class of 60
        (2, config("dirichlet", min_partition_size=151)),
        (40, config("dirichlet", min_partition_size=7, alpha=0.5)),
        (90, config("dirichlet", alpha=1e-3)),
        (3, config("dirichlet", alpha=0.01, seed=20)),  # all whom it draws have their share already: Flower gets 0 / 0
        (25, config("size-skewed")),  # 325 parts
    ],
    ids=lambda value: f"{value.partitioner}-{value.alpha}" if isinstance(value, RunConfig) else None,
)
def test_what_cannot_be_is_refused_with_a_remedy(clients: int, chosen: RunConfig) -> None:
    with pytest.raises(
        ValueError, match=f"among {clients} clients so that each client has some and none is left ov"
    ) as error:
        split(LABELS, LABELS, clients, chosen)
    partitioner = chosen.partitioner
    assert str(error.value).startswith(f"partitioner={partitioner} cannot split 300 samples ")
    assert str(error.value).endswith(f"; {REMEDIES[partitioner]}") and "\n" not in str(error.value)
