"""Reproduce rounds to a target accuracy on MNIST: FedAvg of McMahan et al. 2017 (arXiv 1602.05629), tables 1 and 2.

    python benchmarks/mcmahan.py --data mnist.npz        # continues if it was interrupted; see --help

100 clients, 10 of which train in each round, with batches of 10: the network with two hidden layers ("2NN", 1 local
epoch) to 97 %, and the convolutional one ("CNN", 5 local epochs) to 99 % of the test images, each on IID partitions and
on shards (two of 300 images of one class per client). The number of rounds is found as in the paper: the curve of the
best accuracy so far, and linear interpolation where it crosses the target.

The learning rate is searched as in the paper, too, on a grid with the factor 10^(1/3), separately for each row: the run
with the best accuracy within the first rounds (20, 60, 3, 15 in the order of the table) is continued. A row ends at the
target, or without it after twice the published rounds. Two thirds of these rounds up to one and a half times as many
count as reproduced.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cells import FOLDER, load_cells, save_cells
from benchmarks.in_process import cpu_seconds, play_in
from federation.app.config import Settings
from federation.app.run_folder import write_atomically
from federation.launch.command import run_command


@dataclass(frozen=True)
class Row:
    """A setting of the paper, and what it found."""

    network: str
    partitioner: str
    local_epochs: int
    target: float
    published: tuple[int, ...]  # rounds: from table 2 and from table 1, where both have the setting
    search: int  # rounds of each learning rate
    slice: int  # rounds between two looks at the target

    def config(self, rate: float, args: argparse.Namespace) -> Settings:
        return {
            "task": f"benchmarks.mcmahan_{self.network}", "data": args.data, "num-clients": 100,
            "clients-per-round": 10, "batch-size": 10, "local-epochs": self.local_epochs, "learning-rate": rate,
            "partitioner": self.partitioner, "fraction-evaluate": 0.0, "seed": args.seed,
        }  # fmt: skip


ROWS = {
    "2NN, IID": Row("2nn", "iid", 1, 0.97, (87,), search=20, slice=20),
    "2NN, shards": Row("2nn", "shards", 1, 0.97, (664,), search=60, slice=20),
    "CNN, IID": Row("cnn", "iid", 5, 0.99, (20, 18), search=3, slice=1),
    "CNN, shards": Row("cnn", "shards", 5, 0.99, (229, 206), search=15, slice=3),
}
RATES = [0.0215, 0.0464, 0.1, 0.215, 0.464]
SMOKE = {"data": "embedded", "row": ["2NN, shards", "CNN, IID"], "rates": [0.0464], "search": 1, "rounds": 1}
LIMIT = 2  # times as many rounds as published
COLOURS = {"IID": "#0072b2", "shards": "#d55e00"}  # Okabe and Ito 2008
Cells = dict[str, Any]  # by row, learning rate and seed: accuracies per round, from round 0, and seconds of CPU


def rounds_to(target: float, accuracies: list[float]) -> float | None:
    """Return after how many rounds the best accuracy so far crosses `target`, by linear interpolation, if it does."""
    best = list(accumulate(accuracies, max))
    for after in range(1, len(best)):
        if best[after] >= target > best[after - 1]:
            return after - 1 + (target - best[after - 1]) / (best[after] - best[after - 1])
    return 0.0 if best and best[0] >= target else None


# ----------------------------------------------------------------------------------------------------------- the study


def study(cells: Cells, args: argparse.Namespace) -> None:
    """Run what is missing, row after row."""
    for name in args.row:
        for rate in args.rates:
            advance(cells, args, name, rate, search_rounds(name, args))
        advance(cells, args, name, best_rate(cells, args, name), last_round(name, args))


def advance(cells: Cells, args: argparse.Namespace, name: str, rate: float, until: int) -> None:
    """Continue a run up to the round `until`, or to its target, and note it after each slice of rounds."""
    row, key = ROWS[name], key_of(name, rate, args)
    folder = args.out.with_suffix("") / key.replace(", ", "-").replace(" ", "-")
    cell = cells.setdefault(key, {"accuracies": [], "cpu_seconds": 0.0, "status": "new"})
    while cell["status"] != "failed" and rounds_to(row.target, cell["accuracies"]) is None and played(cell) < until:
        started, wanted = cpu_seconds(), min(until, played(cell) + row.slice)
        metrics = play_in(folder, row.config(rate, args) | {"num-server-rounds": wanted}, processes=args.processes)
        cell["accuracies"] = [one["server_accuracy"] for one in metrics["rounds"]]
        cell["cpu_seconds"] = round(cell["cpu_seconds"] + cpu_seconds() - started, 1)
        cell["status"] = metrics["status"]
        save_cells(args.out, cells)
        print(f"{key}: round {played(cell)}, {100 * cell['accuracies'][-1]:.2f} %, {cell['status']}, "
              f"{cell['cpu_seconds']:.0f} s of CPU", flush=True)  # fmt: skip


def key_of(name: str, rate: float, args: argparse.Namespace) -> str:
    return f"{name}, rate {rate:g}, seed {args.seed}"


def played(cell: dict[str, Any]) -> int:
    """Return the number of rounds that a run has played."""
    return max(0, len(cell["accuracies"]) - 1)


def search_rounds(name: str, args: argparse.Namespace) -> int:
    return int(args.search or ROWS[name].search)


def last_round(name: str, args: argparse.Namespace) -> int:
    return int(args.rounds or LIMIT * ROWS[name].published[0])


def best_rate(cells: Cells, args: argparse.Namespace, name: str) -> float:
    """Return the learning rate with the best accuracy within the rounds of the search."""

    def accuracy(rate: float) -> float:
        found = cells.get(key_of(name, rate, args), {"accuracies": []})["accuracies"]
        return max(found[: search_rounds(name, args) + 1], default=0.0)

    return float(max(args.rates, key=accuracy))


# --------------------------------------------------------------------------------------------------- what it has found


def table(cells: Cells, args: argparse.Namespace) -> str:
    """Return a table in Markdown of the rows as far as they are."""
    rows = ["| | target | published rounds (table 2 / 1) | rounds | ratio | learning rate | CPU seconds per round |"]
    rows += ["|---" * 7 + "|"]
    for name in args.row:
        rate = best_rate(cells, args, name)
        if cell := cells.get(key_of(name, rate, args)):
            shown = [name, f"{100 * ROWS[name].target:g} %", " / ".join(map(str, ROWS[name].published))]
            shown += [*result(ROWS[name], cell), f"{rate:g}", f"{cell['cpu_seconds'] / max(1, played(cell)):.1f}"]
            rows.append(f"| {' | '.join(shown)} |")
    return "\n".join(rows)


def result(row: Row, cell: dict[str, Any]) -> tuple[str, str]:
    """Return the rounds to the target, and how many times the published ones that is; or how far the run is."""
    rounds = rounds_to(row.target, cell["accuracies"])
    if rounds is None:
        return f"> {played(cell)} ({100 * max(cell['accuracies']):.2f} %)", "-"
    return f"{rounds:.1f}", f"{rounds / row.published[0]:.2f}"


def draw(path: Path, cells: Cells, args: argparse.Namespace) -> None:
    """Draw the accuracy of each row against the rounds, with its target and the published rounds to it."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for panel, network in zip(figure.subplots(1, 2), ("2NN", "CNN"), strict=True):
        for name in (name for name in args.row if name.startswith(network)):
            if cell := cells.get(key_of(name, best_rate(cells, args, name), args)):
                _curve(panel, name.partition(", ")[2], ROWS[name], [100 * value for value in cell["accuracies"][1:]])
        panel.set(title=network, xscale="log", xlabel="round", ylabel="test accuracy, %", ylim=(80, 100.5))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=120))


def _curve(panel: Any, split: str, row: Row, accuracies: list[float]) -> None:
    rounds, colour = range(1, len(accuracies) + 1), COLOURS[split]
    panel.plot(rounds, accuracies, color=colour, alpha=0.3, linewidth=1)
    panel.plot(rounds, list(accumulate(accuracies, max)), color=colour, label=f"{split}, best so far")
    panel.axhline(100 * row.target, color="grey", linestyle=":", linewidth=1)
    where = [100 * row.target] * len(row.published)
    panel.plot(row.published, where, "D", color=colour, markerfacecolor="white", label=f"{split}, published")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", default="", metavar="FILE", help="mnist.npz, as in examples/mnist_jax.py")
    parser.add_argument("--row", choices=ROWS, action="append", help="(default: all in turn)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="F", help="(default: as above)")
    parser.add_argument("--search", type=int, metavar="N", help="rounds of each learning rate (default: as above)")
    parser.add_argument("--rounds", type=int, metavar="N", help="the last round (default: twice the published)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="for the clients (default: this one)")
    parser.add_argument("--out", type=Path, default=FOLDER / "mcmahan.json", metavar="FILE")
    parser.add_argument("--table", action="store_true", help="only show what has been found so far")
    parser.add_argument("--smoke", action="store_true", help="a round of two rows, on embedded data")
    args = parser.parse_args()
    vars(args).update({"row": args.row or list(ROWS)} | (SMOKE if args.smoke else {}))
    if not (args.data or args.table):
        parser.error("the data are needed: --data FILE")
    return args


def benchmark() -> int:
    args = read_options()
    cells = load_cells(args.out)
    if not args.table:
        study(cells, args)
    draw(args.out.with_suffix(".png"), cells, args)
    print(table(cells, args))
    return 0


if __name__ == "__main__":
    run_command(benchmark)
