"""Compare the time of a whole run in three terminals with that of an earlier version of this project.

    git worktree add ../earlier 2bd5bd7
    python benchmarks/whole_run.py --baseline ../earlier [--data DIR] [--rounds 3] [--repeats 3]

A run is `python server.py` and `python client.py` twice, started together, from the first command to the last exit. The
two versions alternate, in the same environment, and must end with the same weights. Bound: this version takes at most
0.45 times as long.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
from benchmarks.harness import FOLDER, ROOT, LaunchError, free_port, programs, wait_for
from federation.launch.command import run_command

CLIENTS = 2
BOUND = 0.45


def run(checkout: Path, data: str, rounds: int) -> tuple[float, str]:
    """Run the server and the clients of a checkout; return the seconds and the SHA-256 of the final weights."""
    address, out = f"127.0.0.1:{free_port()}", FOLDER / "whole"
    shutil.rmtree(out, ignore_errors=True)
    server = ["--address", address, "--data", data, "--rounds", str(rounds), "--out", str(out)]
    client = [str(checkout / "client.py"), "--server", address]
    started = time.perf_counter()
    with programs([str(checkout / "server.py"), *server], *[client] * CLIENTS) as processes:
        wait_for(processes)
        seconds = time.perf_counter() - started
    return seconds, json.loads((out / "metrics.json").read_text("utf-8"))["final_weights_sha256"]


def command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="a checkout of the other version")
    parser.add_argument("--data", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    args = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)  # each checkout imports its own files
    data, seconds, digests = cifar.find_data(args.data), {"baseline": [], "ours": []}, set()
    cifar.load_data(data)  # so that neither version has to decode them
    for _ in range(args.repeats):
        for name, checkout in (("baseline", args.baseline.resolve()), ("ours", ROOT)):
            taken, digest = run(checkout, data, args.rounds)
            print(f"{name:8} {taken:6.1f} s  {digest}", flush=True)
            seconds[name].append(taken)
            digests.add(digest)
    if len(digests) > 1:
        raise LaunchError(f"the runs ended with different weights: {', '.join(sorted(digests))}")
    ratios = [own / other for own, other in zip(seconds["ours"], seconds["baseline"], strict=True)]
    print(f"ours / baseline: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
          f"bound: at most {BOUND}")  # fmt: skip
    return 0


if __name__ == "__main__":
    run_command(command)
