"""Which classes are taken for which: the numbers, and their picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

MOST_NUMBERS = 20  # classes: of more, the numbers would overlap
MOST_NAMES = 60
LONG: dict[str, Any] = {"rotation": 45, "ha": "right"}  # for names that would overlap

Counts = NDArray[np.int64]


def confusion(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> Counts:
    """Return how many samples of each class (row) are predicted as each class (column)."""
    cells = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes)


def worst(counts: Counts, names: Sequence[str]) -> str:
    """Say which two classes are confused most often, "" if none are."""
    wrong = counts - np.diag(np.diag(counts))
    row, column = map(int, np.unravel_index(wrong.argmax(), wrong.shape))
    if not wrong[row, column]:
        return ""
    return f"{names[row]} taken for {names[column]}, {wrong[row, column]:,} of {counts[row].sum():,}"


def draw(counts: Counts, names: Sequence[str], title: str, path: Path) -> None:
    """Draw the shares of each true class, and the numbers where there is room for them."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.6 + min(12, 0.5 * len(names))  # in inches
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(names)), names, **LONG if max(map(len, names)) > 3 else {})
        axes.set_yticks(range(len(names)), names)
    if len(names) <= MOST_NUMBERS:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8, color=colour)
    figure.savefig(path, dpi=120)
