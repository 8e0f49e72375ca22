"""Records of arrays in one NumPy archive, with a header of plain values: checkpoints, and what clients keep."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from federation.app.run_folder import write_atomically
from federation.app.weights import encoded, view

Records = dict[str, ArrayRecord]


def write_archive(path: Path, header: Mapping[str, Any], records: Mapping[str, ArrayRecord]) -> None:
    """Write a header and records to one file, so that they are always consistent."""
    dtypes = {key: {name: array.dtype for name, array in record.items()} for key, record in records.items()}
    values = [view(array) for record in records.values() for array in record.values()]
    np.savez(archive := io.BytesIO(), np.array(json.dumps({**header, "dtypes": dtypes})), *values)
    write_atomically(path, lambda unfinished: unfinished.write_bytes(archive.getbuffer()))


def read_archive(path: Path) -> tuple[dict[str, Any], Records]:
    """Return the header and the records of a file. A damaged one can raise many kinds of errors."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
        text, *arrays = (saved[name] for name in saved.files)
    header = json.loads(str(text))
    dtypes = [(key, name, dtype) for key, record in header["dtypes"].items() for name, dtype in record.items()]
    records = {key: ArrayRecord() for key in header.pop("dtypes")}
    for (key, name, dtype), array in zip(dtypes, arrays, strict=True):
        records[key][name] = encoded(array.astype(dtype))
    return header, records
