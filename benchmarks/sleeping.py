"""A task whose clients sleep instead of training, with a model of a few numbers and no framework.

The environment variable SLEEP says how many seconds the training of a client takes (default: 1).
"""

import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

Data = tuple[NDArray[Any], NDArray[Any]]
SAMPLES = 2_000  # in each split, so that as many clients get one each


def Net() -> dict[str, NDArray[Any]]:
    return {"weights": np.zeros(8, np.float32)}


def load_data(root: str | None = None) -> tuple[Data, Data]:
    x = np.arange(SAMPLES, dtype=np.float32)
    return (x, x % 2), (x, x % 2)


def train(
    net: dict[str, NDArray[Any]], data: Data, *, epochs: int, lr: float = 1.0, batch_size: int, seed: int
) -> float:
    time.sleep(float(os.environ.get("SLEEP", "1")))
    net["weights"] += lr
    return 1.0


def test(net: dict[str, NDArray[Any]], data: Data) -> tuple[float, float]:
    return 1.0, 0.5
