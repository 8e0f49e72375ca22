"""The pictures of a run are drawn for all sizes of federations, and show what the numbers say."""

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from federation.app import picture
from federation.app.report import MOST_CLASSES, count

ROWS = [np.array([0, 1, 5], np.int32), np.array([2], np.int32), np.array([3, 4], np.int32)]
LABELS = np.array([7, 3, 3, 9, 3, 7])


def metrics(clients: int = 2, classes: int = 10, rounds: int = 3) -> dict[str, Any]:
    """Return what the pictures read of metrics.json."""
    random = np.random.default_rng(0)
    learned = [
        {"round": i, "train_loss": 2.3 * 0.7**i, "clients_loss": 2.2 * 0.7**i, "clients_accuracy": 1 - 0.9 * 0.7**i}
        for i in range(rounds + 1)
    ]
    learned[0] |= {"train_loss": None, "clients_loss": None, "clients_accuracy": None}
    return {
        "task": "cifar",
        "dataset": {"name": "/data/cifar10", "train": 50_000, "test": 10_000},
        "config": {"partitioner": "dirichlet", "num-clients": clients},
        "rounds": [row | {"server_loss": 2.3 * 0.7**i, "server_accuracy": 0.5} for i, row in enumerate(learned)],
        "partitions": {"train": random.integers(0, 999, (clients, classes)).tolist()},
    }


def drawn(what: str, numbers: dict[str, Any], path: Path) -> Figure:
    """Draw a picture, see that it is one, and return it as Matplotlib has it."""
    figures: list[Figure] = []
    with patch.object(picture, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1]):
        getattr(picture, what)(numbers, path)
    with Image.open(path) as image:
        assert image.format == "PNG" and 400 < image.width < 4000 and 300 < image.height < 4000
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    return figures[0]


def check_nothing_overlaps(figure: Figure) -> None:
    """Check that no axes overlap one another, and that no two tick labels of an axis do."""
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_visible()]
        assert not any(one.overlaps(other) for one, other in pairwise(labels))


@pytest.mark.parametrize(("clients", "classes"), [(2, 10), (100, 10), (3, 1), (10, 200), (1, 1), (20, 20)])
@pytest.mark.filterwarnings("error::UserWarning")
def test_partitions(clients: int, classes: int, tmp_path: Path) -> None:
    numbers = metrics(clients, classes)
    figure = drawn("partitions", numbers, tmp_path / "partitions.png")
    total, cells, _ = figure.axes
    held = np.array(numbers["partitions"]["train"])
    assert [bar.get_height() for bar in total.patches] == held.sum(1).tolist()
    assert (np.asarray(cells.images[0].get_array()) == held.T).all()
    written = [int(text.get_text()) if text.get_text() else 0 for text in cells.texts]
    assert written == (held.ravel().tolist() if max(clients, classes) <= 20 else []), "as long as they can be read"
    assert figure.get_suptitle() == f"dirichlet partitions of {held.sum():,} training samples"
    check_nothing_overlaps(figure)
    for axis, most in ((cells.xaxis, clients), (cells.yaxis, classes)):
        ticks = [tick for tick in axis.get_ticklocs() if -0.5 <= tick <= most - 0.5]
        assert ticks and all(tick == int(tick) for tick in ticks), "there is no client 0.5"


@pytest.mark.parametrize("rounds", [0, 1, 3, 50])
@pytest.mark.filterwarnings("error::UserWarning")
def test_curves(rounds: int, tmp_path: Path) -> None:
    numbers = metrics(rounds=rounds)
    figure = drawn("curves", numbers, tmp_path / "curves.png")
    accuracy, loss = figure.axes
    assert figure.get_suptitle() == "cifar on cifar10 (50,000 samples), federated"
    shown = {line.get_label(): (axes, line) for axes in (accuracy, loss) for line in axes.lines}
    assert len(accuracy.lines) + len(loss.lines) == (5 if rounds else 2), "no line without a point"
    axes, line = shown["server, whole test set"]
    assert axes is loss and line.get_ydata().tolist() == [row["server_loss"] for row in numbers["rounds"]]
    if rounds:
        axes, line = shown["clients, training"]
        assert axes is loss and line.get_xdata().tolist() == list(range(1, rounds + 1))
    for axes in (accuracy, loss):
        assert all(tick == int(tick) for tick in axes.get_xticks()), "there is no round 0.5"
    check_nothing_overlaps(figure)


# ------------------------------------------------------------------------------------------------ what there is to draw


@pytest.mark.parametrize(
    "labels",
    [LABELS, LABELS[:, None], LABELS / 1, LABELS.astype(np.uint8), torch.tensor(LABELS), torch.tensor(LABELS)[:, None],
     LABELS.tolist(), np.array([f"class {label}" for label in LABELS])],
    ids=["vector", "column", "floats", "uint8", "tensor", "column tensor", "list", "words"],
)  # fmt: skip
def test_the_samples_of_each_class_are_counted(labels: Any) -> None:
    """The columns are the classes 3, 7 and 9."""
    assert count(labels, ROWS) == [[1, 2, 0], [1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    "labels",
    [LABELS / 2, np.eye(10)[LABELS], np.zeros((6, 4, 4)), torch.eye(10)[LABELS]],
    ids=["of a regression", "one-hot", "masks", "tensor"],
)
def test_samples_are_counted_where_labels_are_no_classes(labels: Any) -> None:
    assert count(labels, ROWS) == [[3], [1], [2]]


def test_so_many_classes_are_none() -> None:
    for classes, columns in ((MOST_CLASSES, MOST_CLASSES), (MOST_CLASSES + 1, 1)):
        labels = np.random.default_rng(0).permutation(np.arange(classes) * 7)
        counted = count(labels, [np.arange(0, 600), np.arange(600, classes)])
        assert [sum(counts) for counts in counted] == [600, classes - 600] and len(counted[0]) == columns
