"""Compare the speed of cifar.train with other ways to feed the same model, in turns, in one process.

    python benchmarks/input_pipeline.py              # continues if it was interrupted; see --help

All train LeNet with the learning rate, momentum and weight decay of cifar.py:

- classic: ImageFolder in a DataLoader, with PIL, ToTensor and Normalize for every image in every epoch;
- v2, images: the same with torchvision's transforms.v2, as its documentation shows them;
- v2, batches: bytes in memory, which a DataLoader collates, and transforms.v2 on each batch;
- cifar.py: bytes in memory, normalised a batch at a time;
- bare: the same normalised batch in every step, with the memory layout and the fused optimizer of cifar.py, which is
  the upper limit for this model in PyTorch. training_profile.py says what cifar.py does besides.

The time to an accuracy is that of the epochs, without the tests between them, after which the model first classifies
so much of the whole test set correctly; there, batches have 32 samples.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
from benchmarks.cells import load_cells, save_cells
from cifar_data import DATA_DIR
from federation.launch.command import run_command

RATES = {name: inspect.signature(cifar.train).parameters[name].default for name in ("lr", "momentum", "weight_decay")}
HALF = (0.5,) * 3
CLASSIC = transforms.Compose([transforms.ToTensor(), transforms.Normalize(HALF, HALF)])
OF_BATCHES = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(HALF, HALF)])
OF_IMAGES = v2.Compose([v2.ToImage(), OF_BATCHES])
WAYS = ("classic", "v2, images", "v2, batches", "cifar.py", "bare")
BATCHES = 32, 128, 512
TO_ACCURACY = ("classic", "cifar.py")
MOST_EPOCHS = 30
FOLDER = Path("runs/benchmarks")

Batches = Iterable[tuple[Tensor, Tensor]]
AfterEpoch = Callable[[int, float], None]
Cells = dict[str, Any]


class Source:
    """Some of the training samples, as bytes in memory and as image files."""

    def __init__(self, root: Path, samples: int | None = None) -> None:
        """Read a folder of images. Raises ValueError if it is none."""
        if not (root / "train").is_dir():
            raise ValueError(f"{root} has no train/<class>/ with images, which the DataLoader reads")
        (images, labels), self.test_data = cifar.load_data(str(root))
        self.rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:samples]
        self.root, self.data = root, (images[self.rows], labels[self.rows])

    def files(self, transform: Callable[[Any], Any], batch: int) -> Batches:
        subset = Subset(ImageFolder(self.root / "train", transform), self.rows.tolist())
        return DataLoader(subset, batch, shuffle=True)

    def batches(self, batch: int) -> Batches:
        images, labels = self.data
        planes = images.permute(0, 3, 1, 2).contiguous()  # v2 takes images of (3, height, width)
        return DataLoader(TensorDataset(planes, labels), batch, shuffle=True)

    def same_batch(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        images, labels = self.data
        return [(cifar.normalise(images[:batch]), labels[:batch])] * (len(labels) // batch)


def train(
    net: nn.Module, batches: Batches, epochs: int, after_epoch: AfterEpoch,
    transform: Callable[[Tensor], Tensor] = lambda images: images, fused: bool | None = None,
) -> None:  # fmt: skip
    """Train as most scripts do."""
    optimizer = torch.optim.SGD(net.parameters(), **RATES, fused=fused)
    for epoch in range(epochs):
        net.train()
        for images, labels in batches:
            loss = F.cross_entropy(net(transform(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after_epoch(epoch + 1, loss.item())


def run(way: str, net: nn.Module, source: Source, batch: int, epochs: int, after_epoch: AfterEpoch) -> None:
    """Train a net in one of the WAYS."""
    if way == "classic":
        train(net, source.files(CLASSIC, batch), epochs, after_epoch)
    elif way == "v2, images":
        train(net, source.files(OF_IMAGES, batch), epochs, after_epoch)
    elif way == "v2, batches":
        train(net, source.batches(batch), epochs, after_epoch, OF_BATCHES)
    elif way == "cifar.py":
        cifar.train(net, source.data, epochs=epochs, batch_size=batch, after_epoch=after_epoch)
    else:
        layout = net.to(memory_format=torch.channels_last)
        train(layout, source.same_batch(batch), epochs, after_epoch, fused=True)


def rate(way: str, source: Source, batch: int) -> float:
    """Return the samples per second of an epoch."""
    started = time.perf_counter()
    run(way, cifar.Net(), source, batch, 1, lambda epoch, loss: None)
    return len(source.rows) / (time.perf_counter() - started)


class Reached(Exception):
    """The model is accurate enough."""


def until(accuracy: float, way: str, source: Source, seed: int) -> dict[str, list[float]]:
    """Train until the model has this accuracy; return the accuracies after each epoch, and its seconds."""
    torch.manual_seed(seed)
    net, accuracies, seconds = cifar.Net(), [], []
    started = time.perf_counter()

    def after_epoch(epoch: int, loss: float) -> None:
        nonlocal started
        seconds.append(time.perf_counter() - started)
        accuracies.append(cifar.test(net, source.test_data)[1])
        net.train()
        started = time.perf_counter()
        if accuracies[-1] >= accuracy:
            raise Reached

    with suppress(Reached):
        run(way, net, source, BATCHES[0], MOST_EPOCHS, after_epoch)
    return {"accuracies": accuracies, "seconds": seconds}


# ------------------------------------------------------------------------------------------------------------ the study


def measure(cells: Cells, path: Path, key: str, way: Callable[[], Any]) -> None:
    """Measure what is missing, and save it."""
    if key not in cells:
        cells[key] = way()
        save_cells(path, cells)
        print(f"{key}: {cells[key]}", flush=True)


def study(cells: Cells, args: argparse.Namespace) -> None:
    """Measure what is missing, repeat after repeat, so that the ways alternate."""
    whole = Source(args.data)
    part = Source(args.data, min(args.samples, len(whole.rows)) // max(args.batch) * max(args.batch))
    for repeat in range(args.repeats):
        for batch in args.batch:
            for way in WAYS:
                measure(cells, args.out, key(args, batch, way, repeat), partial(rate, way, part, batch))
        for way in TO_ACCURACY if args.accuracy else ():
            own = partial(until, args.accuracy, way, whole, repeat)
            measure(cells, args.out, key_to_accuracy(args, way, repeat), own)


def key(args: argparse.Namespace, batch: int, way: str, repeat: int) -> str:
    return f"{args.samples} samples, {args.threads} threads, batch {batch}, {way}, {repeat}"


def key_to_accuracy(args: argparse.Namespace, way: str, repeat: int) -> str:
    return f"to {args.accuracy}, {args.threads} threads, {way}, {repeat}"


def table(cells: Cells, args: argparse.Namespace) -> str:
    """Return a table in Markdown: samples per second, and in brackets how that of cifar.py compares."""
    rows = [
        f"| samples/s | {' | '.join(f'batch {batch}' for batch in args.batch)} |",
        "|---" * (1 + len(args.batch)) + "|",
    ]
    for way in WAYS:
        columns = []
        for batch in args.batch:
            rates, own = ([cells[key(args, batch, name, n)] for n in range(args.repeats)] for name in (way, "cifar.py"))
            ratio = median(mine / other for mine, other in zip(own, rates, strict=True))
            columns.append(f"{median(rates):,.0f} ({ratio:.2f} ×)")
        rows.append(f"| {way} | {' | '.join(columns)} |")
    return "\n".join(rows)


def accuracy_table(cells: Cells, args: argparse.Namespace) -> str:
    """Return a table in Markdown: epochs and seconds until the accuracy is reached, of each seed."""
    rows = [
        f"| to accuracy {args.accuracy} | epochs, by seed | seconds, the median | seconds per epoch |",
        "|---" * 4 + "|",
    ]
    for way in TO_ACCURACY:
        found = [cells[key_to_accuracy(args, way, repeat)] for repeat in range(args.repeats)]
        reached = [one for one in found if one["accuracies"][-1] >= args.accuracy]
        epochs = ", ".join(str(len(one["seconds"])) if one in reached else "not reached" for one in found)
        seconds = f"{median(sum(one['seconds']) for one in reached):.1f}" if reached else "-"
        rows.append(
            f"| {way} | {epochs} | {seconds} | {median(second for one in found for second in one['seconds']):.2f} |"
        )
    return "\n".join(rows)


def options(description: str, name: str) -> argparse.ArgumentParser:
    """Return the options of a study of the training in one process, with results in `name`.json."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA_DIR, metavar="DIR", help="a folder of images")
    parser.add_argument("--samples", type=int, default=50_000, metavar="N", help="in an epoch (default: 50,000)")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="N", help="(default: 32 128 512)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="(PyTorch's default)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, default=FOLDER / f"{name}.json", metavar="FILE")
    return parser


def main() -> int:
    parser = options(__doc__, "input_pipeline")
    parser.add_argument("--accuracy", type=float, default=0.6, metavar="F", help="(default: 0.6; 0: without this part)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = load_cells(args.out)
    study(cells, args)
    print(table(cells, args))
    if args.accuracy:
        print(accuracy_table(cells, args))
    return 0


if __name__ == "__main__":
    run_command(main)
