"""Compare the time of a round with other systems, side by side: a table and a picture, medians over repeats.

    python benchmarks/simulated_rounds.py --pfl-python PFL/bin/python --nvflare-python NVFLARE/bin/python
    python benchmarks/simulated_rounds.py --sides plain simulated --clients 10 --repeats 1

It continues if it was interrupted; when nothing is missing, it shows what there is.

All clients train in every round: LeNet, one local epoch of SGD with batch size 32, IID partitions. A round consists of
training, aggregation and the central test; the clients do not evaluate. The first round is not counted. With 10
clients, a run of 2 rounds is also measured from the command to its exit. Memory is the peak of the sum over all
processes of a side (proportional set size, twice a second). The sides, with the number of workers given by --workers:

- plain: peers/plain_loop.py, cifar.train in worker processes, the lower limit;
- pfl: pfl-research 0.6 in its own environment: pip install "pfl[pytorch]==0.6.*" tqdm;
- nvflare: NVFlare 2.9's simulator in its own environment: pip install "nvflare==2.9.*" torch tqdm. Only with 10
  clients, because it takes 3 s per client and round;
- quickstart: the code path of Flower's quickstart-pytorch on the Simulation Engine with its defaults: a DataLoader over
  PIL images, one message per client. At most 100 clients; it needs images in folders;
- simulated: `python server.py --simulate N`, which chooses the number of workers itself;
- terminals: `python server.py` and `python client.py --clients N/2` twice.

Let pip compile what it installs (PYTHONDONTWRITEBYTECODE unset): otherwise each start of a process compiles it anew,
which takes seconds.

Run it on an idle machine. On a busy one, Linux divides the cores among sessions (sched_autogroup_enabled), and torchrun
starts a session for each of its workers, which then get several times as much as the processes of the other sides.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
from benchmarks.cells import load_cells, save_cells
from benchmarks.harness import FOLDER
from benchmarks.sides import MOST, SIDES, Case, Run, measure
from federation.app.run_folder import write_atomically
from federation.launch.command import run_command

INSTALL = {"pfl": 'pip install "pfl[pytorch]==0.6.*" tqdm', "nvflare": 'pip install "nvflare==2.9.*" torch tqdm'}
CLIENTS = 10, 100, 1000
ROUNDS = 3
WHOLE = 10, 2  # the run that is measured from its command to its exit
BOUNDS = {10: 1.25, 100: 1.25, 1000: 1.6}  # seconds per round, ours over pfl's
WHOLE_BOUND = 1.4
MEMORY_BOUND = 3.0  # GB
STYLES = {  # label, colour and marker; the colours can be told apart by the colour-blind
    "plain": ("plain loop: the floor", "#000000", "o"), "pfl": ("pfl-research 0.6", "#e69f00", "s"),
    "nvflare": ("NVFlare 2.9", "#cc79a7", "X"), "quickstart": ("Flower's quickstart", "#d55e00", "D"),
    "simulated": ("server.py --simulate", "#0072b2", "^"), "terminals": ("server.py, two client.py", "#009e73", "v"),
}  # fmt: skip
Cells = dict[str, Any]  # the runs, by case, side and repeat


def key(case: Case, side: str, repeat: int) -> str:
    return f"{case[0]} clients, {case[1]} rounds, {side}, {repeat}"


def runs_of(cells: Cells, case: Case, side: str, repeats: int) -> list[Run]:
    """Return the runs that are there, by repeat."""
    keys = [key(case, side, repeat) for repeat in range(repeats)]
    return [Run(**cells[one]) for one in keys if one in cells]


def missing(cells: Cells, args: argparse.Namespace) -> Iterator[tuple[Case, str, int]]:
    """Yield the runs that are not there yet, repeat after repeat, so that the sides alternate."""
    for repeat, case, side in itertools.product(range(args.repeats), args.cases, args.sides):
        measured = case[0] <= MOST.get(side, case[0]) and (side != "nvflare" or case != WHOLE)
        if measured and key(case, side, repeat) not in cells:
            yield case, side, repeat


def study(cells: Cells, args: argparse.Namespace) -> None:
    """Measure what is missing."""
    args.data = cifar.find_data(args.data)
    cifar.load_data(args.data)  # decodes the images, so that no side has to
    usable = {side: is_usable(side, args) for side in {side for _, side, _ in missing(cells, args)}}
    for case, side, repeat in missing(cells, args):
        if usable[side]:
            run = measure(side, case, args)
            cells[key(case, side, repeat)] = asdict(run)
            save_cells(args.out, cells)
            print(f"{key(case, side, repeat)}: {median(run.rounds):.2f} s per round, {run.whole:.1f} s, "
                  f"{run.memory:.2f} GB, accuracy {run.accuracy:.4f}", flush=True)  # fmt: skip


def is_usable(side: str, args: argparse.Namespace) -> bool:
    """Return whether a side can run here; print what it needs if not."""
    if side == "quickstart" and not (Path(args.data) / "train").is_dir():
        print(f"quickstart is skipped: {args.data} has no images in train/<class>/")
        return False
    python = getattr(args, f"{side}_python", None)
    if python is None or subprocess.run([python, "-c", f"import {side}"], capture_output=True).returncode == 0:
        return True
    print(f"{side} is skipped: {python} cannot import it; run `{INSTALL[side]}` in a separate environment, "
          f"and pass --{side}-python PATH")  # fmt: skip
    return False


# ---------------------------------------------------------------------------------------------------------- the results


def seconds_of(run: Run) -> float:
    return median(run.rounds)


def spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(cells: Cells, args: argparse.Namespace) -> str:
    """Return a table in Markdown: median (minimum to maximum) over the repeats."""
    rows = ["| clients | rounds | | s per round | whole run, s | memory, GB | accuracy | repeats |", "|---" * 8 + "|"]
    for case, side in itertools.product(args.cases, args.sides):
        if runs := runs_of(cells, case, side, args.repeats):
            seconds, whole = spread([seconds_of(run) for run in runs], 2), spread([run.whole for run in runs], 1)
            memory, accuracy = (median(getattr(run, name) for run in runs) for name in ("memory", "accuracy"))
            rows.append(f"| {case[0]:,} | {case[1]} | {STYLES[side][0]} | {seconds} | {whole} | {memory:.2f} | "
                        f"{accuracy:.3f} | {len(runs)} |")  # fmt: skip
    return "\n".join(rows)


def bounds(cells: Cells, args: argparse.Namespace) -> Iterator[str]:
    """Yield the time of ours relative to pfl-research, of each repeat, and our memory, with their bounds."""
    for case in args.cases:
        pairs = [[key(case, side, repeat) for side in ("simulated", "pfl")] for repeat in range(args.repeats)]
        both = [(Run(**cells[ours]), Run(**cells[pfl])) for ours, pfl in pairs if ours in cells and pfl in cells]
        if both and case == WHOLE:
            ratios = spread([ours.whole / pfl.whole for ours, pfl in both], 2)
            yield f"{case[0]} clients, {case[1]} rounds from the command to its exit: {ratios}, bound {WHOLE_BOUND}"
        elif both:
            ratios = spread([seconds_of(ours) / seconds_of(pfl) for ours, pfl in both], 2)
            yield f"{case[0]} clients, a round: {ratios}, bound {BOUNDS.get(case[0], 'none')}"
    memory = [run.memory for case in args.cases for run in runs_of(cells, case, "simulated", args.repeats)]
    if memory:
        yield f"memory: at most {max(memory):.2f} GB, bound {MEMORY_BOUND}"


def draw(path: Path, cells: Cells, args: argparse.Namespace) -> None:
    """Draw seconds per round and memory against the number of clients; the plain loop is the floor."""
    from matplotlib.figure import Figure  # here, because it takes a second
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    counts = sorted(args.clients)
    shown = {side: medians(cells, args, counts, side) for side in args.sides}
    for panel, number in zip(panels, (1, 2), strict=True):
        for side, found in shown.items():
            label, colour, marker = STYLES[side]
            at, values = [one[0] for one in found], [one[number] for one in found]
            panel.plot(at, values, color=colour, marker=marker, label=label, linewidth=3 if side == "plain" else 1.8)
            if side == "plain":
                panel.fill_between(at, values, color="grey", alpha=0.2)
        panel.set(xscale="log", xlabel="clients, all of which train in every round", xticks=counts)
        panel.set_xticklabels([f"{count:,}" for count in counts])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    panels[0].set(yscale="log", ylabel="seconds per round")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[1].set(ylabel="memory of all processes, GB")
    panels[1].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=120))


def medians(cells: Cells, args: argparse.Namespace, counts: list[int], side: str) -> list[tuple[int, float, float]]:
    """Return clients, seconds per round and GB where there are runs of a side."""
    found = ((count, runs_of(cells, (count, args.rounds), side, args.repeats)) for count in counts)
    return [(n, median(map(seconds_of, runs)), median(run.memory for run in runs)) for n, runs in found if runs]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--clients", type=int, nargs="*", default=CLIENTS, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="2 or more; the first is not counted")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--no-whole", action="store_true", help="skip the run from command to exit")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="(all cores)")
    parser.add_argument("--pfl-python", default=sys.executable, metavar="PATH", help="has pfl-research")
    parser.add_argument("--nvflare-python", default=sys.executable, metavar="PATH", help="has NVFlare")
    parser.add_argument("--out", type=Path, default=FOLDER / "simulated_rounds.json", metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: 2 or more are needed")
    cases = [(clients, args.rounds) for clients in args.clients] + [WHOLE] * (not args.no_whole)
    args.cases = list(dict.fromkeys(cases))
    return args


def main() -> int:
    args = read_options()
    cells = load_cells(args.out)
    study(cells, args)
    print(table(cells, args))
    for line in bounds(cells, args):
        print(f"simulated / pfl: {line}" if "clients" in line else line)
    draw(args.out.with_suffix(".png"), cells, args)
    return 0


if __name__ == "__main__":
    run_command(main)
