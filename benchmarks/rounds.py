"""Measure what the settings of a round do: rates, epochs or steps, how many clients train, personal layers.

    python benchmarks/rounds.py                          # continues if it was interrupted; see --help

Every fifth image of CIFAR-10 (small_cifar.py), 10 clients, Dirichlet(0.5) unless a row says otherwise, SGD as in
cifar.py with a learning rate of 0.02. All rows visit each training sample 16 times. A result is the accuracy after the
last round: of the global model on the whole test set, and the mean of the clients' on their own test samples.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cells import load_cells, save_cells
from benchmarks.in_process import options, play, shortened, spread
from federation.app.config import Settings

COMMON: Settings = {
    "task": "benchmarks.small_cifar", "num-clients": 10, "num-server-rounds": 16, "learning-rate": 0.02,
    "partitioner": "dirichlet", "alpha": 0.5,
}  # fmt: skip
LABELS: Settings = {"partitioner": "pathological", "labels-per-client": 2}
ROWS: dict[str, Settings] = {
    "one epoch a round": {},
    "learning-rate-schedule=step, decay 0.3 after each 6 rounds": {
        "learning-rate-schedule": "step", "learning-rate-decay": 0.3, "decay-rounds": 6,
    },
    "learning-rate-schedule=cosine": {"learning-rate-schedule": "cosine"},
    "local-epochs=4, 4 rounds": {"local-epochs": 4, "num-server-rounds": 4},
    "local-steps=8, 62 rounds": {"local-steps": 8, "num-server-rounds": 62},
    "clients-per-round=5, 32 rounds": {"clients-per-round": 5, "num-server-rounds": 32},
    "2 labels per client": LABELS,
    "2 labels per client, personal=fc3.*": {**LABELS, "personal": "fc3.*"},
    "2 labels per client, personal=fc*": {**LABELS, "personal": "fc*"},
}  # fmt: skip
SIDES = "server_accuracy", "clients_accuracy"


def study(cells: dict[str, Any], path: Path, args: argparse.Namespace) -> None:
    """Run what is missing, seed after seed, so that the first of them make a table already."""
    for seed in range(args.seeds):
        for row in args.row:
            if f"{row}, {seed}" not in cells:
                started = time.perf_counter()
                metrics = play(COMMON | ROWS[row] | {"seed": seed} | shortened(args))
                found = {side: metrics["rounds"][-1][side] for side in SIDES}
                cells[f"{row}, {seed}"] = {**found, "seconds": round(time.perf_counter() - started, 1)}
                save_cells(path, cells)
                print(f"{row}, seed {seed}: {found}", flush=True)


def table(cells: dict[str, Any], args: argparse.Namespace) -> str:
    """Return a table in Markdown, each number in percent."""
    rows = ["| | global model | clients' models |", "|---|---|---|"]
    for row in args.row:
        found = [cells[f"{row}, {seed}"] for seed in range(args.seeds)]
        columns = (spread([100 * one[side] for one in found]) for side in SIDES)
        rows.append(f"| {row} | {' | '.join(columns)} |")
    return "\n".join(rows)


def main() -> None:
    args = options(__doc__, "rounds", row=ROWS).parse_args()
    args.row = args.row or list(ROWS)
    cells = load_cells(args.out)
    study(cells, args.out, args)
    print(table(cells, args))


if __name__ == "__main__":
    main()
