"""Compare the time of a round of simulated clients: server.py --simulate, a plain loop and other frameworks.

    python benchmarks/simulated_rounds.py --pfl-python PFL/bin/python --nvflare-python NVFLARE/bin/python
    python benchmarks/simulated_rounds.py --sides plain ours --clients 10 --repeats 1

All clients train in every round: LeNet, one local epoch of SGD with batch size 32, IID partitions. A round consists of
training, aggregation and the central test; the clients do not evaluate. The first round is not counted. With 10
clients, a run of 2 rounds is also measured from the command to its exit. Memory is the peak of the sum over all
processes of a side (proportional set size, twice a second). The sides, with the number of workers given by --workers:

- plain: peers/plain_loop.py, cifar.train in worker processes, the lower limit;
- pfl: pfl-research 0.6 in its own environment: pip install "pfl[pytorch]==0.6.*" tqdm;
- nvflare: NVFlare 2.9's simulator, only with 10 clients, in its own environment: pip install "nvflare==2.9.*" torch
  tqdm;
- ours: `python server.py --simulate N`, which chooses the number of workers itself.

Run it on an idle machine. On a busy one, Linux divides the cores among sessions (sched_autogroup_enabled), and torchrun
starts a session for each of its workers, which then get several times as much as the processes of the other sides.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from harness import FOLDER, ROOT, LaunchError, process_group, start

import cifar
from federation.launch.command import run_command

PEERS = Path(__file__).resolve().parent / "peers"
SIDES = ("plain", "pfl", "nvflare", "ours")
INSTALL = {"pfl": 'pip install "pfl[pytorch]==0.6.*" tqdm', "nvflare": 'pip install "nvflare==2.9.*" torch tqdm'}
ROUNDS = 3
WHOLE_CLIENTS, WHOLE_ROUNDS = 10, 2  # the run that is measured from its command to its exit
NVFLARE_CLIENTS = 10  # it takes 3 s per client and round, so it is not measured with more
BOUNDS = {10: 1.25, 100: 1.25, 1000: 1.6}  # seconds per round, ours over pfl's
WHOLE_BOUND = 1.4
MEMORY_BOUND = 3.0  # GB
SERVER_CONFIG = "fraction-evaluate=0 local-epochs=1 batch-size=32"

Case = tuple[int, int]  # clients and rounds


@dataclass
class Run:
    """One run of one side."""

    rounds: list[float]  # seconds of each round after the first
    whole: float  # seconds from the command to its exit
    accuracy: float  # of the final model, on the whole test set
    memory: float  # GB, the peak of the sum over all processes


def command(side: str, case: Case, out: Path, args: argparse.Namespace) -> list[str]:
    """Return the command line of a side."""
    clients, rounds = case
    where = ["--data", args.data, "--rounds", str(rounds), "--out", str(out)]
    if side == "ours":
        server = [sys.executable, str(ROOT / "server.py"), "--simulate", str(clients)]
        return [*server, "--run-config", SERVER_CONFIG, *where]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.workers)]
    program = {
        "plain": [sys.executable, str(PEERS / "plain_loop.py")],
        "pfl": [args.pfl_python, *torchrun, str(PEERS / "pfl_research.py")],
        "nvflare": [args.nvflare_python, str(PEERS / "nvflare_server.py")],
    }[side]
    return [*program, "--clients", str(clients), "--workers", str(args.workers), *where]


def measure(side: str, case: Case, args: argparse.Namespace) -> Run:
    """Run a side once. Raises LaunchError if it fails, or if not all clients trained in every round."""
    out = FOLDER / side
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = {} if side == "ours" else {"PYTHONPATH": f"{ROOT}{os.pathsep}{PEERS}"}
    with process_group(FOLDER / f"{side}.txt", environment, warm_starts=False) as processes:
        started = time.perf_counter()
        process = start(processes, *command(side, case, out, args))
        memory = watch(process)
        whole = time.perf_counter() - started
        if process.returncode:
            raise LaunchError(f"{side}: {processes.last_error()}")
    rounds = json.loads((out / "metrics.json").read_text("utf-8"))["rounds"][1:]
    if [row["clients"] for row in rounds] != [case[0]] * case[1]:
        raise LaunchError(f"{side}: not all of the {case[0]} clients trained in each of the {case[1]} rounds")
    return Run([row["seconds"] for row in rounds[1:]], whole, rounds[-1]["server_accuracy"], memory)


def watch(process: "subprocess.Popen[str]") -> float:
    """Wait until a process ends, and return the peak memory of it and its descendants together, in GB."""
    most = 0
    while process.poll() is None:
        most = max(most, memory_of(process.pid))
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    return most / 1e9


def memory_of(pid: int) -> int:
    """Return the proportional set size of a process and all of its descendants, in bytes."""
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended meanwhile
                total += process.memory_full_info().pss
    return total


def usable(side: str, python: str | None) -> bool:
    """Return whether a side's package is installed; print how to install it if not."""
    if python is None or subprocess.run([python, "-c", f"import {side}"], capture_output=True).returncode == 0:
        return True
    print(f"{side} is skipped: {python} cannot import it; run `{INSTALL[side]}` in a separate environment, "
          f"and pass --{side}-python PATH")  # fmt: skip
    return False


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show_header() -> None:
    print(f"{'clients':>7} {'rounds':>6}  {'side':8} {'s per round':>26} {'whole, s':>26} {'accuracy':>8} {'GB':>5}")


def show_runs(case: Case, side: str, runs: list[Run]) -> None:
    seconds = spread([value for run in runs for value in run.rounds], 2)
    whole = spread([run.whole for run in runs], 1)
    accuracy, memory = statistics.median(run.accuracy for run in runs), max(run.memory for run in runs)
    print(f"{case[0]:7} {case[1]:6}  {side:8} {seconds:>26} {whole:>26} {accuracy:8.4f} {memory:5.2f}", flush=True)


def show_ratios(case: Case, ours: list[Run], pfl: list[Run]) -> None:
    """Print the time of ours relative to pfl-research, of each repeat, with the bound."""
    clients, rounds = case
    if rounds == ROUNDS:
        what, bound = "seconds per round", BOUNDS.get(clients, "none")
        ratios = [statistics.median(a.rounds) / statistics.median(b.rounds) for a, b in zip(ours, pfl, strict=True)]
    else:
        what, bound = f"{rounds} rounds, from the command to its exit", WHOLE_BOUND
        ratios = [a.whole / b.whole for a, b in zip(ours, pfl, strict=True)]
    print(f"{clients} clients, {what}: ours / pfl {spread(ratios, 2)}, bound {bound}")


def show_summary(runs: dict[Case, dict[str, list[Run]]]) -> None:
    print("\nAll repeats: median (minimum to maximum), and peak memory")
    show_header()
    for case, sides in runs.items():
        for side, each in sides.items():
            show_runs(case, side, each)
    for case, sides in runs.items():
        if {"ours", "pfl"} <= sides.keys():
            show_ratios(case, sides["ours"], sides["pfl"])
    memory = [run.memory for sides in runs.values() for run in sides.get("ours", [])]
    if memory:
        print(f"Memory of ours: at most {max(memory):.2f} GB, bound {MEMORY_BOUND}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--clients", type=int, nargs="*", default=[*BOUNDS], metavar="N")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--no-whole", action="store_true", help="skip the run from command to exit")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="(all cores)")
    parser.add_argument("--pfl-python", default=sys.executable, metavar="PATH", help="has pfl-research")
    parser.add_argument("--nvflare-python", default=sys.executable, metavar="PATH", help="has NVFlare")
    return parser.parse_args()


def benchmark() -> int:
    args = read_options()
    args.data = cifar.find_data(args.data)
    cifar.load_data(args.data)  # decodes the images, so that no side has to
    pythons = {"pfl": args.pfl_python, "nvflare": args.nvflare_python}
    sides = [side for side in args.sides if usable(side, pythons.get(side))]
    cases = [(clients, ROUNDS) for clients in args.clients]
    cases += [] if args.no_whole else [(WHOLE_CLIENTS, WHOLE_ROUNDS)]
    runs: dict[Case, dict[str, list[Run]]] = {case: {} for case in cases}
    show_header()
    for _ in range(args.repeats):
        for case, side in itertools.product(cases, sides):
            if side != "nvflare" or case == (NVFLARE_CLIENTS, ROUNDS):
                runs[case].setdefault(side, []).append(measure(side, case, args))
                show_runs(case, side, runs[case][side][-1:])
    show_summary(runs)
    return 0


if __name__ == "__main__":
    run_command(benchmark)
