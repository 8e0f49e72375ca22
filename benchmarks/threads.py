"""Measure how threads slow down clients on one machine: samples per second of cifar.train in parallel processes.

    python benchmarks/threads.py [--data DIR] [--repeats 3]
    python benchmarks/threads.py --data DIR --federated [--rounds 3]

- alone: one process with one thread;
- one each: two processes with one thread each, like two clients on two cores;
- default: two processes, each with as many threads as torch starts by default.

With --federated, the single process is compared with real clients, `python server.py` and `python client.py` twice, by
the samples per second that the clients print, which include opening the data. Bound: at least 0.9 of the single
process. Of two processes the slower one counts, since a round waits for it. Each process is new, like a client's, and
trains for an epoch on half of the training set.
"""

import argparse
import os
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
from benchmarks.harness import LaunchError, federate, programs, wait_for
from federation.launch.command import run_command

CLIENTS = 2
BOUND = 0.9
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
WAYS = {"alone": (1, ONE_THREAD), "one each": (CLIENTS, ONE_THREAD), "default": (CLIENTS, {})}
READY = "ready\n"
LINE = re.compile(r"round \d+: trained on ([\d,]+) samples, loss .*, ([\d.]+) s")


def worker(data: str) -> None:
    """Prepare to train, wait for a line, train, and print the samples per second."""
    images, labels = cifar.load_data(data)[0]
    half = len(labels) // CLIENTS
    samples = images[:half].clone(), labels[:half].clone()
    print(READY, end="", flush=True)
    if sys.stdin.readline():
        started = time.perf_counter()
        cifar.train(cifar.Net(), samples, epochs=1)
        print(half / (time.perf_counter() - started))


def measure(data: str, processes: int, **environment: str) -> float:
    """Return the samples per second of the slowest of `processes` workers that train in parallel."""
    command = [__file__, "--worker", "--data", data]
    with programs(*[command] * processes, **environment) as workers:
        if all(READY in worker.stdout for worker in workers):
            for worker in workers:
                worker.stdin.write("go\n")
                worker.stdin.flush()
        return min(float(output.split()[-1]) for output in wait_for(workers))


def side_by_side(data: str, repeats: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, (processes, environment) in WAYS.items():
            rates[name].append(measure(data, processes, **environment))
    for name, each in rates.items():
        ratios = [rate / alone for rate, alone in zip(each, rates["alone"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} of alone ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:9} {statistics.median(each):8,.0f} samples/s per process, {spread}")


def federated(data: str, rounds: int) -> None:
    alone = measure(data, 1, **ONE_THREAD)
    print(f"{'alone':9} {alone:8,.0f} samples/s", flush=True)
    _, lines = federate("--data", data, "--rounds", str(rounds), clients=CLIENTS)
    rates = [int(match[1].replace(",", "")) / float(match[2]) for line in lines if (match := LINE.match(line))]
    if not rates:
        raise LaunchError("no client printed that it had trained")
    each = " ".join(f"{rate:,.0f}" for rate in rates)
    print(f"{'clients':9} {statistics.median(rates):8,.0f} samples/s, the median of {each}")
    ratio, least = statistics.median(rates) / alone, min(rates) / alone
    print(f"clients / alone: {ratio:.2f}, the slowest {least:.2f} (bound: at least {BOUND})")


def command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--federated", action="store_true", help="compare with real clients")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="with --federated")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.data)
        return 0
    os.environ.pop("OMP_NUM_THREADS", None)  # otherwise it would replace torch's default
    data = cifar.find_data(args.data)
    samples = len(cifar.load_data(data)[0][1])
    print(f"{data}: {samples // CLIENTS:,} samples per process, {os.cpu_count()} cores", flush=True)
    federated(data, args.rounds) if args.federated else side_by_side(data, args.repeats)
    return 0


if __name__ == "__main__":
    run_command(command)
