"""Reproduce a published table for the network of cifar.py: that of Flower's baseline `niid_bench`.

    python benchmarks/niid_bench.py                      # continues if it was interrupted; see --help
    python benchmarks/niid_bench.py --table              # only the table, of the rounds that are there

The setting is that of NIID-Bench (Li et al. 2022, section V), as implemented in Flower's baseline: 10 clients, all of
them in each of 50 rounds of 10 local epochs, batch size 64, SGD with lr 0.01, momentum 0.9 and weight decay 1e-5,
pixels in 0..1, random crops after reflection padding of 4 pixels, and random flips. The result is the best accuracy
over the rounds. niid_task.py is the task.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.in_process import play_in
from federation.launch.command import run_command

RUNS = {  # with the published accuracy in percent: mean ± standard deviation, or one run
    ("iid", "fedavg"): "71.32 ± 0.33",
    ("dirichlet", "fedavg"): "62.47 ± 0.43",
    ("pathological", "fedavg"): "51.17 ± 1.09",
    ("dirichlet", "fedprox"): "65.63",
    ("dirichlet", "scaffold"): "68.08",
}


def benchmark() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", default="", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--partitioner", choices=sorted({one for one, _ in RUNS}), help="(default: all in turn)")
    parser.add_argument("--strategy", choices=sorted({one for _, one in RUNS}), help="(default: all in turn)")
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="1 or more")
    parser.add_argument("--clients", type=int, default=10, metavar="N")
    parser.add_argument("--local-epochs", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/niid_bench"), metavar="DIR")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="(default: all cores)")
    parser.add_argument("--table", action="store_true", help="only show what has been found so far")
    args = parser.parse_args()
    for case in [] if args.table else chosen(args):
        run(*case, args)
    print(table(args))
    return 0


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the partitioner and the strategy of each run that the options leave."""
    return [
        (partitioner, strategy)
        for partitioner, strategy in RUNS
        if args.partitioner in (None, partitioner) and args.strategy in (None, strategy)
    ]


def folder(partitioner: str, strategy: str, args: argparse.Namespace) -> Path:
    return Path(args.out / f"{partitioner}-{strategy}-{args.seed}")


def run(partitioner: str, strategy: str, args: argparse.Namespace) -> None:
    """Run or resume a federation."""
    out, processes = folder(partitioner, strategy, args), min(args.processes, args.clients)
    config = {
        "task": "benchmarks.niid_task", "partitioner": partitioner, "strategy": strategy, "data": args.data,
        "num-clients": args.clients, "num-server-rounds": args.rounds, "local-epochs": args.local_epochs,
        "batch-size": 64, "learning-rate": 0.01, "fraction-evaluate": 0.0, "seed": args.seed,
    }  # fmt: skip
    print(f"{partitioner}, {strategy}", flush=True)
    if play_in(out, config, processes=processes, shown=True)["status"] != "finished":
        raise OSError(f"the run in {out} has failed")


def rounds_of(out: Path) -> list[dict[str, float]]:
    """Return the metrics of the rounds in a run folder, from round 0; none if the run has not begun."""
    file = out / "metrics.json"
    return list(json.loads(file.read_text("utf-8"))["rounds"]) if file.exists() else []


def table(args: argparse.Namespace) -> str:
    """Return a table in Markdown of the runs that have begun."""
    rows = ["| partitions | strategy | rounds | best accuracy, % | in round | published, % |", "|---" * 6 + "|"]
    found = ((case, rounds_of(folder(*case, args))) for case in chosen(args))
    rows += [row(*case, rounds) for case, rounds in found if rounds]
    return "\n".join(rows)


def row(partitioner: str, strategy: str, rounds: list[dict[str, float]]) -> str:
    """Return a line that compares the best round so far with the published figure."""
    best = max(rounds, key=lambda one: one["server_accuracy"])
    figures = f"{len(rounds) - 1} | {100 * best['server_accuracy']:.2f} | {best['round']}"
    return f"| {partitioner} | {strategy} | {figures} | {RUNS[partitioner, strategy]} |"


if __name__ == "__main__":
    run_command(benchmark)
