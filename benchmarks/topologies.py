"""Compare who averages with whom: accuracy and consensus distance by topology and partition, mean ± deviation of seeds.

    python benchmarks/topologies.py                      # continues if it was interrupted; see --help

Every fifth image of CIFAR-10 (small_cifar.py), 10 clients, all in each of 20 rounds, one local epoch of cifar.py's SGD
with a learning rate of 0.02. "random" has three neighbours per client. The server's accuracy is that of the mean of all
models ("star": of the global model) on the whole test set; the clients' is of their own models, each after it has
averaged with its neighbours, on its own part of the test set. The bytes are those of a message to a client.
"""

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cells import load_cells, save_cells
from benchmarks.in_process import options, play, some_of
from federation.app.config import Settings

TOPOLOGIES = ("star", "full", "random", "ring")
COLOURS = dict(zip(TOPOLOGIES, ("#000000", "#0072b2", "#009e73", "#d55e00"), strict=True))  # Okabe and Ito 2008
PARTITIONS: dict[str, Settings] = {
    "IID": {"partitioner": "iid"},
    "Dirichlet 0.5": {"partitioner": "dirichlet", "alpha": 0.5},
}
COMMON: Settings = {"task": "benchmarks.small_cifar", "learning-rate": 0.02, "num-clients": 10, "neighbours": 3}
ROUNDS = 20
MEASURED = ("server_accuracy", "clients_accuracy", "consensus", "bytes_down")  # of a round
DRAWN = {"server_accuracy": "accuracy of the mean of all models", "consensus": "consensus distance"}
Cells = dict[str, Any]  # by partition, topology and seed: lists with a value per round


def play_all(path: Path, seeds: int, rounds: int, data: str) -> Cells:
    """Return all cells; run those that are not in the file at `path` yet."""
    cells = load_cells(path)
    for seed in range(seeds):
        for partition, settings in PARTITIONS.items():
            for topology in TOPOLOGIES:
                key = f"{partition}, {topology}, {seed}"
                if len(cells.get(key, {}).get("consensus", ())) != rounds + 1:
                    own = {"topology": topology, "seed": seed, "num-server-rounds": rounds, "data": data}
                    found = play({**COMMON, **settings, **own})
                    cells[key] = {name: [row.get(name) for row in found["rounds"]] for name in MEASURED}
                    save_cells(path, cells)
                    print(f"{key}: {cells[key]['server_accuracy'][-1]:.4f}", flush=True)
    return cells


def values(cells: Cells, partition: str, topology: str, name: str, round_: int, seeds: int) -> list[float]:
    """Return what a measure was in a round, one value for each seed."""
    return [cells[f"{partition}, {topology}, {seed}"][name][round_] for seed in range(seeds)]


def table(cells: Cells, seeds: int, shown: list[int]) -> str:
    """Return a Markdown table: a row for each partition and topology, and columns for some of the rounds."""
    heads = [*(f"accuracy, round {number}" for number in shown), f"clients', round {shown[-1]}"]
    heads += [f"consensus, round {number}" for number in shown]
    lines = [f"| partition | topology | {' | '.join(heads)} | MB per message |", f"|{'---|' * (len(heads) + 3)}"]
    for partition in PARTITIONS:
        for topology in TOPOLOGIES:
            columns = [("server_accuracy", number) for number in shown] + [("clients_accuracy", shown[-1])]
            found = [values(cells, partition, topology, *column, seeds) for column in columns]
            row = [f"{100 * mean(each):.1f} ± {100 * spread(each):.1f}" for each in found]
            apart = [values(cells, partition, topology, "consensus", number, seeds) for number in shown]
            row += ["–" if None in each else f"{mean(each):.2f} ± {spread(each):.2f}" for each in apart]
            megabytes = mean(values(cells, partition, topology, "bytes_down", shown[-1], seeds)) / 1e6 / 20
            lines.append(f"| {partition} | {topology} | {' | '.join(row)} | {megabytes:.2f} |")
    return "\n".join(lines)


def spread(found: list[float]) -> float:
    return stdev(found) if len(found) > 1 else 0.0


def draw(cells: Cells, seeds: int, rounds: int, path: Path) -> None:
    """Draw the accuracy of the mean model and the consensus distance against rounds: means, and lowest to highest."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for row, partition in zip(figure.subplots(2, 2, sharex=True, sharey="col"), PARTITIONS, strict=True):
        for axes, (name, label) in zip(row, DRAWN.items(), strict=True):
            drawn = {topology: columns(cells, partition, topology, name, rounds, seeds) for topology in TOPOLOGIES}
            for topology, found in drawn.items():
                if found:
                    style = {"color": COLOURS[topology], "label": topology}
                    line = [mean(each) for each in found.values()]
                    axes.plot(list(found), line, ls="--" if topology == "star" else "-", **style)
                    low, high = map(min, found.values()), map(max, found.values())
                    axes.fill_between(list(found), list(low), list(high), color=COLOURS[topology], alpha=0.12, lw=0)
            axes.set(title=partition, ylabel=label, xlabel="round")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def columns(cells: Cells, partition: str, topology: str, name: str, rounds: int, seeds: int) -> dict[int, list[float]]:
    """Return the values of all seeds by round, for the rounds that have some."""
    found = {number: values(cells, partition, topology, name, number, seeds) for number in range(rounds + 1)}
    return {number: each for number, each in found.items() if None not in each}


def main() -> None:
    parser = options(__doc__, "topologies")
    parser.add_argument("--picture", type=Path, default=Path("docs/topologies.png"), metavar="FILE")
    args = parser.parse_args()
    rounds = args.rounds or ROUNDS
    cells = play_all(args.out, args.seeds, rounds, args.data)
    print(table(cells, args.seeds, some_of(rounds)))
    draw(cells, args.seeds, rounds, args.picture)


if __name__ == "__main__":
    main()
