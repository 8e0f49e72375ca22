"""Split the samples among the clients, with Flower Datasets' partitioners."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.app import samples
from federation.app.config import RunConfig, SettingError

Rows = NDArray[np.int32]  # row numbers in ascending order
Parts = dict[str, list[Rows]]  # of each partition, by split
BY_LABEL = {"dirichlet", "inner-dirichlet", "pathological", "shards"}
BY_SIZE = {"size-skewed": "LinearPartitioner", "linear": "LinearPartitioner", "square": "SquarePartitioner",
           "exponential": "ExponentialPartitioner"}  # fmt: skip
BY_GROUP = {"by-column", "grouped-natural-id"}
REMEDIES = {
    "dirichlet": "raise alpha, or lower min-partition-size or the number of clients",
    "pathological": "change labels-per-client: each class needs a client, and enough samples for all of its clients",
    "shards": "lower the number of clients",
    "inner-dirichlet": "raise alpha, or lower the number of clients",
    "size-skewed": "lower the number of clients: the first of them gets 1 part, the second 2, the third 3, ...",
    "square": "lower the number of clients: the first of them gets 1 part, the second 4, the third 9, ...",
    "exponential": "lower the number of clients: each of them gets 2.7 times as much as the one before it",
}
REMEDIES["linear"] = REMEDIES["size-skewed"]


def split_data(data: Any, partitions: int, config: RunConfig) -> Parts:
    """Return the rows of each partition in the training set ("train"), and in the test set ("test").

    `data` is what load_data() returns, and the rows are numbers in ascending order, an array for each partition. With a
    `validation-fraction`, both are rows of the training set. Raises ValueError as `split` does, and where the data lack
    the groups or the labels that a partitioner needs.
    """
    if config.partitioner in BY_GROUP:
        parts = by_group(data, partitions, config)
    else:
        by_label, wanted = config.partitioner in BY_LABEL, data[:1] * 2 if config.validation_fraction else data
        labels = [samples.labels(one) if by_label else range(samples.count(one)) for one in wanted]
        parts = split(labels[0], labels[1], partitions, config)
    if not config.validation_fraction:
        return parts
    held = [hold_back(rows, config, position) for position, rows in enumerate(parts["train"])]
    return {name: [part[name] for part in held] for name in ("train", "test")}


def hold_back(rows: NDArray[Any], config: RunConfig, position: int) -> dict[str, Rows]:
    """Return the rows that a client trains on ("train"), and those that it is tested on instead of test samples.

    Raises ValueError where a client has too few.
    """
    if len(rows) < 2:
        raise SettingError(f"validation-fraction={config.validation_fraction:g} needs 2 training samples or more, and "
                         f"client {position} has {len(rows)}")  # fmt: skip
    order = np.random.default_rng([config.seed, position]).permutation(rows)
    held = min(max(1, round(config.validation_fraction * len(rows))), len(rows) - 1)
    return {"train": np.sort(order[held:]), "test": np.sort(order[:held])}


def by_group(data: Any, partitions: int, config: RunConfig) -> Parts:
    """Return the rows of each group, or of each `group-size` groups, in the order of their ids.

    These are the natural partitions: patients, sites, writers. Without groups of its own, the test set is split at
    random, in proportion. Raises ValueError where there are not as many of them as `partitions`.
    """
    train = samples.groups(data[0])
    ids, members = np.unique(train, return_inverse=True)
    size = config.group_size if config.partitioner == "grouped-natural-id" else 1
    clients = -(-len(ids) // size)
    if clients != partitions:
        raise SettingError(f"partitioner={config.partitioner} makes {clients} clients of the {len(ids)} groups in the "
                         f"data, not {partitions}: set num-clients={clients}")  # fmt: skip
    parts = [np.flatnonzero(members // size == client).astype(np.int32) for client in range(clients)]
    return {"train": parts, "test": _test_rows(data[1], parts, ids, size, config)}


def _test_rows(test: Any, train: list[Rows], ids: NDArray[Any], size: int, config: RunConfig) -> list[Rows]:
    """Return the test rows of each client: of its own groups, or else at random."""
    count = samples.count(test)
    if config.validation_fraction:  # nobody is tested on them
        return [np.arange(count, dtype=np.int32)] * len(train)
    try:
        found = samples.groups(test)
    except ValueError:
        check_enough(count, len(train))
        zeros = np.zeros(sum(map(len, train)), np.int64)
        return _in_proportion(train, zeros, np.zeros(count, np.int64), config.seed)
    if unknown := sorted({*found.tolist()} - {*ids.tolist()}):
        raise SettingError(f"the test data have the group {unknown[0]!r}, which no training sample has")
    client = np.searchsorted(ids, found) // size
    if missing := sorted({*range(len(train))} - {*client.tolist()}):
        raise SettingError(f"the group {ids[missing[0] * size]} has no test samples; with validation-fraction=0.2, "
                         "clients are tested on a part of their training samples")  # fmt: skip
    return [np.flatnonzero(client == one).astype(np.int32) for one in range(len(train))]


def split(train_labels: Any, test_labels: Any, partitions: int, config: RunConfig) -> Parts:
    """Return the rows of each partition in the training set ("train") and in the test set ("test").

    The labels have the shape (samples,). Every row is in exactly one partition, and no partition is empty. Each client
    has the same share of the test samples of a class as of its training samples. Raises ValueError if such a split is
    impossible.
    """
    name, seed = config.partitioner, config.seed
    for labels in (train_labels, test_labels):
        check_enough(len(labels), partitions)
    if name == "iid":
        return {"train": iid(len(train_labels), partitions, seed), "test": iid(len(test_labels), partitions, seed)}
    classes, test_classes = _classes(train_labels, name), _classes(test_labels, name)
    if name == "inner-dirichlet":  # which takes a class for an index
        classes = np.unique(classes, return_inverse=True)[1]
        test_classes = np.searchsorted(np.unique(_classes(train_labels, name)), test_classes)
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
    """Return the class of each sample; the same one for all if the partitioner does not use classes."""
    if partitioner in BY_SIZE:
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

    "dirichlet": Hsu et al. 2019, balanced as by Li et al. 2022 (NIID-Bench, section IV); "pathological": the same,
    quantity-based label imbalance; "shards": McMahan et al. 2017, section 3; "inner-dirichlet": Acar et al. 2021, each
    client's classes from a Dirichlet distribution of its own, clients of one size; "linear", which is "size-skewed",
    "square" and "exponential": client k gets k, k² or eᵏ parts.
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
    if name == "inner-dirichlet":
        sizes = [len(part) for part in np.array_split(classes, partitions)]
        return flower.InnerDirichletPartitioner(sizes, "label", config.alpha, seed=seed)
    return getattr(flower, BY_SIZE[name])(partitions)


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
