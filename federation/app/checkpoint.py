"""The state of a run after its last complete rounds, so that it can go on after a crash: checkpoint-ROUND.npz."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from federation.app.config import RunConfig, Settings, validate
from federation.app.console import one_line
from federation.app.run_folder import write_atomically
from federation.app.weights import encoded

# Keys that no round that has been depends on
RESUMABLE_KEYS = {"resume", "out", "num-server-rounds", "round-timeout", "min-clients", "retries"}
Records = dict[str, ArrayRecord]  # "arrays": the global model; by other names, what a strategy carries along


def save_checkpoint(metrics: dict[str, Any], records: Records, folder: Path) -> None:
    """Write metrics, global model and the strategy's state to one file, so that they always fit together.

    The checkpoint of the round before is kept, in case that the new one is damaged; all others are removed.
    """
    dtypes = {key: {name: array.dtype for name, array in record.items()} for key, record in records.items()}
    values = [array.numpy() for record in records.values() for array in record.values()]
    np.savez(archive := io.BytesIO(), np.array(json.dumps({"metrics": metrics, "dtypes": dtypes})), *values)
    newest, before = (folder / f"checkpoint-{len(metrics['rounds']) - back}.npz" for back in (1, 2))
    write_atomically(newest, lambda path: path.write_bytes(archive.getvalue()))
    for path in set(checkpoints(folder)) - {newest, before}:
        path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], Records]:
    """Return the metrics and the records of the last round. Raises ValueError where they are missing or damaged."""
    paths = checkpoints(folder)
    if not paths:
        raise ValueError(f"there is nothing to resume in {folder}: it holds no checkpoint; start without --resume")
    try:
        return _read(paths[-1])
    except Exception as error:  # a damaged archive shows itself in many ways
        remedy = f"--resume goes on from {paths[-2].name}" if paths[1:] else "start without --resume"
        raise ValueError(f"checkpoint {paths[-1]} is damaged ({one_line(error)}); remove it, and {remedy}") from None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run folder, the newest last."""
    numbered = {path: path.stem.partition("-")[2] for path in folder.glob("checkpoint-*.npz")}
    return sorted((path for path, number in numbered.items() if number.isdecimal()), key=lambda p: int(numbered[p]))


def _read(path: Path) -> tuple[dict[str, Any], Records]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
        text, *arrays = (saved[name] for name in saved.files)
    header = json.loads(str(text))
    dtypes = [(key, name, dtype) for key, record in header["dtypes"].items() for name, dtype in record.items()]
    records = {key: ArrayRecord() for key in header["dtypes"]}
    for (key, name, dtype), array in zip(dtypes, arrays, strict=True):
        records[key][name] = encoded(array.astype(dtype))
    if "arrays" not in records:
        raise ValueError("it holds no model")
    return header["metrics"], records


def resumed(overrides: Settings) -> RunConfig:
    """Return the config of the run in the run folder; `overrides` need to repeat none of it, and may not change it.

    Raises ValueError where there is no such run, or for another value of a key that its rounds depended on.
    """
    out = validate(overrides).out
    begun = load_checkpoint(Path(out).expanduser())[0]["config"]
    config = validate(begun | overrides | {"out": out})
    check_same(begun | {"data": config.data}, config, Path(out))  # paths are compared once they are absolute
    return config


def check_same(begun: Settings, config: RunConfig, folder: Path) -> None:
    """Raise ValueError if a run that was begun with one config would be resumed with another."""
    for key, value in config.values().items():
        if key not in RESUMABLE_KEYS and begun.get(key) != value:
            raise ValueError(f"cannot resume {folder} with {key}={value!r}: it was begun with {begun.get(key)!r}")
