"""Find out where each second of a round goes, before and after: in terminals and in a simulation, as a picture.

    python benchmarks/seconds.py                     # continues if it was interrupted; see --help

The same server.py, client.py and cifar.py, with the same seed, in two ways. Before: on Flower's own SuperLink and
SuperNodes or Simulation Engine, by `flwr run`, with the defaults of the engine. After: by `python server.py` and
`python client.py`, which add the proxy, processes that are forked, and in a simulation bundles of messages.
timed_cifar.py and timed_fedavg.py note the times. Shown is the mean over the rounds, without the first and the last
one, of the client that a round waits for:

- waiting: until the process that answers a message starts, or in one that goes on, until it has the message;
- start: until Python, Flower and the app are imported, and Flower has fetched the message;
- import: PyTorch and cifar.py; load: the data, the client's rows and the model;
- train, and test: what the task does; push: until the server has the reply;
- aggregate: the mean, the checkpoint and whatever else the server does; central test: by the server.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.cells import load_cells, save_cells
from benchmarks.harness import FOLDER, ROOT, LaunchError, engine, federate, flwr_run
from cifar_data import find_data, load_data
from federation.app.run_folder import write_atomically
from federation.launch.command import run_command

FILE, TASK = "FEDERATION_SECONDS", "benchmarks.timed_cifar"  # the variable is read there
STRATEGY = "benchmarks.timed_fedavg.TimedFedAvg"
COLOURS = {  # can be told apart by the colour-blind
    "waiting": "#bbbbbb", "start": "#e69f00", "import": "#f0e442", "load": "#56b4e9", "train": "#0072b2",
    "test": "#1b2a49", "push": "#cc79a7", "aggregate": "#d55e00", "central test": "#009e73",
}  # fmt: skip
WAYS = ("before", "after")
Note = dict[str, Any]  # see timed_cifar.py
Parts = dict[str, float]  # seconds


def run(where: str, way: str, args: argparse.Namespace) -> Parts:
    """Run a federation, and return the parts of a round."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "seconds.jsonl"
    path.unlink(missing_ok=True)
    os.environ[FILE] = str(path)
    clients = args.clients if where == "simulation" else args.terminals
    (before if way == "before" else after)(where, clients, args)
    return parts([json.loads(line) for line in path.read_text("utf-8").splitlines()])


def before(where: str, clients: int, args: argparse.Namespace) -> None:
    out = FOLDER / "before"
    shutil.rmtree(out, ignore_errors=True)
    config = {
        "task": TASK, "strategy": STRATEGY, "data": args.data, "num-clients": clients, "num-server-rounds": args.rounds,
        "out": str(out),
    }  # fmt: skip
    simulate, supernodes = (clients, 0) if where == "simulation" else (0, clients)
    with engine("seconds", bool(simulate), supernodes) as ours:
        for line in flwr_run(ours, ROOT, config, simulate).stdout or ():
            ours.log.write(line)
        if json.loads((out / "metrics.json").read_text("utf-8"))["status"] != "finished":
            raise LaunchError(f"{where}, before: {ours.last_error()}")


def after(where: str, clients: int, args: argparse.Namespace) -> None:
    simulate = ["--simulate", str(clients)] if where == "simulation" else []
    federate(
        *simulate, "--task", TASK, "--data", args.data, "--rounds", str(args.rounds),
        "--run-config", f"strategy='{STRATEGY}'", clients=0 if simulate else clients,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the parts


def parts(notes: list[Note]) -> Parts:
    """Return the seconds of each part of a round, which are all of it: the mean over the rounds between two others."""
    server = {(note["what"], note["round"]): note for note in notes if note["round"] is not None}
    tasks = [note for note in notes if note["round"] is None]
    begins = {name: note["begin"] for name, note in server.items()}
    rounds = sorted(number for what, number in server if what == "configure train")[1:-1]
    found = [of_round(number, begins, tasks) for number in rounds]
    return {part: mean(each[part] for each in found) for part in COLOURS}


def of_round(number: int, begins: dict[tuple[str, int], float], notes: list[Note]) -> Parts:
    asked, trained, asked_again, tested = (
        begins[what, number]
        for what in ("configure train", "aggregate train", "configure evaluate", "aggregate evaluate")
    )
    end = begins["configure train", number + 1]
    training, testing = of_messages("train", asked, trained, notes), of_messages("test", asked_again, tested, notes)
    (central,) = [note["end"] - note["begin"] for note in between(tested, end, notes) if note["what"] == "test"]
    aggregate = (asked_again - trained) + (end - tested - central)
    both = {part: training.get(part, 0.0) + testing.get(part, 0.0) for part in training | testing}
    return dict.fromkeys(COLOURS, 0.0) | both | {"aggregate": aggregate, "central test": central}


def of_messages(kind: str, asked: float, answered: float, notes: list[Note]) -> Parts:
    """Return the parts of the time from the server's messages to the last reply, of the process that it came from."""
    notes = between(asked, answered, notes)
    last = max((note for note in notes if note["what"] == kind), key=lambda note: note["end"])
    own = [note for note in notes if note["pid"] == last["pid"]]
    work = sum(note["end"] - note["begin"] for note in own if note["what"] == kind)
    is_new = last["started"] > asked
    begun = last["imported"] if is_new else min(note["begin"] for note in own)
    found = {"load": last["end"] - begun - work, kind: work, "push": answered - last["end"]}
    if not is_new:
        return found | {"waiting": begun - asked}
    start, importing = last["importing"] - last["started"], last["imported"] - last["importing"]
    return found | {"waiting": last["started"] - asked, "start": start, "import": importing}


def between(start: float, end: float, notes: Iterable[Note]) -> list[Note]:
    return [note for note in notes if start <= note["begin"] <= end]


# ---------------------------------------------------------------------------------------------------------- the results


def study(cells: dict[str, Parts], args: argparse.Namespace) -> None:
    """Run what is missing, repeat after repeat, so that before and after alternate."""
    args.data = find_data(args.data)
    load_data(args.data)  # decodes the images, so that neither way has to
    for repeat in range(args.repeats):
        for where in args.where:
            for way in WAYS:
                if (key := f"{where}, {way}, {repeat}") not in cells:
                    cells[key] = run(where, way, args)
                    save_cells(args.out, cells)
                    shown = ", ".join(f"{part} {seconds:.2f}" for part, seconds in cells[key].items())
                    print(f"{key}: {sum(cells[key].values()):.2f} s: {shown}", flush=True)


def means(cells: dict[str, Parts], where: str, way: str, repeats: int) -> Parts:
    found = [cells[f"{where}, {way}, {repeat}"] for repeat in range(repeats)]
    return {part: mean(each[part] for each in found) for part in COLOURS}


def table(cells: dict[str, Parts], args: argparse.Namespace) -> str:
    """Return a table in Markdown, in seconds."""
    rows = [f"| seconds of a round | {' | '.join(COLOURS)} | together |", "|---" * (2 + len(COLOURS)) + "|"]
    for where in args.where:
        for way in WAYS:
            values = means(cells, where, way, args.repeats).values()
            rows.append(f"| {where}, {way} | {' | '.join(f'{one:.2f}' for one in values)} | {sum(values):.2f} |")
    return "\n".join(rows)


def draw(path: Path, cells: dict[str, Parts], args: argparse.Namespace) -> None:
    """Draw a bar for each way, with its parts side by side."""
    from matplotlib.figure import Figure  # here, because it takes a second

    bars = [(where, way) for where in args.where for way in WAYS]
    figure = Figure(figsize=(11, 1.4 + 0.75 * len(bars)), layout="constrained")
    panel = figure.subplots()
    whole = max(sum(means(cells, *bar, args.repeats).values()) for bar in bars)
    for place, bar in enumerate(bars):
        left = 0.0
        for part, seconds in means(cells, *bar, args.repeats).items():
            label = part if place == 0 else None
            panel.barh(place, seconds, left=left, color=COLOURS[part], edgecolor="white", linewidth=0.6, label=label)
            if seconds > 0.035 * whole:
                colour = "white" if part in ("train", "test", "aggregate", "central test") else "black"
                panel.text(left + seconds / 2, place, f"{seconds:.1f}", ha="center", va="center", color=colour)
            left += seconds
        panel.text(left + 0.005 * whole, place, f"{left:.1f} s", va="center", fontweight="bold")
    names = {"terminals": f"{args.terminals} terminals", "simulation": f"{args.clients} simulated clients"}
    panel.set(yticks=range(len(bars)), yticklabels=[f"{names[where]}, {way}" for where, way in bars])
    panel.set(xlabel="seconds of a round", xlim=(0, 1.08 * whole))
    panel.invert_yaxis()
    panel.grid(alpha=0.3, axis="x")
    panel.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(COLOURS))
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=120))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--where", nargs="+", choices=("terminals", "simulation"), default=("terminals", "simulation"))
    parser.add_argument("--terminals", type=int, default=2, metavar="N", help="clients, each in a terminal")
    parser.add_argument("--clients", type=int, default=10, metavar="N", help="of the simulation")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="3 or more")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, default=FOLDER / "seconds.json", metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error("--rounds: 3 or more are needed")
    cells = load_cells(args.out)
    study(cells, args)
    print(table(cells, args))
    draw(args.out.with_suffix(".png"), cells, args)
    return 0


if __name__ == "__main__":
    run_command(main)
