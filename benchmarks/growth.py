"""Measure how the cost of a run grows with its clients, its sites, its model and its rounds.

    python benchmarks/growth.py clients --data DIR       # 10 to 10,000 simulated clients
    python benchmarks/growth.py sites                    # 10, 25 and 40 SuperNodes on this machine
    python benchmarks/growth.py models --baseline DIR    # 62 thousand to 25 million parameters
    python benchmarks/growth.py rounds                   # 300 rounds, in terminals and simulated

Each of them continues where it was interrupted, and only prints its table once all is measured.

- clients: `server.py --simulate N` with cifar.py, one local epoch, no evaluation on clients. Of 10,000 clients, 100
  train in a round, with five samples each;
- sites: `server.py` and N times `client.py`, the clients of which sleep for a second (sleeping.py). They are started
  one after another: a few at a time, as all of them together would only compete for the cores;
- models: two clients, whose training is one step (wide_mlp.py). `--baseline` is a checkout of another version of this
  project, which runs the same in turn: `git worktree add DIR COMMIT`;
- rounds: clients that do not even sleep. The result is by how much the memory of each kind of process grows in 100
  rounds, after the first fifth of the rounds: at most BOUND MB.

Memory is proportional set size (PSS), of all processes together unless something else is said; "largest" is the peak of
the resident memory of a single process. Seconds per round are the median without the first round.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cells import load_cells, save_cells
from benchmarks.harness import FOLDER, ROOT, LaunchError, free_port, programs, wait_for
from benchmarks.watch import Watcher, slope
from federation.launch.command import run_command

Cells = dict[str, Any]
Cell = dict[str, Any]
STARTING = 4  # sites at a time
BOUND = 5.0  # MB in 100 rounds
SITES, SIZES = (10, 25, 40), (62_000, 1_000_000, 5_000_000, 25_000_000)
CLIENTS = {"10": (10, 0), "100": (100, 0), "1,000": (1000, 0), "10,000": (10_000, 100)}  # and how many are sampled
NO_EVALUATION = "fraction-evaluate=0"
OF_A_SITE = ("SuperNode", "SuperExec", "client", "fork server", "launchers")


@dataclass
class Case:
    """A run to be measured."""

    options: list[str]  # of server.py
    rounds: int
    sites: int = 0  # how many times client.py is started; none for a simulation
    interval: float = 0.2  # seconds between two samples
    environment: dict[str, str] = field(default_factory=dict)
    checkout: Path = ROOT


def measure(case: Case, out: Path) -> Cell:
    """Run a case in the run folder `out` and return what it took. Raises LaunchError where it fails."""
    address = f"127.0.0.1:{free_port()}"
    shutil.rmtree(out, ignore_errors=True)
    where = ["--address", address, "--clients", str(case.sites)] if case.sites else []
    server = [str(case.checkout / "server.py"), "--out", str(out), "--rounds", str(case.rounds), *where, *case.options]
    client = [str(case.checkout / "client.py"), "--server", address, "--state", str(out / "state")]
    with ExitStack() as stack:
        processes = stack.enter_context(programs(server, **case.environment))
        watcher = Watcher([processes[0].pid], case.interval, lambda: rounds_of(out))
        with watcher:
            for number in range(case.sites):
                await_joined(out, number + 1 - STARTING, processes[0])
                processes += stack.enter_context(programs(client, **case.environment))
                watcher.roots.append(processes[-1].pid)
            await_joined(out, case.sites, processes[0])
            joined = time.perf_counter() - watcher.started
            wait_for(processes)
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    return summary(metrics, watcher) | {"joined": joined if case.sites else 0.0}


def rounds_of(out: Path) -> int:
    """Return how many rounds a run has finished."""
    path = out / "metrics.json"
    return len(json.loads(path.read_text("utf-8"))["rounds"]) - 1 if path.exists() else -1


def await_joined(out: Path, count: int, server: "subprocess.Popen[str]") -> None:
    """Wait until so many clients have joined. Raises LaunchError if the server ends before."""
    log = out / "log.txt"
    while count > 0 and not (log.exists() and log.read_text("utf-8").count(" joined from ") >= count):
        if server.poll() is not None:
            raise LaunchError(f"the server ended before {count} clients had joined (all is in {log})")
        time.sleep(0.1)


def summary(metrics: dict[str, Any], watcher: Watcher) -> Cell:
    rows = metrics["rounds"][1:]
    kinds, late = watcher.kinds_seen(), max(2, len(rows) // 5)
    return {
        "seconds": statistics.median(row["seconds"] for row in rows[1:] or rows),
        "samples": sum(rows[-1]["samples"]), "accuracy": rows[-1]["server_accuracy"],
        "bytes": rows[-1]["bytes_down"] + rows[-1]["bytes_up"], "sha256": metrics["final_weights_sha256"],
        "memory": watcher.peak_sum(), "memory_of": watcher.peak_of(), "largest": watcher.peaks,
        "cpu": {kind: slope(watcher.series(kind, "cpu")) for kind in kinds},
        "growth": {kind: 100 * slope(watcher.series(kind, "pss", late)) for kind in kinds},
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the parts


def clients(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    for name, (count, sampled) in list(CLIENTS.items())[: 1 if args.smoke else None]:
        settings = f"{NO_EVALUATION} local-epochs=1" + f" clients-per-round={sampled}" * bool(sampled)
        options = ["--simulate", str(count), "--data", args.data, "--run-config", settings]
        yield name, Case(options, 2 if args.smoke else 10 if sampled else 3)


def clients_table(cells: Cells, args: argparse.Namespace) -> Iterator[str]:
    yield from header("clients", "samples in a round", "s per round", "s per 1,000 samples", "GB", "accuracy")
    for name, _ in clients(args):
        cell = cells[name]
        per_thousand = 1000 * cell["seconds"] / cell["samples"]
        yield row(name, f"{cell['samples']:,}", f"{cell['seconds']:.2f}", f"{per_thousand:.3f}",
                  f"{cell['memory'] / 1000:.2f}", f"{cell['accuracy']:.3f}")  # fmt: skip


def sites(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    environment = {"SLEEP": "0" if args.smoke else "1"}
    for count in (2,) if args.smoke else args.sites or SITES:
        options = ["--task", "benchmarks.sleeping", "--run-config", f"{NO_EVALUATION} learning-rate=1.0"]
        yield str(count), Case(options, 2 if args.smoke else 10, count, 2.0, environment)


def sites_table(cells: Cells, args: argparse.Namespace) -> Iterator[str]:
    yield from header("sites", "s until all joined", "rounds per minute", "GB, all", "MB per site", "MB: SuperLink",
                      "proxy", "server", "CPU s per round: SuperLink", "proxy", "server", "all sites")  # fmt: skip
    for name, case in sites(args):
        cell, held, cpu = cells[name], cells[name]["memory_of"], cells[name]["cpu"]
        of_sites = sum(held.get(kind, 0.0) for kind in OF_A_SITE) / case.sites
        shown = [f"{held.get(kind, 0.0):.0f}" for kind in ("SuperLink", "proxy", "server")]
        spent = [f"{cpu.get(kind, 0.0):.2f}" for kind in ("SuperLink", "proxy", "server")]
        spent.append(f"{sum(cpu.get(kind, 0.0) for kind in OF_A_SITE):.1f}")
        yield row(name, f"{cell['joined']:.0f}", f"{60 / cell['seconds']:.1f}", f"{cell['memory'] / 1000:.1f}",
                  f"{of_sites:.0f}", *shown, *spent)  # fmt: skip


def models(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    checkouts = {"": ROOT} | ({"baseline, ": args.baseline.resolve()} if args.baseline else {})
    for size in SIZES[: 1 if args.smoke else None]:
        for how in ("simulated",) if args.smoke else ("terminals", "simulated"):
            for side, checkout in checkouts.items():
                options = ["--task", "benchmarks.wide_mlp", *(["--simulate", "2"] if how == "simulated" else [])]
                case = Case(options, 2 if args.smoke else 4, 0 if how == "simulated" else 2, 0.2)
                case.checkout, case.environment = checkout, {"PARAMETERS": str(size)}
                yield f"{side}{size:,} parameters, {how}", case


def models_table(cells: Cells, args: argparse.Namespace) -> Iterator[str]:
    kinds = ("server", "client", "actor", "SuperLink", "SuperNode", "proxy")
    yield from header("model", "MB in a round", "s per round", "MB, all", *(f"largest {kind}" for kind in kinds))
    for name, _ in models(args):
        cell = cells[name]
        largest = [f"{cell['largest'][kind]:.0f}" if kind in cell["largest"] else "–" for kind in kinds]
        yield row(name, f"{cell['bytes'] / 1e6:.1f}", f"{cell['seconds']:.2f}", f"{cell['memory']:.0f}", *largest)
    for name, _ in models(args) if args.baseline else ():
        if not name.startswith("baseline"):
            yield compared(name, cells[name], cells[f"baseline, {name}"])


def compared(name: str, ours: Cell, baseline: Cell) -> str:
    """Say how the two versions compare. Raises LaunchError unless both ended with the same weights."""
    if ours["sha256"] != baseline["sha256"]:
        raise LaunchError(f"{name}: the two versions ended with different weights")
    ratios = [f"{key} {ours[key] / baseline[key]:.2f}" for key in ("seconds", "memory")]
    kinds = [kind for kind in ("server", "client", "actor") if kind in ours["largest"].keys() & baseline["largest"]]
    ratios += [f"largest {kind} {ours['largest'][kind] / baseline['largest'][kind]:.2f}" for kind in kinds]
    return f"{name}, divided by the baseline: {', '.join(ratios)}; same SHA-256"


def rounds(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    count = 6 if args.smoke else args.rounds
    options = ["--task", "benchmarks.sleeping", "--run-config", "learning-rate=1.0"]
    environment = {"SLEEP": "0"}
    yield "simulated", Case([*options, "--simulate", "10"], count, 0, 1.0, environment)
    if not args.smoke:
        yield "terminals", Case(options, count, 2, 1.0, environment)


def rounds_table(cells: Cells, args: argparse.Namespace) -> Iterator[str]:
    yield from header("", "kind of process", "MB at most", "MB more in 100 rounds", f"at most {BOUND:g}")
    for name, _ in rounds(args):
        for kind, growth in cells[name]["growth"].items():
            verdict = "yes" if growth <= BOUND else "**no**"
            yield row(name, kind, f"{cells[name]['memory_of'][kind]:.0f}", f"{growth:+.2f}", verdict)


def header(*columns: str) -> Iterator[str]:
    yield row(*columns)
    yield "|---" * len(columns) + "|"


def row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


Part = Callable[[argparse.Namespace], Iterator[tuple[str, Case]]]
Table = Callable[[Cells, argparse.Namespace], Iterator[str]]
PARTS: dict[str, tuple[Part, Table]] = {
    "clients": (clients, clients_table), "sites": (sites, sites_table), "models": (models, models_table),
    "rounds": (rounds, rounds_table),
}  # fmt: skip


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s PART [options]")
    parser.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data", default="embedded", metavar="DIR", help="as in cifar.py (default: embedded)")
    parser.add_argument(
        "--sites", type=int, nargs="*", metavar="N", help="(default: 10 25 40; a site takes up to 0.45 GB)"
    )
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="of the part of that name (default: 300)")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="a checkout to compare with")
    parser.add_argument("--smoke", action="store_true", help="one small run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: runs/benchmarks/growth-PART.json)")
    return parser.parse_args()


def command() -> int:
    args = read_options()
    part, table = PARTS[args.part]
    args.out = (args.out or FOLDER / f"growth-{args.part}{'-smoke' * args.smoke}.json").absolute()
    os.environ.pop("PYTHONPATH", None)  # each checkout imports its own files
    cells = load_cells(args.out)
    for name, case in part(args):
        if name not in cells:
            cells[name] = measure(case, args.out.with_suffix(""))
            save_cells(args.out, cells)
            print(f"{args.part}: {name}: {cells[name]['seconds']:.2f} s per round, {cells[name]['memory']:.0f} MB",
                  flush=True)  # fmt: skip
    print("\n".join(table(cells, args)))
    return 0


if __name__ == "__main__":
    run_command(command)
