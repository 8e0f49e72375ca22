"""One run of one system that federates the training of cifar.py: how it is started, and what is measured of it."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import FOLDER, ROOT, LaunchError, federate, process_group, run_app, start

PEERS = Path(__file__).resolve().parent / "peers"
QUICKSTART = PEERS.with_name("quickstart")
SIDES = ("plain", "pfl", "nvflare", "quickstart", "simulated", "terminals")
MOST = {"nvflare": 10, "quickstart": 100}  # clients: they take seconds, or tenths of one, for each message
TERMINALS = 2
SERVER_CONFIG = "fraction-evaluate=0 local-epochs=1 batch-size=32"
QUICKSTART_CONFIG = {  # what cifar.py and SERVER_CONFIG are set to
    "local-epochs": 1, "batch-size": 32, "learning-rate": 0.007, "weight-decay": 5e-4,
    "train-share": 1.0, "fraction-evaluate": 0.0,
}  # fmt: skip
LOOK = 0.5  # seconds between two looks at the memory

Case = tuple[int, int]  # clients and rounds
Rounds = list[dict[str, Any]]  # "clients", "seconds" and "server_accuracy" of each, without round 0


@dataclass
class Run:
    """What is measured of a run."""

    rounds: list[float]  # seconds of each round after the first
    whole: float  # seconds from the command to its exit
    accuracy: float  # of the final model, on the whole test set
    memory: float  # GB, the peak of the sum over all processes


def measure(side: str, case: Case, args: argparse.Namespace) -> Run:
    """Run a side once. Raises LaunchError if it fails, or if not all clients trained in every round."""
    clients, count = case
    with peak_memory() as memory:
        started = time.perf_counter()
        rounds = play(side, case, args)
        whole = time.perf_counter() - started
    if [row["clients"] for row in rounds] != [clients] * count:
        raise LaunchError(f"{side}: not all of the {clients} clients trained in each of the {count} rounds")
    return Run([row["seconds"] for row in rounds[1:]], whole, rounds[-1]["server_accuracy"], memory[0] / 1e9)


def play(side: str, case: Case, args: argparse.Namespace) -> Rounds:
    """Run a side, and return its rounds."""
    clients, rounds = case
    options = ["--data", args.data, "--rounds", str(rounds), "--run-config", SERVER_CONFIG]
    if side == "simulated":
        return list(federate("--simulate", str(clients), *options)[0]["rounds"][1:])
    if side == "terminals":
        return list(federate(*options, clients=clients, terminals=min(clients, TERMINALS))[0]["rounds"][1:])
    return quickstart(case, args) if side == "quickstart" else peer(side, case, args)


def quickstart(case: Case, args: argparse.Namespace) -> Rounds:
    clients, rounds = case
    own = {"data": args.data, "num-server-rounds": rounds, "min-nodes": clients}
    result, _ = run_app(QUICKSTART, QUICKSTART_CONFIG | own, simulate=clients)
    pairs = zip(result["clients"], result["seconds"], strict=True)
    return [{"clients": n, "seconds": seconds, "server_accuracy": result["accuracy"]} for n, seconds in pairs]


def peer(side: str, case: Case, args: argparse.Namespace) -> Rounds:
    """Run a program in peers/."""
    out = FOLDER / side
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{PEERS}"}
    with process_group(FOLDER / f"{side}.txt", environment, warm_starts=False) as processes:
        if start(processes, *peer_command(side, case, out, args)).wait():
            raise LaunchError(f"{side}: {processes.last_error()}")
    return list(json.loads((out / "metrics.json").read_text("utf-8"))["rounds"][1:])


def peer_command(side: str, case: Case, out: Path, args: argparse.Namespace) -> list[str]:
    clients, rounds = case
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.workers)]
    program = {
        "plain": [sys.executable, str(PEERS / "plain_loop.py")],
        "pfl": [args.pfl_python, *torchrun, str(PEERS / "pfl_research.py")],
        "nvflare": [args.nvflare_python, str(PEERS / "nvflare_server.py")],
    }[side]
    where = ["--data", args.data, "--rounds", str(rounds), "--out", str(out)]
    return [*program, "--clients", str(clients), "--workers", str(args.workers), *where]


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Watch the memory of all processes that are started in the context; yield a list with the peak of the sum."""
    most, ended = [0], Event()

    def watch() -> None:
        while not ended.wait(LOOK):
            most[0] = max(most[0], memory_of_children())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def memory_of_children() -> int:
    """Return the proportional set size of all descendants of this process, in bytes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            total += process.memory_full_info().pss
    return total
