"""Find out where the time of cifar.train goes: what it does besides the bare training loop, part by part.

    python benchmarks/training_profile.py --threads 1    # continues if it was interrupted; see --help

The bare loop takes the same normalised batch in every step. What cifar.train does is added to it, one by one, until it
is the same. Each version trains for an epoch, all in turns, and the table says which share of the time of cifar.train a
part adds. A new batch is not in the processor's caches, so that the steps after it take longer, too: that is in its
share.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
from benchmarks.cells import load_cells
from benchmarks.input_pipeline import RATES, Cells, measure, options
from federation.launch.command import run_command

PARTS = ("the bare loop", "normalise a batch", "gather its rows", "sum up the losses", "show progress")
NORMALISE, GATHER, SUM, ALL = range(1, len(PARTS))  # up to where they are added


def train(level: int, net: nn.Module, data: cifar.Data, batch: int) -> None:
    """Train for an epoch with the parts up to `level`; with all of them, by cifar.train."""
    if level == ALL:
        cifar.train(net, data, epochs=1, batch_size=batch)
        return
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), **RATES, fused=True)
    images, labels = data
    some, their_labels, total = images[:batch], labels[:batch], torch.zeros(())
    floats = cifar.normalise(some)
    for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(batch):
        if level >= GATHER:
            some, their_labels = images.index_select(0, rows), labels[rows]
        loss = F.cross_entropy(net(cifar.normalise(some) if level >= NORMALISE else floats), their_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if level >= SUM:
            total += loss.detach() * len(rows)


def seconds_of(level: int, data: cifar.Data, batch: int) -> float:
    started = time.perf_counter()
    train(level, cifar.Net(), data, batch)
    return time.perf_counter() - started


def key(args: argparse.Namespace, batch: int, level: int, repeat: int) -> str:
    return f"{args.samples} samples, {args.threads} threads, batch {batch}, up to {PARTS[level]!r}, {repeat}"


def study(cells: Cells, args: argparse.Namespace) -> None:
    """Measure what is missing, repeat after repeat, so that the versions alternate."""
    count = args.samples // max(args.batch) * max(args.batch)
    some = torch.randperm(len(args.train[1]), generator=torch.Generator().manual_seed(0))[:count]
    images, labels = (part[some] for part in args.train)  # of all classes: one of a single class is soon learned, and
    data = images, labels  # gradients that are almost zero take many times as long
    for repeat in range(args.repeats):
        for batch in args.batch:
            for level in range(len(PARTS)):
                measure(cells, args.out, key(args, batch, level, repeat), partial(seconds_of, level, data, batch))


def shares(cells: Cells, args: argparse.Namespace, batch: int) -> list[float]:
    """Return which share of the time, in percent, each part takes: the median over the repeats."""
    found = []
    for repeat in range(args.repeats):
        seconds = [cells[key(args, batch, level, repeat)] for level in range(len(PARTS))]
        added = [after - before for before, after in zip([0.0, *seconds], seconds, strict=False)]
        found.append([100 * one / seconds[-1] for one in added])
    return [median(column) for column in zip(*found, strict=True)]


def table(cells: Cells, args: argparse.Namespace) -> str:
    """Return a table in Markdown."""
    columns = [shares(cells, args, batch) for batch in args.batch]
    rows = [f"| share of the time, % | {' | '.join(f'batch {batch}' for batch in args.batch)} |"]
    rows.append("|---" * (1 + len(args.batch)) + "|")
    for part, values in zip(PARTS, zip(*columns, strict=True), strict=True):
        rows.append(f"| {part} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(rows)


def main() -> int:
    args = options(__doc__, "training_profile").parse_args()
    torch.set_num_threads(args.threads)
    args.train = cifar.load_data(str(args.data))[0]
    cells = load_cells(args.out)
    study(cells, args)
    print(table(cells, args))
    return 0


if __name__ == "__main__":
    run_command(main)
