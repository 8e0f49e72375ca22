"""Split the samples among the clients, with Flower Datasets' partitioners."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.app.config import RunConfig

Rows = NDArray[np.int32]  # row numbers in ascending order
REMEDIES = {
    "dirichlet": "raise alpha, or lower min-partition-size or the number of clients",
    "pathological": "change labels-per-client: each class needs a client, and enough samples for all of its clients",
    "shards": "lower the number of clients",
    "size-skewed": "lower the number of clients: the first gets 1 part, the second 2, the third 3, ...",
}


def split(train_labels: Any, test_labels: Any, partitions: int, config: RunConfig) -> dict[str, list[Rows]]:
    """Return the rows of each partition in the training set ("train") and in the test set ("test").

    Every row is in exactly one partition, and no partition is empty. Each client has the same share of the test
    samples of a class as of its training samples. Raises ValueError if such a split is impossible.
    """
    name, seed = config.partitioner, config.seed
    for labels in (train_labels, test_labels):
        check_enough(len(labels), partitions)
    if name == "iid":
        return {"train": iid(len(train_labels), partitions, seed), "test": iid(len(test_labels), partitions, seed)}
    classes, test_classes = _classes(train_labels, name), _classes(test_labels, name)
    train = _from_flower_datasets(classes, partitions, config)
    if not np.array_equal(np.sort(np.concatenate(train)), np.arange(len(classes))) or not all(map(len, train)):
        raise ValueError(f"partitioner={name} cannot split {len(classes)} samples among {partitions} clients so "
                         f"that each client has some and none is left over; {REMEDIES[name]}")  # fmt: skip
    return {"train": train, "test": _in_proportion(train, classes, test_classes, seed)}


def iid(samples: int, partitions: int, seed: int) -> list[Rows]:
    """Split `samples` row numbers at random into parts whose sizes differ by at most one.

    Flower Datasets has such a partitioner, too, but takes four seconds to import, which is too long for the default.
    Raises ValueError if there are fewer samples than partitions.
    """
    check_enough(samples, partitions)
    order = np.random.default_rng(seed).permutation(samples).astype(np.int32)
    return [np.sort(part) for part in np.array_split(order, partitions)]


def check_enough(samples: int, partitions: int) -> None:
    """Raise ValueError if there are fewer samples than partitions."""
    if samples < partitions:
        raise ValueError(f"{samples} samples cannot be split among {partitions} clients: each needs at least one")


def _classes(labels: Any, partitioner: str) -> NDArray[Any]:
    """Return the class of each sample, or the same class for all if the partitioner does not use classes."""
    if partitioner == "size-skewed":
        return np.zeros(len(labels), np.int64)
    classes = np.asarray(labels)
    if classes.size != len(classes) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"partitioner={partitioner} needs one whole number per sample as its class; "
                         f"the labels are {classes.dtype} of shape {classes.shape}")  # fmt: skip
    return classes.ravel().astype(np.int64)  # Flower accepts neither big-endian numbers nor all of uint64


def _from_flower_datasets(classes: NDArray[Any], partitions: int, config: RunConfig) -> list[Rows]:
    """Return the rows of each partition; if the partitioner fails, a single partition without rows."""
    from datasets import Dataset  # imported here because it takes four seconds

    order = (
        np.random.default_rng(config.seed).permutation(len(classes)).astype(np.int32)
    )  # some partitioners keep the order of the rows
    partitioner = _partitioner(partitions, classes, config)
    partitioner.dataset = Dataset.from_dict({"label": classes[order], "row": order})
    try:
        with warnings.catch_warnings(action="ignore"), np.errstate(invalid="raise"):  # a tiny alpha leads to 0 / 0
            return [np.sort(np.array(partitioner.load_partition(i)["row"][:], np.int32)) for i in range(partitions)]
    except (ValueError, IndexError, ArithmeticError):  # its message does not name the settings of the run config
        return [np.empty(0, np.int32)]


def _partitioner(partitions: int, classes: NDArray[Any], config: RunConfig) -> Any:
    """Return Flower's partitioner for the name and the settings in `config`.

    "dirichlet": Hsu et al. 2019, balanced as in Li et al. 2022 (NIID-Bench, section IV); "pathological": quantity-based
    label imbalance from the same paper; "shards": McMahan et al. 2017, section 3; "size-skewed": client k gets k parts.
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
    """Return the size that gives `shards` shards, with a smaller last one, or a few more if that is impossible."""
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
    """Give each empty part the last row of the largest part. There must be at least as many rows as parts."""
    for i in (i for i, part in enumerate(parts) if not len(part)):
        largest = max(range(len(parts)), key=lambda j: len(parts[j]))
        parts[largest], parts[i] = np.split(parts[largest], [-1])
    return parts
