"""Helpers for the programs in this folder: options, the clients' samples, and the log of rounds.

simulated_rounds.py starts them, with the project's folder and this one on PYTHONPATH.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

BATCH_SIZE = 32
SEED = 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder for metrics.json")
    for name in ("--clients", "--rounds", "--workers"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args()


def split(samples: int, clients: int) -> list[torch.Tensor]:
    """Return the row numbers of each client, from the project's IID partitions."""
    order = np.random.default_rng(SEED).permutation(samples)
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, clients)]


def client_seed(client: int, server_round: int) -> int:
    """Return the project's shuffling seed of a client in a round (counted from 1)."""
    return (SEED + client * 1_000_003 + server_round - 1) % 2**31


class RoundLog:
    """Writes metrics.json with the names that server.py uses. A round starts at the end of the previous one."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "metrics.json"
        self.rounds: list[dict[str, float | None]] = []
        self.started = time.perf_counter()

    def add(self, clients: int, accuracy: float | None = None) -> None:
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        row = {"round": len(self.rounds), "clients": clients, "server_accuracy": accuracy, "seconds": seconds}
        self.rounds.append(row)
        unfinished = self.file.with_suffix(".unfinished")  # because other programs read the file meanwhile
        unfinished.write_text(json.dumps({"rounds": self.rounds}), "utf-8")
        unfinished.replace(self.file)
