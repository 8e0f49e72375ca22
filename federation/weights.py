"""Model ↔ ArrayRecord."""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord


def from_net(net: Any) -> ArrayRecord:
    """Return all weights and buffers of `net`, by name."""
    return ArrayRecord(net.state_dict())


def to_net(arrays: ArrayRecord, net: Any) -> None:
    """Copy `arrays` into `net`. Raises ValueError where a name or a shape does not fit."""
    try:
        net.load_state_dict(arrays.to_torch_state_dict())
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None


def as_before(old: ArrayRecord, new: ArrayRecord) -> ArrayRecord:
    """Return `new` with the dtypes of `old`: a weighted mean turns whole numbers, such as counters, into fractions."""
    pairs = ((name, array.numpy(), np.dtype(old[name].dtype)) for name, array in new.items())
    whole = ((name, np.rint(mean) if dtype.kind in "iu" else mean, dtype) for name, mean, dtype in pairs)
    return ArrayRecord({name: Array(np.asarray(mean, dtype)) for name, mean, dtype in whole})


def sha256(arrays: ArrayRecord) -> str:
    """Digest the raw little-endian bytes of all arrays, in the model's own order."""
    digest = hashlib.sha256()
    for array in (array.numpy() for array in arrays.values()):
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def size(arrays: ArrayRecord) -> int:
    """Return how many bytes `arrays` take on the wire."""
    return sum(len(array.data) for array in arrays.values())


def save(net: Any, path: Path) -> None:
    """Write `net` in its framework's own format: a state_dict."""
    sys.modules["torch"].save(net.state_dict(), model := io.BytesIO())
    path.write_bytes(model.getvalue())
