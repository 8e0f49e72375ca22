"""Compare what clients can send: bytes of a client's reply against accuracy, mean ± deviation over seeds.

    python benchmarks/uploads.py                         # continues if it was interrupted; see --help

Every fifth image of CIFAR-10 (small_cifar.py) in Dirichlet(0.5) partitions for 10 clients, all in each of 20 rounds,
one local epoch of cifar.py's SGD with a learning rate of 0.02. The accuracy is that of the global model on the whole
test set.
"""

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cells import load_cells, save_cells
from benchmarks.in_process import options, play, some_of
from federation.app.config import Settings

UPLOADS: dict[str, Settings] = {
    "weights": {},
    "delta": {"upload": "delta"},
    "float16": {"upload": "delta", "compression": "float16"},
    "int8": {"upload": "delta", "compression": "int8"},
    "top-k 0.1": {"upload": "delta", "compression": "top-k", "top-k": 0.1},
    "top-k 0.01": {"upload": "delta", "compression": "top-k", "top-k": 0.01},
}
COMMON: Settings = {
    "task": "benchmarks.small_cifar", "learning-rate": 0.02, "num-clients": 10, "partitioner": "dirichlet",
    "fraction-evaluate": 0.0,
}  # fmt: skip
ROUNDS = 20
MEASURED = ("server_accuracy", "bytes_up")  # of a round
Cells = dict[str, Any]  # by upload and seed: lists with a value per round


def play_all(path: Path, seeds: int, rounds: int, data: str) -> Cells:
    """Return all cells; run those that are not in the file at `path` yet."""
    cells = load_cells(path)
    for seed in range(seeds):
        for upload, settings in UPLOADS.items():
            key = f"{upload}, {seed}"
            if len(cells.get(key, {}).get("bytes_up", ())) != rounds + 1:
                found = play({**COMMON, **settings, "seed": seed, "num-server-rounds": rounds, "data": data})
                cells[key] = {name: [row[name] for row in found["rounds"]] for name in MEASURED}
                save_cells(path, cells)
                print(f"{key}: {cells[key]['server_accuracy'][-1]:.4f}", flush=True)
    return cells


def table(cells: Cells, seeds: int, shown: list[int]) -> str:
    """Return a Markdown table with a row for each kind of upload, and its accuracy after some rounds."""
    heads = " | ".join(f"accuracy, round {number}" for number in shown)
    lines = [f"| upload | kB per client and round | share | {heads} |", f"|{'---|' * (3 + len(shown))}"]
    whole = cells["weights, 0"]["bytes_up"][-1]
    for upload in UPLOADS:
        sent = cells[f"{upload}, 0"]["bytes_up"][-1]
        found = [[100 * cells[f"{upload}, {seed}"]["server_accuracy"][at] for seed in range(seeds)] for at in shown]
        accuracies = " | ".join(f"{mean(each):.1f} ± {stdev(each) if seeds > 1 else 0:.1f}" for each in found)
        per_client = sent / COMMON["num-clients"] / 1000
        lines.append(f"| {upload} | {per_client:.1f} | {sent / whole:.3f} | {accuracies} |")
    return "\n".join(lines)


def main() -> None:
    args = options(__doc__, "uploads").parse_args()
    rounds = args.rounds or ROUNDS
    cells = play_all(args.out, args.seeds, rounds, args.data)
    print(table(cells, args.seeds, some_of(rounds)))


if __name__ == "__main__":
    main()
