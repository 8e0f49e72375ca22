"""Train a small convolutional network on CIFAR-10. Plain PyTorch, one file.

    python cifar.py                      # 5 epochs, about half a minute on two cores
    python cifar.py --data DIR --epochs 10

The network is the one of PyTorch's 60-minute blitz: two convolutions, three linear layers, 62,006 parameters.
Images stay in memory as bytes and are normalised a batch at a time, so an epoch does no Python work per image.
"""

import argparse
import hashlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

Data = tuple[Tensor, Tensor]  # images (n, 32, 32, 3) uint8, labels (n,) int64

CLASSES = 10
PIXELS = 32 * 32 * 3
HOME = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cifar10"  # where CIFAR-10 is looked for
ORIGINAL = "cifar-10-batches-py"  # the folder that CIFAR-10 comes in
EMBEDDED = "embedded"  # the name of the generated stand-in, for machines that have neither data nor a network


class Net(nn.Module):
    """LeNet for 32×32 colour images: (n, 3, 32, 32) float32 to (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


def train(
    net: nn.Module,
    data: Data,
    *,
    epochs: int = 5,
    lr: float = 0.007,
    batch_size: int = 32,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
    device: str = "auto",
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:
    """Train `net` in place with SGD and return the mean loss per sample of the last epoch.

    Each epoch visits every sample once, in an order drawn from `seed + epoch` (counted from 0), so that E calls
    of one epoch see the batches of one call of E. `after_epoch(epoch, loss)` is called after each, from 1.
    """
    net.to(pick_device(device)).to(memory_format=torch.channels_last)  # the layout of the images: a tenth faster
    images, labels = (part.to(pick_device(device)) for part in data)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + epoch)).to(labels.device)
        total = torch.zeros((), device=labels.device)
        net.train()
        for rows in tqdm(order.split(batch_size), f"epoch {epoch + 1}", leave=False, disable=None):
            loss = F.cross_entropy(net(normalise(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        mean_loss = total.item() / len(labels)
        after_epoch(epoch + 1, mean_loss)
    return mean_loss


@torch.no_grad()
def test(net: nn.Module, data: Data, *, batch_size: int = 500, device: str = "auto") -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    net.to(pick_device(device)).eval()
    loss, correct = 0.0, 0
    for images, labels in zip(*(part.split(batch_size) for part in data), strict=True):
        labels = labels.to(pick_device(device))
        logits = net(normalise(images.to(labels.device)))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(data[1]), correct / len(data[1])


def normalise(images: Tensor) -> Tensor:
    """Turn (n, 32, 32, 3) bytes into (n, 3, 32, 32) floats in -1..1: mean 0.5, standard deviation 0.5 per channel."""
    return images.permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the fastest one here. Raises ValueError where it is missing."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not here[name]:
        raise ValueError(f"device {name} is not available here; use one of: {', '.join(d for d in here if here[d])}")
    return torch.device(name if name != "auto" else next(device for device in here if here[device]))


# ---------------------------------------------------------------------------------------------------------- data


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)` from the place that `find_data(root)` names."""
    source = find_data(root)
    if source == EMBEDDED:
        return embedded_data(10_000, seed=1), embedded_data(2_000, seed=2)
    return load_split(Path(source), "train"), load_split(Path(source), "test")


def find_data(root: str | None = None) -> str:
    """Say where the data are: in `root`, in the usual place (CIFAR-10 is downloaded if need be), or embedded here.

    Data that were named are never replaced: raises ValueError if `root` is not there or holds no data.
    """
    folder = Path(root or HOME).expanduser().absolute()
    if root == EMBEDDED:
        return EMBEDDED
    if (folder / "train").is_dir() or (folder / ORIGINAL).is_dir():
        return str(folder)
    if root and not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist; name one with train/<class>/ and test/<class>/ images")
    try:
        from torchvision.datasets import CIFAR10

        CIFAR10(folder, download=True)
        return str(folder)
    except Exception as error:  # no network shows itself in many ways, and each has the same remedy
        if root:
            raise ValueError(f"{folder} has no train/ and test/, and CIFAR-10 cannot be downloaded: {error}") from None
    print(
        f"WARNING: {HOME} has no CIFAR-10, and it cannot be downloaded. Using a small EMBEDDED data set instead:\n"
        "WARNING: its accuracies say nothing about CIFAR-10. Name your own images with --data DIR.",
        file=sys.stderr,
    )
    return EMBEDDED  # fmt: skip


def load_split(root: Path, split: str) -> Data:
    """Return one split as views of a file of decoded images, made on first use: only rows that are used are read."""
    folder = root / split if (root / "train").is_dir() else root / ORIGINAL
    if not folder.is_dir():
        raise ValueError(f"{root} has no folder {split}/; images belong in {split}/<class>/")
    classes = sorted(path.name for path in root.glob("train/*/"))
    cache = HOME.parent / "cifar10-decoded" / f"{split}-{fingerprint(folder, classes)}.npy"
    try:
        decoded = np.load(cache, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        decoded = decode(root, split)
        try:
            write_atomically(cache, lambda path: np.save(path, decoded))
        except OSError as error:
            print(f"WARNING: decoded images are not kept for the next start: {error}", file=sys.stderr)
    labels, images = np.split(decoded, [len(decoded) // (PIXELS + 1)])
    return torch.from_numpy(images).view(-1, 32, 32, 3), torch.from_numpy(labels).long()


def fingerprint(folder: Path, classes: list[str]) -> str:
    """Digest the names, sizes and times of all files below `folder`, so that an edited data set is decoded anew."""
    digest = hashlib.sha256(repr(classes).encode())
    for directory, _, _ in sorted(os.walk(folder)):
        with os.scandir(directory) as entries:
            facts = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
        digest.update(repr((directory, facts)).encode())
    return digest.hexdigest()[:16]


def decode(root: Path, split: str) -> np.ndarray:
    """Return the n labels of a split, and then its n × 3,072 pixel values, as one flat array of bytes."""
    from torchvision.datasets import CIFAR10, ImageFolder  # here, for they take as long to import as all of torch

    try:
        if not (root / "train").is_dir():
            original = CIFAR10(root, train=split == "train")
            return np.concatenate([np.array(original.targets, np.uint8), original.data.ravel()])
        folder, classes = ImageFolder(root / split), ImageFolder(root / "train").classes
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no usable data in {root}: {error}; remove or mend it") from None
    if len(classes) != CLASSES or folder.classes != classes:
        raise ValueError(f"{root / split} has the {len(folder.classes)} classes {', '.join(folder.classes)}; "
                         f"{CLASSES} are needed, the same in train/ and test/")  # fmt: skip
    decoded = np.empty(len(folder) * (PIXELS + 1), np.uint8)
    decoded[: len(folder)] = folder.targets
    pixels = decoded[len(folder) :].reshape(-1, PIXELS)
    for row, (path, _) in enumerate(tqdm(folder.samples, f"reading {split} images", leave=False, disable=None)):
        try:
            pixels[row] = np.asarray(folder.loader(path).resize((32, 32))).ravel()
        except Exception as error:  # each format has its own
            raise ValueError(f"image {path} is damaged: {error}") from None
    return decoded


def embedded_data(samples: int, seed: int) -> Data:
    """Generate images of ten coarse patterns, each a few pixels off its place and covered with noise."""
    patterns = np.random.default_rng(0).integers(0, 60, (CLASSES, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    moved = np.stack([np.roll(patterns, (i // 9 - 4, i % 9 - 4), (1, 2)) for i in range(81)], axis=1)
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    images = moved[labels, random.integers(81, size=samples)] + random.integers(0, 196, (samples, 32, 32, 3), np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


# ------------------------------------------------------------------------------------------------------- command


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and move it there once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}-{os.getpid()}.unfinished{path.suffix}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", metavar="DIR", help="images in DIR/train/<class>/ and DIR/test/<class>/, or CIFAR-10")
    parser.add_argument("--epochs", type=number(int, 1), default=5, metavar="N")
    parser.add_argument("--batch-size", type=number(int, 1), default=32, metavar="N")
    parser.add_argument("--lr", type=number(float, 1e-9), default=0.007, metavar="F", help="learning rate")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/centralized"), metavar="DIR", help="for model.pt")
    args = parser.parse_args()
    try:
        pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"cifar.py: {error}")
    except KeyboardInterrupt:
        sys.exit("cifar.py: stopped")


def run(args: argparse.Namespace) -> None:
    """Train for `args.epochs`, and print a line and save the model after each."""
    device = pick_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written should show before the training
    source = find_data(args.data)
    train_data, test_data = load_data(source)
    print(f"{len(train_data[1]):,} training and {len(test_data[1]):,} test images: {source}; device: {device}")
    print("epoch  train loss  test loss  accuracy  seconds")
    torch.manual_seed(args.seed)
    net = Net()
    started = time.perf_counter()

    def after_epoch(epoch: int, train_loss: float) -> None:
        seconds = time.perf_counter() - started
        test_loss, accuracy = test(net, test_data, device=args.device)
        print(f"{epoch:5}  {train_loss:10.4f}  {test_loss:9.4f}  {accuracy:8.4f}  {seconds:7.1f}", flush=True)
        torch.save(net.state_dict(), model := io.BytesIO())
        write_atomically(args.out / "model.pt", lambda path: path.write_bytes(model.getvalue()))

    train(
        net, train_data, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        device=args.device, after_epoch=after_epoch,
    )  # fmt: skip
    print(f"saved {args.out / 'model.pt'}")


def number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    """Return an argparse type for a `kind` of number between `least` and 2³¹ - 1."""

    def parse(text: str) -> float:
        if not least <= (value := kind(text)) < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {least} to {2**31 - 1} is allowed")
        return value

    parse.__name__ = kind.__name__
    return parse


if __name__ == "__main__":
    main()
