"""Compare the speed of cifar.train with two other ways to train the same model, in turns, in one process.

    python benchmarks/input_pipeline.py [--data DIR] [--repeats 5]

- classic: ImageFolder in a DataLoader, with PIL, ToTensor and Normalize for every image in every epoch;
- cifar.py: bytes in memory, normalised a batch at a time;
- bare: the same normalised batch in every step, which is the upper limit for this model in PyTorch.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
from cifar_data import DATA_DIR

BATCH = 32


def steps(batches) -> None:
    net = cifar.Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def classic(root: Path, samples: int) -> None:
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    folder = ImageFolder(root / "train", normalise)
    subset = Subset(folder, torch.randperm(len(folder))[:samples].tolist())
    steps(DataLoader(subset, BATCH, shuffle=True))


def ours(data: cifar.Data) -> None:
    cifar.train(cifar.Net(), data, epochs=1, batch_size=BATCH)


def bare(data: cifar.Data) -> None:
    batch = cifar.normalise(data[0][:BATCH]), data[1][:BATCH]
    steps(batch for _ in range(len(data[1]) // BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA_DIR, help="an image folder")
    parser.add_argument("--samples", type=int, default=20_000, help="per measurement")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    images, labels = cifar.load_data(str(args.data))[0]
    rows = torch.randperm(len(labels))[: args.samples]
    data = images[rows], labels[rows]
    ways = {
        "classic": lambda: classic(args.data, len(rows)),
        "cifar.py": lambda: ours(data),
        "bare": lambda: bare(data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f"{torch.get_num_threads()} threads, {len(rows):,} samples, batch {BATCH}, {args.repeats} repeats in turn")
    for name, times in seconds.items():
        print(f"{name:9} {len(rows) / statistics.median(times):8,.0f} samples/s")
    for name in ("classic", "bare"):
        ratios = [other / own for other, own in zip(seconds[name], seconds["cifar.py"], strict=True)]
        print(
            f"cifar.py is {statistics.median(ratios):.2f} x as fast as {name} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
