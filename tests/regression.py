"""Runs in memory of a task that costs no time: least squares, whose model is a dictionary of NumPy arrays."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import server
from federation.app import client_grid, picture
from federation.app.checkpoint import load_checkpoint
from tests.in_memory import InMemoryGrid

TASK = """
import ml_dtypes
import numpy as np

FEATURES = 300

def Net():
    return {"w": np.zeros((FEATURES, 1), np.float32), "half": np.ones(2, ml_dtypes.bfloat16), "steps": np.array(0)}

def load_data(root=None):
    x = np.random.default_rng(0).normal(size=(120, FEATURES)).astype(np.float32)
    y = x[:, 0] - 2 * x[:, 1] + 1
    return (x[:80], y[:80]), (x[80:], y[80:])

def errors(net, data):
    return data[0] @ net["w"][:, 0] + net["half"].astype(np.float32).sum() - data[1]

def train(net, data, *, epochs, batch_size, seed, lr=0.01):
    for rows in np.array_split(np.random.default_rng(seed).permutation(len(data[1])), 4):
        batch = data[0][rows], data[1][rows]
        wrong = errors(net, batch)
        net["w"][:, 0] -= lr * (batch[0].T @ wrong) / len(rows)
        net["half"] -= (lr * wrong.mean()).astype(net["half"].dtype)
        net["steps"] += 1
    return float((errors(net, data) ** 2).mean())

def test(net, data):
    return float((errors(net, data) ** 2).mean()), {"steps": float(net["steps"])}
"""


@contextmanager
def regression_task(folder: Path) -> Iterator[None]:
    """Let the task be found, by the name regression_task."""
    (folder / "regression_task.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(client_grid, "POLL", 0.0)  # replies are there at once
        for drawing in ("curves", "partitions"):  # they would take longer than all of the training
            patch.setattr(picture, drawing, lambda metrics, path: path.touch())
        yield


def play(
    folder: Path, tamper: Callable[[Message], object] = id, nodes: int = 1, rounds: int = 4, **settings: Any
) -> SimpleNamespace:
    """Play a run with four clients to its end; return what it has left behind, and its Grid."""
    settings = {key.replace("_", "-"): value for key, value in settings.items()}
    config = {"task": "regression_task", "num-clients": 4, "seed": 7, "num-server-rounds": rounds, "out": str(folder)}
    config |= settings
    configs = {number + 1: {"partition-id": number, "num-partitions": nodes} for number in range(nodes)}
    grid = InMemoryGrid(config, configs, tamper=tamper)
    server.main(grid, Context(1, 0, {}, RecordDict(), config))
    metrics, state = json.loads((folder / "metrics.json").read_text()), load_checkpoint(folder)[1]
    model = {name: np.array(array.numpy()) for name, array in state["arrays"].items()}
    digest = metrics["final_weights_sha256"]
    return SimpleNamespace(grid=grid, rounds=metrics["rounds"][1:], state=state, model=model, digest=digest)
