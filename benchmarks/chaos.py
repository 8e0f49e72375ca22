"""Two hundred rounds with ten clients that fail all the time: does the run end, how well, and does memory stay flat?

    python benchmarks/chaos.py --data DIR

A task of its own: the network of cifar.py, on a few of its samples. One training in ten goes wrong: the client is
killed, raises an error, or returns weights or a loss that are not finite. The same run without faults is the yardstick.
Prints accuracy, what was dropped, and the memory of the server and of all simulated clients in the course of the run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
from cifar import Data, Net, find_data, test

__all__ = ["Net", "find_data", "load_data", "test", "train"]

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 5_000, 2_000  # for training and testing: ten clients hold 500 and 200 each
FAULTS = 0.1  # the share of the trainings that go wrong
SWITCH = "CHAOS_FAULTS"  # the environment variable that says so to the clients' processes


def load_data(root: str | None) -> tuple[Data, Data]:
    """Return the first few samples of what cifar.py reads: its files come in no order of classes."""
    splits = cifar.load_data(root)
    order = [
        torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:most]
        for (_, y), most in zip(splits, SAMPLES, strict=True)
    ]
    (train_data, test_data) = ((x[rows], y[rows]) for (x, y), rows in zip(splits, order, strict=True))
    return train_data, test_data


def train(net: Any, data: Data, *, epochs: int, lr: float = 0.01, batch_size: int = 32, seed: int = 0) -> float:
    """Train as cifar.py does, unless something goes wrong."""
    dice = random.Random(f"{seed} {time.time_ns()}")  # or a round that is tried again would go wrong again
    fault = dice.choice(("kill", "raise", "nan", "loss")) if dice.random() < float(os.environ.get(SWITCH, 0)) else ""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise RuntimeError("a fault on purpose")
    loss = cifar.train(net, data, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    if fault == "nan":
        with torch.no_grad():
            next(net.parameters()).view(-1)[0] = torch.nan
    return float("nan") if fault == "loss" else loss


# ------------------------------------------------------------------------------------------------------ measurement


def run(faults: float, args: argparse.Namespace) -> dict[str, Any]:
    """Run one federation, and return what it reports and how much memory its processes took."""
    out = args.out / ("faults" if faults else "none")
    command = [sys.executable, str(ROOT / "server.py"), "--task", "benchmarks.chaos", "--simulate", str(args.clients)]
    command += ["--rounds", str(args.rounds), "--out", str(out), "--data", args.data]
    command += ["--run-config", "min-clients=5 retries=5 learning-rate=0.01"]
    server = subprocess.Popen(command, env=os.environ | {SWITCH: str(faults)}, cwd=ROOT)
    memory = list(watch(server, out / "metrics.json"))
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    return {"status": server.returncode, "rounds": metrics["rounds"], "memory": memory}


def watch(server: "subprocess.Popen[bytes]", metrics: Path) -> Iterator[tuple[int, float, float]]:
    """Yield the round, and the memory in MiB of the ServerApp and of all simulated clients, again and again."""
    while server.poll() is None:
        time.sleep(5)
        sizes = {"flwr-serverapp": 0.0, "ray::": 0.0}
        for process in psutil.process_iter(["cmdline", "memory_full_info"]):
            command = " ".join(process.info["cmdline"] or ())
            for name in sizes:
                if name in command and process.info["memory_full_info"]:
                    sizes[name] += process.info["memory_full_info"].uss / 2**20
        text = metrics.read_text("utf-8") if metrics.exists() else ""
        yield text.count('"train_loss"') - 1, sizes["flwr-serverapp"], sizes["ray::"]


def report(name: str, result: dict[str, Any]) -> None:
    """Print one line: the run, its accuracy at the end, its faults, and memory early and late."""
    rounds = result["rounds"]
    last = [row["server_accuracy"] for row in rounds[-10:]]
    dropped = sum(row["dropped"] or 0 for row in rounds)
    fewest = min(row["clients"] for row in rounds[1:])
    cells = [
        f"{name:10}",
        f"status {result['status']}",
        f"{len(rounds) - 1} rounds",
        f"accuracy {sum(last) / len(last):.3f}",
    ]
    cells += [
        f"(last ten: {min(last):.3f} to {max(last):.3f})",
        f"{dropped} replies dropped",
        f"{fewest} clients at least",
    ]
    print("  ".join(cells))
    for start, end in ((0.1, 0.2), (0.45, 0.55), (0.9, 1.0)):
        some = [m for m in result["memory"] if start * len(rounds) <= m[0] <= end * len(rounds)]
        server, clients = (sorted(m[i] for m in some)[len(some) // 2] if some else float("nan") for i in (1, 2))
        span = f"rounds {start * len(rounds):.0f} to {end * len(rounds):.0f}"
        print(f"  {span}: server {server:.0f} MiB, clients {clients:.0f} MiB")


def main() -> None:
    """Run both federations, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="embedded", metavar="DIR", help="the data folder, as in cifar.py")
    parser.add_argument("--clients", type=int, default=10, metavar="N")
    parser.add_argument("--rounds", type=int, default=200, metavar="N")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "chaos", metavar="DIR")
    args = parser.parse_args()
    for faults, name in ((FAULTS, "faults"), (0.0, "no faults")):
        report(name, run(faults, args))


if __name__ == "__main__":
    main()
