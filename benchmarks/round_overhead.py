"""Measure the overhead of a round in terminals: the time beyond the clients' own work.

    python benchmarks/round_overhead.py [--data DIR] [--rounds 4] [--clients 2] [--repeats 1]

- ours: `python server.py` and `python client.py` twice. The overhead is the time of a round minus the work of its
  slowest client, which starts when the client has imported its modules; the server's own test is overhead;
- idle: the app in idle_app/, whose clients import torch, do nothing and send the same amount of data back, with
  Flower's own SuperLink, SuperNodes and loop: no proxy, no fork server. All of its time is overhead.

Round 1, in which the server waits for its clients, is left out. Bound: ours takes at most 0.3 times as long.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import federate, run_app
from federation.launch.command import run_command

IDLE_APP = Path(__file__).resolve().parent / "idle_app"
BOUND = 0.3


def ours(data: str, rounds: int, clients: int) -> list[float]:
    metrics, _ = federate("--data", data, "--rounds", str(rounds), clients=clients)
    return [row["seconds"] - row["client_seconds"] for row in metrics["rounds"] if row["round"] > 1]


def idle(rounds: int, clients: int) -> list[float]:
    result, _ = run_app(IDLE_APP, {"num-server-rounds": rounds, "num-clients": clients}, supernodes=clients)
    return result["seconds"][1:]


def show(name: str, seconds: list[float]) -> None:
    median, each = statistics.median(seconds), " ".join(f"{second:.2f}" for second in seconds)
    print(f"{name:5} {median:6.2f} s per round, the median of {each}", flush=True)


def command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="embedded", metavar="DIR", help="as in cifar.py (default: embedded)")
    parser.add_argument("--rounds", type=int, default=4, metavar="R")
    parser.add_argument("--clients", type=int, default=2, metavar="N")
    parser.add_argument("--repeats", type=int, default=1, metavar="N")
    args = parser.parse_args()
    own, other = [], []
    for _ in range(args.repeats):
        own += ours(args.data, args.rounds, args.clients)
        show("ours", own)
        other += idle(args.rounds, args.clients)
        show("idle", other)
    ratio = statistics.median(own) / statistics.median(other)
    print(f"ours / idle: {ratio:.2f} (bound: at most {BOUND})")
    return 0


if __name__ == "__main__":
    run_command(command)
