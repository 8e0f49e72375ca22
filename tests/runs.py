"""Run folders as a run leaves them behind, without the run."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from federation.app.config import defaults
from federation.app.run_folder import METRICS, write_atomically


def row(number: int, clients: int = 2) -> dict[str, Any]:
    """Return a round of metrics.json."""
    found: dict[str, Any] = {"round": number, "server_loss": 2.0 / (number + 1), "server_accuracy": 0.1 * number}
    found |= {"seconds": 2.0, "waiting_seconds": None, "trained": None, "tested": None, "fairness": None}
    if number:
        ids = list(range(clients))
        columns = {"client": ids, "samples": [10] * clients, "seconds": [0.5] * clients}
        found |= {"train_loss": 1.0 / number, "waiting_seconds": 0.5, "clients": clients}
        found["trained"] = columns | {"loss": [number + 0.1 * client for client in ids]}
        found["tested"] = columns | {"loss": [number + 0.2 * client for client in ids]}
        found["fairness"] = {"worst": 1, "best": 0, "standard_deviation": {"loss": 0.1}}
    return found


def write_run(folder: Path, rounds: int, status: str = "running", run: str = "5" * 32, **config: Any) -> dict[str, Any]:
    """Write a run folder with rounds 0 to `rounds`, and pictures and a model where it has ended; return its metrics."""
    metrics = {
        "task": "tiny", "dataset": {"name": "tiny", "train": 62, "test": 28}, "seed": 0, "config": defaults() | config,
        "versions": {"python": "3.11"}, "status": status, "best": None, "run": run,
        "rounds": [row(number) for number in range(rounds + 1)],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    if status == "finished":
        Image.new("RGBA", (30, 20), "red").save(folder / "curves.png")
        (folder / "final_model.pt").write_bytes(b"weights")
    text = json.dumps(metrics)
    write_atomically(folder / METRICS, lambda path: path.write_text(text))  # as a run does: it may be read just then
    return metrics
