"""Checkpoints, from which a run continues after a crash: its state after a round, in checkpoint-ROUND.npz."""

from pathlib import Path
from typing import Any

from federation.app.archive import Records, read_archive, write_archive
from federation.app.config import RunConfig, Settings, validate
from federation.app.console import one_line

# Keys that may change when a run is resumed: no completed round depends on them
RESUMABLE_KEYS = {"resume", "out", "num-server-rounds", "round-timeout", "min-clients", "retries", "patience",
                  "dp-target-epsilon", "tracking"}  # fmt: skip


def save_checkpoint(metrics: dict[str, Any], records: Records, folder: Path) -> None:
    """Write the metrics, the global model ("arrays") and the strategy's state (other names) to one file.

    The checkpoint of the previous round is kept in case the new one is damaged; all others are removed.
    """
    newest, before = (folder / f"checkpoint-{len(metrics['rounds']) - back}.npz" for back in (1, 2))
    write_archive(newest, {"metrics": metrics}, records)
    for path in set(checkpoints(folder)) - {newest, before}:
        path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], Records]:
    """Return the metrics and the records of the last round. Raises ValueError if they are missing or damaged."""
    paths = checkpoints(folder)
    if not paths:
        raise ValueError(f"cannot resume {folder}: it has no checkpoint; start without --resume")
    try:
        return _read(paths[-1])
    except Exception as error:  # a damaged file can raise many kinds
        remedy = f"--resume will continue from {paths[-2].name}" if paths[1:] else "start without --resume"
        raise ValueError(f"checkpoint {paths[-1]} is damaged ({one_line(error)}); remove it, and {remedy}") from None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run folder, the newest last."""
    numbered = {path: path.stem.partition("-")[2] for path in folder.glob("checkpoint-*.npz")}
    return sorted((path for path, number in numbered.items() if number.isdecimal()), key=lambda p: int(numbered[p]))


def _read(path: Path) -> tuple[dict[str, Any], Records]:
    header, records = read_archive(path)
    if "arrays" not in records:
        raise ValueError("it has no model")
    return header["metrics"], records


def resumed(overrides: Settings) -> RunConfig:
    """Return the config of the run in the run folder, with `overrides`.

    Raises ValueError if there is no such run, or if an override changes a key that its rounds depended on.
    """
    out = validate(overrides).out
    begun = load_checkpoint(Path(out).expanduser())[0]["config"]
    config = validate(begun | overrides | {"out": out})
    check_same(begun | {"data": config.data}, config, Path(out))  # only compared once it is an absolute path
    return config


def check_same(begun: Settings, config: RunConfig, folder: Path) -> None:
    """Raise ValueError if a run that was started with one config would be resumed with another."""
    fixed = {"num-server-rounds"} if config.learning_rate_schedule == "cosine" else set()
    for key, value in config.values().items():
        if key not in RESUMABLE_KEYS - fixed and begun.get(key) != value:
            raise ValueError(f"cannot resume {folder} with {key}={value!r}: it was begun with {begun.get(key)!r}")
