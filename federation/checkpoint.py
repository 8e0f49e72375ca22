"""The state of a run after its last complete round, so that it can go on after a crash: checkpoint.npz."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from federation.config import Config, checked
from federation.console import reason
from federation.weights import encoded

CHECKPOINT = "checkpoint.npz"
FREE = {"resume", "out", "num-server-rounds", "round-timeout"}  # keys that no round that has been depends on


def save_checkpoint(metrics: dict[str, Any], arrays: ArrayRecord, path: Path) -> None:
    """Write metrics and global model to one file, so that they always fit together."""
    header = json.dumps({"metrics": metrics, "dtypes": {name: array.dtype for name, array in arrays.items()}})
    with path.open("wb") as file:
        np.savez(file, np.array(header), *(array.numpy() for array in arrays.values()))


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], ArrayRecord]:
    """Return the metrics and the global model. Raises ValueError where they are missing or damaged."""
    path = folder / CHECKPOINT
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            text, *arrays = (saved[name] for name in saved.files)
        header = json.loads(str(text))
        pairs = zip(header["dtypes"].items(), arrays, strict=True)
        return header["metrics"], ArrayRecord({name: encoded(array.astype(dtype)) for (name, dtype), array in pairs})
    except FileNotFoundError:
        raise ValueError(f"there is nothing to resume: {path} does not exist; start without --resume") from None
    except Exception as error:  # a damaged archive shows itself in many ways
        why = reason(error)
        raise ValueError(f"checkpoint {path} is damaged ({why}); remove it and start without --resume") from None


def resumed(overrides: Config) -> Config:
    """Return the config of the run in the run folder; `overrides` need to repeat none of it, and may not change it.

    Raises ValueError where there is no such run, or for another value of a key that its rounds depended on.
    """
    out = checked(overrides)["out"]
    begun = load_checkpoint(Path(out).expanduser())[0]["config"]
    config = checked(begun | overrides | {"out": out})
    check_same(begun | {"data": config["data"]}, config, Path(out))  # paths are compared once they are absolute
    return config


def check_same(begun: Config, config: Config, folder: Path) -> None:
    """Raise ValueError if a run that was begun with one config would be resumed with another."""
    for key in config.keys() - FREE:
        if begun.get(key) != config[key]:
            raise ValueError(f"cannot resume {folder} with {key}={config[key]!r}: it was begun with {begun.get(key)!r}")
