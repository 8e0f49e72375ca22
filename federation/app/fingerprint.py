"""Fingerprints of data sets, small enough for a message, which show whether two machines have the same data.

The fingerprint depends on the values only, not on the framework or the byte order. Floating-point numbers may differ
in their last digits, because the order of additions depends on the number of threads; therefore their fingerprint
consists of random sums, which are compared with a tolerance. Other values are compared by a digest. Neither reveals a
sample.
"""

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.app import samples

PARTS = "training samples", "training labels", "test samples", "test labels"
MOST_ITEMS = 64  # of a data set, because its items are read one by one
LOOKED_AT = 4 * 2**20  # bytes of each part that are read, spread over all of it
SUMS = 8  # per part, with random signs (Achlioptas 2003, Database-friendly random projections)
TOLERANCE = 1e-4  # relative; float32 numbers that are added up in another order differ by 1e-6
MEANT = "; if it should be a copy, copy the server's data again"


def fingerprint(data: Any) -> str:
    """Return the fingerprint of `((x_train, y_train), (x_test, y_test))`, a string of less than a kilobyte.

    Raises ValueError if a part has Python objects that cannot be compared by value.
    """
    values = (part for split in data for part in (split[:2] if samples.is_arrays(split) else _some_items(split)))
    counts = (samples.count(split) for split in data for _ in range(2))
    return json.dumps([(n, *_part(name, part)) for name, n, part in zip(PARTS, counts, values, strict=True)])


def _some_items(split: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the numbers in the x and in the y of some items of a data set; no x where these are random each time."""
    (x, y), (again, _) = (_numbers_in_items(split) for _ in range(2))
    return x if np.array_equal(x, again) else x[:0], y


def _numbers_in_items(split: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    items = [samples.item(split, int(row)) for row in some_rows(samples.count(split), MOST_ITEMS)]
    x, y = (np.concatenate([_numbers(value) for value in values]) for values in zip(*items, strict=True))
    return x, y


def _numbers(value: Any) -> NDArray[np.float64]:
    if isinstance(value, dict):
        return np.concatenate([_numbers(value[name]) for name in sorted(value)])
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.uint8).astype(float)
    return _array("items", value).ravel().astype(float)


def difference(data: str, server: str) -> str:
    """Return how data with the fingerprint `data` differs from the server's, or "" if it is a copy."""
    if not server:
        return "the server has no data"
    if data == server:  # as they mostly are: the numbers need not be read
        return ""
    for name, (count, layout, *values), other in zip(PARTS, json.loads(data), json.loads(server), strict=True):
        if count != other[0]:
            return f"{count:,} {name}, the server {other[0]:,}"
        if layout != other[1]:
            return f"{name} of type {layout}, the server's {other[1]}{MEANT}"
        if values[0] != other[2] or not _close(values[1], other[3]):
            return f"as many {name} as the server, but different ones{MEANT}"
    return ""


def _close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and np.allclose(one, other, rtol=0, atol=TOLERANCE * max(other, default=0.0))


def _part(name: str, values: Any) -> tuple[str, str, list[float]]:
    """Return the type and shape of a sample, and a digest or random sums."""
    some = _some_rows(name, values)
    kind, named = some.dtype.kind, some.dtype.name
    layout = f"{'text' if kind == 'U' else named} {some.shape[1:] or ''}".strip()
    if kind not in "fcV":  # V: those that a package has added to NumPy
        return layout, hashlib.sha256(_bytes(some)).hexdigest()[:16], []
    numbers = some.astype(complex if kind == "c" else float).view(float).ravel()
    return layout, "", _sums(np.nan_to_num(numbers, posinf=0.0, neginf=0.0))


def _sums(numbers: NDArray[np.float64]) -> list[float]:
    """Return the Euclidean norm of `numbers`, and their sums with random signs, which are about as large."""
    random = np.random.default_rng(0)
    signs = (2 * random.integers(0, 2, numbers.size, np.int8) - 1 for _ in range(SUMS))
    return [float(np.linalg.norm(numbers)), *(float(numbers @ each) for each in signs)]


def _some_rows(name: str, values: Any) -> NDArray[Any]:
    """Return the samples of a part, or as many of them as fit into LOOKED_AT bytes."""
    if isinstance(values, list | tuple):
        values = np.asarray(values)
    size = max(1, _array(name, values[:1]).nbytes)
    return _array(name, values[some_rows(len(values), max(1, LOOKED_AT // size))])


def some_rows(count: int, most: int) -> NDArray[np.int64]:
    """Return the row numbers 0 to `count` - 1, or the same `most` of them every time, in ascending order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _array(name: str, values: Any) -> NDArray[Any]:
    """Return an array of any framework, or of Python objects, as an array with a type of NumPy."""
    if hasattr(values, "detach"):  # PyTorch, which has types that NumPy does not have
        values = values.detach().cpu()
        values = values.float() if str(values.dtype).startswith(("torch.bfloat", "torch.float8")) else values
    array = np.asarray(values)
    if array.dtype.kind != "O":
        return array
    try:
        array = np.asarray(array.tolist())
    except ValueError:  # it has arrays of different lengths
        array = np.concatenate([np.ravel(one) for one in array.ravel().tolist()])
    if array.dtype.kind == "O":
        kind = type(array.ravel()[0]).__name__
        raise ValueError(f"the {name} are Python objects of type {kind}, which cannot be compared between machines; "
                         "load_data() should return numbers or text")  # fmt: skip
    return array


def _bytes(array: NDArray[Any]) -> bytes:
    if array.dtype.kind == "U":  # padded to the longest string
        return "\0".join(array.ravel().tolist()).encode()
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
