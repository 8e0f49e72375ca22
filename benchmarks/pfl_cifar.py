"""Compare with pfl-research on its own benchmark: CIFAR-10, IID (Granqvist et al. 2024, arXiv 2404.06430).

    python benchmarks/pfl_cifar.py --pfl-python PFL/bin/python     # continues if it was interrupted; see --help
    python benchmarks/pfl_cifar.py --pfl-python PFL/bin/python --clock 4

1,000 users with 50 images each, 50 of which train in each of 1,500 rounds: one local epoch of plain SGD with batches of
10 and a learning rate of 0.1, and the mean of their models. Network and images are those of pfl_task.py on both sides:
"ours", this project's server and client in one process, and "theirs", pfl-research 0.6 (peers/pfl_cifar.py), in its own
environment: pip install "pfl[pytorch]==0.6.*" tqdm. They take turns of 100 rounds, on one thread each. The model is
tested after every tenth round, as in the benchmark.

With --clock, they are timed instead: a round of `python server.py --simulate 1000` and of theirs, without tests, in
turns. The first round of a run is not counted. To give both the same, confine this to one core (taskset -c 0).
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import psutil

from benchmarks import pfl_task
from benchmarks.cells import FOLDER, load_cells, save_cells
from benchmarks.harness import ROOT, LaunchError, federate, process_group, relay
from benchmarks.in_process import cpu_seconds, play_in
from federation.app import weights
from federation.app.checkpoint import load_checkpoint
from federation.app.config import Settings
from federation.app.run_folder import write_atomically
from federation.launch.command import run_command

PEERS = ROOT / "benchmarks" / "peers"
USERS, COHORT, ROUNDS, EVERY, TURN = 1_000, 50, 1_500, 10, 100
CONFIG: Settings = {
    "clients-per-round": COHORT, "batch-size": 10, "local-epochs": 1, "learning-rate": 0.1,
    "fraction-evaluate": 0.0, "server-evaluation": False,
}  # fmt: skip
COLOURS = {"ours": "#0072b2", "theirs": "#e69f00"}  # Okabe and Ito 2008
SMOKE = {"data": "embedded", "rounds": 2, "sides": ["ours"]}
Cells = dict[str, Any]  # by side: accuracies by round, rounds and seconds of CPU; and what --clock found


def study(cells: Cells, args: argparse.Namespace) -> None:
    """Let the sides take turns, from where they are."""
    for until in [*range(TURN, args.rounds, TURN), args.rounds]:
        for side in args.sides:
            if cells.get(side, {"rounds": 0})["rounds"] < until:
                {"ours": ours, "theirs": theirs}[side](cells, args, until)


def ours(cells: Cells, args: argparse.Namespace, until: int) -> None:
    """Continue this project's run up to the round `until`, and test its model after every tenth."""
    folder, config = args.out.with_suffix("") / "ours", {"task": "benchmarks.pfl_task", "num-clients": args.users}
    cell = cells.setdefault("ours", {"accuracies": {}, "rounds": 0, "cpu_seconds": 0.0})
    while cell["rounds"] < until:
        started, wanted = cpu_seconds(), min(until, cell["rounds"] + EVERY)
        settings = CONFIG | config | {"data": args.data, "num-server-rounds": wanted}
        metrics = play_in(folder, settings, processes=args.processes)
        if metrics["status"] != "finished":
            raise LaunchError(f"the run in {folder} has failed")
        cell["rounds"] = len(metrics["rounds"]) - 1
        cell["accuracies"][str(cell["rounds"])] = tested(folder, args.data)
        note(cells, "ours", args, cpu_seconds() - started)


def tested(folder: Path, data: str) -> float:
    """Return the accuracy of the model in a run folder."""
    net = pfl_task.Net()
    weights.to_net(load_checkpoint(folder)[1]["arrays"], net)
    return pfl_task.test(net, pfl_task.load_data(data or None)[1])[1]


def theirs(cells: Cells, args: argparse.Namespace, until: int) -> None:
    """Continue pfl-research's run up to the round `until`."""
    cell = cells.setdefault("theirs", {"accuracies": {}, "rounds": 0, "cpu_seconds": 0.0})
    rounds, cpu_seconds = run_peer(args.out.with_suffix("") / "theirs", args, until)
    cell["rounds"] = len(rounds) - 1
    found = {str(row["round"]): row["server_accuracy"] for row in rounds}
    cell["accuracies"] = {number: accuracy for number, accuracy in found.items() if accuracy is not None}
    note(cells, "theirs", args, cpu_seconds)


def run_peer(folder: Path, args: argparse.Namespace, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Run pfl-research up to a round; return all rounds, and the seconds of CPU. Raises LaunchError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{PEERS}", "OMP_NUM_THREADS": "1"}
    options = {"data": args.data or pfl_task.find_data(), "out": folder.absolute(), "clients": args.users}
    options |= {"rounds": rounds, "workers": 1}
    command = [args.pfl_python, str(PEERS / "pfl_cifar.py")]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    before = children_seconds()
    with process_group(folder / "log.txt", environment, warm_starts=False) as processes:
        process = processes.start(*command)
        relay(process, processes.log)
        if process.wait():
            raise LaunchError(f"pfl-research: {processes.last_error()}")
    return list(load_cells(folder / "metrics.json")["rounds"]), children_seconds() - before


def children_seconds() -> float:
    """Return the seconds of CPU of all child processes that have ended."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def note(cells: Cells, side: str, args: argparse.Namespace, cpu_seconds: float) -> None:
    cell = cells[side]
    cell["cpu_seconds"] = round(cell["cpu_seconds"] + cpu_seconds, 1)
    save_cells(args.out, cells)
    last = list(cell["accuracies"].values())[-1:]
    print(f"{side}: round {cell['rounds']}, {100 * sum(last):.2f} %, {cell['cpu_seconds']:.0f} s of CPU", flush=True)


# ----------------------------------------------------------------------------------------------------------- the clock


def clock(cells: Cells, args: argparse.Namespace) -> None:
    """Time a few rounds of both sides in turns, without tests."""
    config = " ".join(f"{key}={value}".lower() for key, value in CONFIG.items())
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(args.repeats):
        simulated, _ = federate(
            "--simulate", str(args.users), "--task", "benchmarks.pfl_task", "--rounds", str(args.clock),
            "--run-config", config, *(["--data", args.data] if args.data else []),
        )  # fmt: skip
        folder = args.out.with_suffix("") / f"clock-{repeat}"
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        rounds = {"ours": simulated["rounds"], "theirs": run_peer(folder, args, args.clock)[0]}
        for side, seconds in found.items():
            seconds.append(statistics.median(row["seconds"] for row in rounds[side][2:]))
            print(f"{side}: {seconds[-1]:.2f} s per round", flush=True)
    cells["clock"] = found
    save_cells(args.out, cells)


# --------------------------------------------------------------------------------------------------- what it has found


def table(cells: Cells) -> str:
    """Return a table in Markdown of both sides as far as they are."""
    rows = ["| | rounds | accuracy, % | best, % | CPU seconds per round | simulated, seconds per round |"]
    rows += ["|---" * 6 + "|"]
    for side, name in {"ours": "this project", "theirs": "pfl-research"}.items():
        if cell := cells.get(side):
            percent = [100 * value for value in cell["accuracies"].values()] or [0.0]
            timed = sorted(cells.get("clock", {}).get(side, []))
            span = f"{statistics.median(timed):.2f} ({timed[0]:.2f} to {timed[-1]:.2f})" if timed else "-"
            cpu = cell["cpu_seconds"] / max(1, cell["rounds"])
            rows.append(f"| {name} | {cell['rounds']} | {percent[-1]:.2f} | {max(percent):.2f} | {cpu:.2f} | {span} |")
    return "\n".join(rows)


def draw(path: Path, cells: Cells) -> None:
    """Draw both accuracies against the rounds."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    for side, name in {"ours": "this project", "theirs": "pfl-research 0.6"}.items():
        found = cells.get(side, {"accuracies": {}})["accuracies"]
        percent = [100 * value for value in found.values()]
        panel.plot([int(number) for number in found], percent, color=COLOURS[side], label=name, linewidth=1.2)
    panel.set(xlabel="round", ylabel="test accuracy, %", title="CIFAR-10, 50 of 1,000 users in each round")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, loc="lower right")
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=120))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", default="", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--users", type=int, default=USERS, metavar="N")
    parser.add_argument("--sides", nargs="+", choices=COLOURS, default=[*COLOURS])
    parser.add_argument("--pfl-python", default=sys.executable, metavar="PATH", help="has pfl-research")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="for the clients (default: this one)")
    parser.add_argument("--out", type=Path, default=FOLDER / "pfl_cifar.json", metavar="FILE")
    parser.add_argument("--clock", type=int, metavar="N", help="time N rounds (3 or more) of both instead")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of --clock")
    parser.add_argument("--table", action="store_true", help="only show what has been found so far")
    parser.add_argument("--smoke", action="store_true", help="two rounds of ours, on embedded data")
    args = parser.parse_args()
    vars(args).update(SMOKE if args.smoke else {})
    return args


def benchmark() -> int:
    args = read_options()
    cells = load_cells(args.out)
    if not args.table:
        (clock if args.clock else study)(cells, args)
    draw(args.out.with_suffix(".png"), cells)
    print(table(cells))
    return 0


if __name__ == "__main__":
    run_command(benchmark)
