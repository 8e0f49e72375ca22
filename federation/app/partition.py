"""Who holds which samples: Flower Datasets' partitioners, applied to the labels."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.app.config import RunConfig

Rows = NDArray[np.int32]  # row numbers in ascending order
REMEDIES = {
    "dirichlet": "raise alpha, or lower min-partition-size or the number of clients",
    "pathological": "change labels-per-client, so that every class has a holder and enough samples for all of them",
    "shards": "lower the number of clients",
    "size-skewed": "lower the number of clients: the first of them gets 1 part, the second 2, the third 3, ...",
}


def split(train_labels: Any, test_labels: Any, partitions: int, config: RunConfig) -> dict[str, list[Rows]]:
    """Return the rows of each partition in the training set ("train") and in the test set ("test").

    Every row is in one partition exactly, no partition is empty, and the test set is split as the training set
    is: in the same proportions of each class. Raises ValueError where that cannot be.
    """
    name, seed = config.partitioner, config.seed
    for labels in (train_labels, test_labels):
        check_enough(len(labels), partitions)
    if name == "iid":
        return {"train": iid(len(train_labels), partitions, seed), "test": iid(len(test_labels), partitions, seed)}
    classes, test_classes = _classes(train_labels, name), _classes(test_labels, name)
    train = _from_flower_datasets(classes, partitions, config)
    if not np.array_equal(np.sort(np.concatenate(train)), np.arange(len(classes))) or not all(map(len, train)):
        raise ValueError(f"partitioner={name} cannot split {len(classes)} samples among {partitions} clients so that "
                         f"each has some and none is left over; {REMEDIES[name]}")  # fmt: skip
    return {"train": train, "test": _in_proportion(train, classes, test_classes, seed)}


def iid(samples: int, partitions: int, seed: int) -> list[Rows]:
    """Split `samples` row numbers at random into parts whose sizes differ by at most one.

    Flower Datasets has the same, and takes four seconds to import: too long for the default.
    Raises ValueError if there are fewer samples than partitions.
    """
    check_enough(samples, partitions)
    order = np.random.default_rng(seed).permutation(samples).astype(np.int32)
    return [np.sort(part) for part in np.array_split(order, partitions)]


def check_enough(samples: int, partitions: int) -> None:
    """Raise ValueError if there are fewer samples than partitions."""
    if samples < partitions:
        raise ValueError(f"{samples} samples cannot be split among {partitions} clients: each needs one at least")


def _classes(labels: Any, partitioner: str) -> NDArray[Any]:
    """Return the class of each sample; the same one for all if the partitioner does not use classes."""
    if partitioner == "size-skewed":
        return np.zeros(len(labels), np.int64)
    classes = np.asarray(labels)
    if classes.size != len(classes) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"partitioner={partitioner} needs one whole number per sample as its class; "
                         f"the labels are {classes.dtype} of shape {classes.shape}")  # fmt: skip
    return classes.ravel().astype(np.int64)  # Flower takes neither big-endian numbers nor uint64 beyond int64


def _from_flower_datasets(classes: NDArray[Any], partitions: int, config: RunConfig) -> list[Rows]:
    """Return the rows of each partition, none where there is no such partition."""
    from datasets import Dataset  # these take four seconds to import, which only those who use them should pay

    order = np.random.default_rng(config.seed).permutation(len(classes)).astype(np.int32)  # or they go by the row
    partitioner = _partitioner(partitions, classes, config)
    partitioner.dataset = Dataset.from_dict({"label": classes[order], "row": order})
    try:
        with warnings.catch_warnings(action="ignore"), np.errstate(invalid="raise"):  # a tiny alpha makes 0 / 0
            return [np.sort(np.array(partitioner.load_partition(i)["row"][:], np.int32)) for i in range(partitions)]
    except (ValueError, IndexError, ArithmeticError):  # in words that name no setting of ours
        return [np.empty(0, np.int32)]


def _partitioner(partitions: int, classes: NDArray[Any], config: RunConfig) -> Any:
    """Return Flower's partitioner of the name and the settings in `config`.

    "dirichlet": Hsu et al. 2019, balanced as by Li et al. 2022 (NIID-Bench, section IV); "pathological": the same,
    quantity-based label imbalance; "shards": McMahan et al. 2017, section 3; "size-skewed": client k gets k parts.
    """
    from flwr_datasets import partitioner as flower

    name, seed = config.partitioner, config.seed
    if name == "dirichlet":
        return flower.DirichletPartitioner(
            partitions, "label", config.alpha, config.min_partition_size, self_balancing=True, seed=seed
        )
    if name == "pathological":
        first = "first-deterministic" if partitions >= len(np.unique(classes)) else "deterministic"
        return flower.PathologicalPartitioner(partitions, "label", config.labels_per_client, first, seed=seed)
    if name == "shards":
        size = _shard_size(len(classes), partitions * config.shards_per_client)
        return flower.ShardPartitioner(partitions, "label", shard_size=size, keep_incomplete_shard=True, seed=seed)
    return flower.LinearPartitioner(partitions)


def _shard_size(samples: int, shards: int) -> int:
    """Return the size that makes `shards` shards, the last of them smaller, or a few more where that cannot be."""
    size = -(-samples // shards)
    return size if -(-samples // size) == shards else max(1, samples // shards)


def _in_proportion(train: list[Rows], classes: NDArray[Any], test_classes: NDArray[Any], seed: int) -> list[Rows]:
    """Split the test samples of each class in the same proportions as its training samples."""
    random = np.random.default_rng(seed)
    shares: list[list[Rows]] = [[] for _ in train]
    for label in np.unique(test_classes):
        rows = random.permutation(np.flatnonzero(test_classes == label)).astype(np.int32)
        held = np.cumsum([np.count_nonzero(classes[part] == label) for part in train])
        held = held if held[-1] else np.cumsum([len(part) for part in train])
        cuts = np.rint(held[:-1] * (len(rows) / held[-1])).astype(int)
        for share, piece in zip(shares, np.split(rows, cuts), strict=True):
            share.append(piece)
    return _none_empty([np.sort(np.concatenate(share)) for share in shares])


def _none_empty(parts: list[Rows]) -> list[Rows]:
    """Give each empty part the last row of the largest. There are as many rows as parts, at least."""
    for i in (i for i, part in enumerate(parts) if not len(part)):
        largest = max(range(len(parts)), key=lambda j: len(parts[j]))
        parts[largest], parts[i] = np.split(parts[largest], [-1])
    return parts
