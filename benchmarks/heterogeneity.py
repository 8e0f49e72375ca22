"""Compare strategies where clients' data differ: accuracy by strategy and partition, mean ± deviation over seeds.

    python benchmarks/heterogeneity.py                   # continues if it was interrupted; see --help
    python benchmarks/heterogeneity.py --search          # what the strategies' parameters were chosen by

Every fifth image of CIFAR-10 (small_cifar.py), in two settings: 10 clients that all train in each of 15 rounds, one
local epoch each; and 100 clients, 10 of which train in each of 40 rounds, four local epochs each. SGD is that of
cifar.py with a learning rate of 0.02. A result is the mean of the test accuracies after the last five rounds: with
strong skew, they go up and down from round to round.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cells import load_cells, save_cells
from benchmarks.in_process import options, play, shortened, spread
from federation.app.config import Settings

SETTINGS: dict[str, Settings] = {
    "10 of 10 clients": {"num-clients": 10, "num-server-rounds": 15},
    "10 of 100 clients": {"num-clients": 100, "clients-per-round": 10, "num-server-rounds": 40, "local-epochs": 4},
}
PARTITIONS: dict[str, Settings] = {
    "IID": {"partitioner": "iid"},
    "Dirichlet 0.5": {"partitioner": "dirichlet", "alpha": 0.5},
    "Dirichlet 0.1": {"partitioner": "dirichlet", "alpha": 0.1, "min-partition-size": 2},  # or 100 clients are too many
    "2 labels": {"partitioner": "pathological", "labels-per-client": 2},
}
STRATEGIES = {  # with their parameters, chosen by the search
    "fedavg": "",
    "fedprox": "proximal_mu=0.01",
    "fedavgm": "server_momentum=0.5",
    "fedadagrad": "eta=0.01",
    "fedadam": "eta=0.03",
    "fedyogi": "eta=0.03",
    "qfedavg": "q=0.001",
    "scaffold": "",
}
SEARCH = [  # with the first setting, Dirichlet 0.5 and seed 0
    ("fedprox", "proximal_mu=0.01"), ("fedprox", "proximal_mu=0.1"), ("fedavgm", "server_momentum=0.5"),
    ("fedavgm", "server_momentum=0.9"), ("fedadagrad", "eta=0.003"), ("fedadagrad", "eta=0.01"),
    ("fedadagrad", "eta=0.03"), ("fedadagrad", "eta=0.1"), ("fedadam", "eta=0.003"), ("fedadam", "eta=0.01"),
    ("fedadam", "eta=0.03"), ("fedyogi", "eta=0.01"), ("fedyogi", "eta=0.03"), ("fedyogi", "eta=0.1"),
    ("qfedavg", "q=0.001"), ("qfedavg", "q=0.01"), ("qfedavg", "q=0.1"), ("qfedavg", "q=1.0"),
]  # fmt: skip
COMMON: Settings = {"task": "benchmarks.small_cifar", "learning-rate": 0.02, "fraction-evaluate": 0.0}
LAST = 5  # rounds, the accuracies of which make a result
Cells = dict[str, Any]  # by setting, partition, strategy with parameters, and seed: accuracies per round, and seconds


def cell(cells: Cells, path: Path, config: Settings, *name: str | int) -> list[float]:
    """Return the accuracies of a run, which is run if it is not among the `cells` yet."""
    key = ", ".join(map(str, name))
    if key not in cells:
        started = time.perf_counter()
        metrics = play(COMMON | config)
        accuracies = [row["server_accuracy"] for row in metrics["rounds"]]
        seconds = round(time.perf_counter() - started, 1)
        cells[key] = {"accuracies": accuracies, "status": metrics["status"], "seconds": seconds}
        save_cells(path, cells)
        print(f"{key}: {result(accuracies):.4f}, {metrics['status']}, {seconds} s", flush=True)
    return list(cells[key]["accuracies"])


def result(accuracies: list[float]) -> float:
    return mean(accuracies[-LAST:])


def study(cells: Cells, path: Path, args: argparse.Namespace) -> None:
    """Run what is missing, seed after seed, so that the first of them make a table already."""
    for seed in range(args.seeds):
        for setting, partition, strategy in every(args):
            config = given(strategy, STRATEGIES[strategy], seed) | SETTINGS[setting] | PARTITIONS[partition]
            cell(cells, path, config | shortened(args), setting, partition, strategy, STRATEGIES[strategy], seed)


def search(cells: Cells, path: Path, args: argparse.Namespace) -> None:
    setting, partition = next(iter(SETTINGS)), "Dirichlet 0.5"
    for strategy, parameters in SEARCH:
        config = given(strategy, parameters, 0) | SETTINGS[setting] | PARTITIONS[partition] | shortened(args)
        accuracies = cell(cells, path, config, setting, partition, strategy, parameters, 0)
        print(f"{strategy} {parameters}: {result(accuracies):.4f}")


def given(strategy: str, parameters: str, seed: int) -> Settings:
    return {"strategy": strategy, "strategy-arguments": parameters, "seed": seed}


def every(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    return [(one, part, name) for one in args.setting for part in args.partition for name in args.strategy]


def table(cells: Cells, args: argparse.Namespace) -> str:
    """Return a table in Markdown: a column per partition, each number in percent."""
    rows = ["| | " + " | ".join(args.partition) + " |", "|---" * (1 + len(args.partition)) + "|"]
    for setting in args.setting:
        rows.append(f"| **{setting}**" + " |" * (1 + len(args.partition)))
        for strategy in args.strategy:
            name = f"{strategy} {STRATEGIES[strategy]}".strip()
            columns = [of_seeds(cells, setting, partition, strategy, args.seeds) for partition in args.partition]
            rows.append(f"| {name} | " + " | ".join(columns) + " |")
    return "\n".join(rows)


def of_seeds(cells: Cells, setting: str, partition: str, strategy: str, seeds: int) -> str:
    """Return the mean, and the deviation over the seeds that are there."""
    keys = [f"{setting}, {partition}, {strategy}, {STRATEGIES[strategy]}, {seed}" for seed in range(seeds)]
    found = [cells[key] for key in keys if key in cells]
    values = [100 * result(one["accuracies"]) for one in found]
    failed = sum(one["status"] != "finished" for one in found)
    return spread(values) + f" ({failed} diverged)" * bool(failed)


def main() -> None:
    parser = options(__doc__, "heterogeneity", setting=SETTINGS, partition=PARTITIONS, strategy=STRATEGIES)
    parser.add_argument("--search", action="store_true", help="compare parameters of the strategies instead")
    args = parser.parse_args()
    args.setting, args.partition = args.setting or list(SETTINGS), args.partition or list(PARTITIONS)
    args.strategy = args.strategy or list(STRATEGIES)
    cells = load_cells(args.out)
    if args.search:
        return search(cells, args.out, args)
    study(cells, args.out, args)
    print(table(cells, args))


if __name__ == "__main__":
    main()
