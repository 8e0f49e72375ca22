"""A run as its folder tells of it, in the terms of trackers: parameters, numbers per round, files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from federation.app.run_folder import METRICS

PICTURES = "curves.png", "partitions.png"


@dataclass(frozen=True)
class Run:
    """What a run folder holds at one moment: metrics.json, and when that was written, in seconds since 1970."""

    folder: Path
    metrics: dict[str, Any]
    written: float

    @property
    def identity(self) -> str:
        """The run's own name, 32 hexadecimal digits: the same after it is resumed."""
        return str(self.metrics["run"])

    @property
    def name(self) -> str:
        """How people call it."""
        return self.folder.name

    @property
    def task(self) -> str:
        return str(self.metrics["task"])

    @property
    def status(self) -> str:
        return str(self.metrics["status"])

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return list(self.metrics["rounds"])

    @cached_property
    def times(self) -> list[float]:
        """When each round ended, in seconds since 1970, had nothing come between the rounds."""
        times, time = [], self.written
        for row in reversed(self.rounds):
            times.append(time)
            time -= row["seconds"] + (row["waiting_seconds"] or 0)
        return times[::-1]

    @property
    def parameters(self) -> dict[str, Any]:
        """The run config, and what else was fixed at the start."""
        data, versions = self.metrics["dataset"], self.metrics["versions"]
        found = {"dataset": data["name"], "training-samples": data["train"], "test-samples": data["test"]}
        return dict(self.metrics["config"]) | found | {f"version-{name}": text for name, text in versions.items()}

    @property
    def pictures(self) -> list[Path]:
        return [path for name in PICTURES if (path := self.folder / name).exists()]

    @property
    def models(self) -> list[Path]:
        return [path for name in ("final_model", "best_model") for path in sorted(self.folder.glob(f"{name}.*"))]


def read_run(folder: Path, since: float = 0) -> Run | None:
    """Return the run in a folder, None where there is none that was written `since` then. Raises OSError."""
    path = folder / METRICS
    if not path.exists() or (written := path.stat().st_mtime) < since:
        return None
    return Run(folder, json.loads(path.read_text("utf-8")), written)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a round by name: the keys of metrics.json, and `tested_loss/client_3` for each client."""
    found = {key: value for key, value in row.items() if isinstance(value, int | float)}
    spread = (row.get("fairness") or {}).get("standard_deviation", {})
    found |= {f"standard_deviation_{name}": value for name, value in spread.items()}
    return found | dict(_per_client(row))


def _per_client(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for kind in ("trained", "tested"):
        columns = row.get(kind) or {"client": []}
        for name in columns.keys() - {"client"}:
            for client, value in zip(columns["client"], columns[name], strict=True):
                yield f"{kind}_{name}/client_{client}", value
