"""The samples of a split, whatever holds them: how many there are, their labels and groups, and those of one client.

A split is `(x, y)` or `(x, y, groups)`, arrays from which rows can be picked by an array of their numbers, or else a
map-style data set, whose items are `(x, y)`: a `torch.utils.data.Dataset`, or one of Hugging Face.
"""

import functools
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from federation.app.config import SettingError

LABELS = "label", "labels", "target", "targets"  # what the column or attribute with the labels may be called


def is_arrays(split: Any) -> bool:
    return isinstance(split, tuple | list) and len(split) in (2, 3)


def check(split: Any) -> int:
    """Return the number of samples. Raises ValueError where there is none, or not one label for each."""
    lengths = {len(part) for part in (split if is_arrays(split) else [split])}
    if len(lengths) != 1 or not all(lengths):
        raise ValueError(f"a split whose lengths are: {[len(part) for part in split] if is_arrays(split) else 0}")
    if not is_arrays(split) and (isinstance(split, str | dict) or not is_data_set(split)):
        raise ValueError(f"a split of type {type(split).__name__}")
    return lengths.pop()


def is_data_set(split: Any) -> bool:
    return hasattr(split, "__getitem__") and (hasattr(split, "column_names") or not hasattr(split, "shape"))


def count(split: Any) -> int:
    """Return the number of samples."""
    return len(split[1]) if is_arrays(split) else len(split)


def take(split: Any, rows: NDArray[Any] | None = None) -> Any:
    """Return what train() and test() get of a split: these rows of it, by default all, without the groups."""
    if is_arrays(split):
        return tuple(_pick(part, rows) for part in split[:2])
    return _pick(split, rows)


def _pick(part: Any, rows: NDArray[Any] | None) -> Any:
    if rows is None:
        return part
    if hasattr(part, "column_names"):  # of Hugging Face: part[rows] would be the columns, as lists
        return part.select(rows)
    torch = sys.modules.get("torch")
    if torch and isinstance(part, torch.utils.data.Dataset):
        return torch.utils.data.Subset(part, rows.tolist())
    return part[rows]


def labels(split: Any, one_pass: bool = True) -> Any:
    """Return the label of each sample. Where that takes a pass over a data set, it is made once, or not (None)."""
    if is_arrays(split):
        return split[1]
    for name in LABELS:
        if name in getattr(split, "column_names", ()):
            return np.asarray(split[name])
        if isinstance(found := getattr(split, name, None), list | tuple) or hasattr(found, "__array__"):
            return np.asarray(found)
    return _labels_by_one_pass(split) if one_pass else None


@functools.lru_cache(maxsize=4)
def _labels_by_one_pass(split: Any) -> NDArray[Any]:
    rows = tqdm(range(len(split)), "reading labels", leave=False, disable=None)
    return np.asarray([item(split, row)[1] for row in rows])


def item(split: Any, row: int) -> tuple[Any, Any]:
    """Return the x and y of a sample of a data set. Raises ValueError where it has no label."""
    one = split[row]
    if isinstance(one, dict):
        names = [name for name in LABELS if name in one]
        if names:
            return {name: value for name, value in one.items() if name != names[0]}, one[names[0]]
    elif isinstance(one, tuple | list) and len(one) >= 2:
        return one[0], one[1]
    raise ValueError(f"the items of a data set should be (x, y); item {row} is of type {type(one).__name__}")


def groups(split: Any) -> NDArray[Any]:
    """Return the group of each sample, by number or text. Raises SettingError where there are none."""
    found = split[2] if is_arrays(split) and len(split) == 3 else getattr(split, "groups", None)
    if found is None:
        raise SettingError("the data have no groups: load_data() should return (x, y, groups), or a data set with an "
                         "attribute `groups`")  # fmt: skip
    return np.asarray(found)


def num_classes(split: Any) -> int:
    """Return how many classes there are. Raises ValueError where labels are not whole numbers from 0."""
    if isinstance(names := getattr(split, "classes", None), list | tuple):
        return len(names)
    found = np.asarray(labels(split))
    if found.dtype.kind not in "biu" or found.size != len(found) or found.min() < 0:
        raise ValueError(f"Net() takes the number of classes, but labels of type {found.dtype} are none; "
                         "they should be whole numbers from 0")  # fmt: skip
    return int(found.max()) + 1
