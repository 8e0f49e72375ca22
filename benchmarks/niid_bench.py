"""Reproduce a published table for the network of cifar.py: that of Flower's baseline `niid_bench`.

    python benchmarks/niid_bench.py                      # continues if it was interrupted; see --help
    python benchmarks/niid_bench.py --rounds 0           # only the table, of the rounds that are there

The setting is that of NIID-Bench (Li et al. 2022, section V), as implemented in Flower's baseline: 10 clients, all of
them in each of 50 rounds of 10 local epochs, batch size 64, SGD with lr 0.01, momentum 0.9 and weight decay 1e-5,
pixels in 0..1, random crops after reflection padding of 4 pixels, and random flips. The result is the best accuracy
over the rounds. This file is also the task: `python server.py --task benchmarks.niid_bench`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cifar import Data, Net, find_data, load_data, pick_device

__all__ = ["Net", "find_data", "load_data", "test", "train"]

RUNS = {  # with the published accuracy in percent: mean ± standard deviation, or one run
    ("iid", "fedavg"): "71.32 ± 0.33",
    ("dirichlet", "fedavg"): "62.47 ± 0.43",
    ("pathological", "fedavg"): "51.17 ± 1.09",
    ("dirichlet", "fedprox"): "65.63",
    ("dirichlet", "scaffold"): "68.08",
}
EDGE = 4
REFLECTED = torch.cat([torch.arange(EDGE, 0, -1), torch.arange(32), torch.arange(30, 30 - EDGE, -1)])  # 40 pixels


def train(
    net: nn.Module, data: Data, *, epochs: int, lr: float = 0.01, batch_size: int = 64, seed: int = 0,
    momentum: float = 0.9, weight_decay: float = 1e-5,
) -> float:  # fmt: skip
    """Train `net` in place with SGD on augmented images and return the mean loss per sample of the last epoch."""
    device = pick_device("auto")
    net.to(device, memory_format=torch.channels_last).train()
    images, labels = (part.to(device) for part in data)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    for epoch in range(epochs):
        random = torch.Generator().manual_seed(seed + epoch)
        total = torch.zeros((), device=device)
        for rows in torch.randperm(len(labels), generator=random).split(batch_size):
            loss = F.cross_entropy(net(scaled(augmented(images[rows], random))), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
    return total.item() / len(labels)


@torch.no_grad()
def test(net: nn.Module, data: Data) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    device = pick_device("auto")
    net.to(device).eval()
    logits = torch.cat([net(scaled(images.to(device))) for images in data[0].split(500)])
    labels = data[1].to(device)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """Shift each of (n, 32, 32, 3) images by up to 4 pixels, with reflection padding, and flip half of them."""
    top, left = torch.randint(2 * EDGE + 1, (2, len(images), 1), generator=random)
    flipped = torch.rand(len(images), 1, generator=random) < 0.5
    across = torch.arange(32)
    rows, columns = REFLECTED[top + across], REFLECTED[left + torch.where(flipped, across.flip(0), across)]
    return images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def scaled(images: Tensor) -> Tensor:
    """Turn (n, 32, 32, 3) bytes into (n, 3, 32, 32) floats in 0..1."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--partitioner", choices=sorted({one for one, _ in RUNS}), help="(default: all in turn)")
    parser.add_argument("--strategy", choices=sorted({one for _, one in RUNS}), help="(default: all in turn)")
    parser.add_argument("--rounds", type=int, default=50, metavar="N")
    parser.add_argument("--clients", type=int, default=10, metavar="N")
    parser.add_argument("--local-epochs", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/niid_bench"), metavar="DIR")
    args = parser.parse_args()
    for case in chosen(args):
        if args.rounds and (status := run(*case, args)):
            sys.exit(status)
    print(table(args))


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the partitioner and the strategy of each run that the options leave."""
    return [
        (partitioner, strategy)
        for partitioner, strategy in RUNS
        if args.partitioner in (None, partitioner) and args.strategy in (None, strategy)
    ]


def folder(partitioner: str, strategy: str, args: argparse.Namespace) -> Path:
    return Path(args.out / f"{partitioner}-{strategy}-{args.seed}")


def run(partitioner: str, strategy: str, args: argparse.Namespace) -> int:
    """Run or resume a simulated federation, and return its exit status."""
    out = folder(partitioner, strategy, args)
    resume = ["--resume"] if any(out.glob("checkpoint-*.npz")) else []
    config = (
        f'partitioner="{partitioner}" strategy="{strategy}" seed={args.seed} local-epochs={args.local_epochs}'
        " batch-size=64 learning-rate=0.01 fraction-evaluate=0.0"
    )
    server = str(Path(__file__).resolve().parents[1] / "server.py")
    command = [sys.executable, server, "--task", "benchmarks.niid_bench", "--run-config", config, *resume]
    command += ["--simulate", str(args.clients), "--rounds", str(args.rounds), "--out", str(out)]
    command += ["--data", args.data] if args.data else []
    return subprocess.run(command, check=False).returncode


def table(args: argparse.Namespace) -> str:
    """Return a table in Markdown of the runs that have begun."""
    rows = ["| partitions | strategy | rounds | best accuracy, % | in round | published, % |", "|---" * 6 + "|"]
    for case in chosen(args):
        metrics = folder(*case, args) / "metrics.json"
        if metrics.exists():
            rows.append(row(*case, json.loads(metrics.read_text("utf-8"))["rounds"]))
    return "\n".join(rows)


def row(partitioner: str, strategy: str, rounds: list[dict[str, float]]) -> str:
    """Return a line that compares the best round so far with the published figure."""
    best = max(rounds, key=lambda one: one["server_accuracy"])
    figures = f"{len(rounds) - 1} | {100 * best['server_accuracy']:.2f} | {best['round']}"
    return f"| {partitioner} | {strategy} | {figures} | {RUNS[partitioner, strategy]} |"


if __name__ == "__main__":
    main()
