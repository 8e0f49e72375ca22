"""Train a small convolutional network on CIFAR-10, in plain PyTorch.

    python cifar.py                      # 5 epochs, about half a minute on two cores
    python cifar.py --data DIR --epochs 10

The network is the one of PyTorch's 60-minute blitz: two convolutions, three linear layers, 62,006 parameters.
Images stay in memory as bytes and are normalised a batch at a time, so an epoch does no Python work per image.
cifar_data.py finds and reads the images.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cifar_data import Data, find_data, load_data, save


class Net(nn.Module):
    """LeNet for 32×32 colour images: (n, 3, 32, 32) float32 to (n, classes) logits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


def train(
    net: nn.Module, data: Data, *, epochs: int = 5, lr: float = 0.007, batch_size: int = 32, momentum: float = 0.9,
    weight_decay: float = 5e-4, seed: int = 0, device: str = "auto",
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:  # fmt: skip
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
            batch = normalise(images.index_select(0, rows))  # copies whole rows: faster than images[rows]
            loss = F.cross_entropy(net(batch), labels[rows])
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
    """Return the device called `name`; "auto" is the accelerator of this machine, or its CPU if it has none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(name) if name != "auto" else accelerator or torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", metavar="DIR", help="images in DIR/train/<class>/ and DIR/test/<class>/, or CIFAR-10")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--lr", type=float, default=0.007, metavar="F", help="learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", choices=sorted({"auto", "cpu", pick_device("auto").type}), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/centralized"), metavar="DIR", help="for model.pt")
    args = parser.parse_args()
    for option, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0}.items():
        if not least <= (value := getattr(args, option)) < 2**31:
            parser.error(f"argument --{option.replace('_', '-')}: {value} is not in the range {least} to {2**31 - 1}")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"cifar.py: {error}")
    except KeyboardInterrupt:
        sys.exit("cifar.py: stopped")


def run(args: argparse.Namespace) -> None:
    """Train for `args.epochs`, and print a line and save the model after each."""
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written should show before the training
    source = find_data(args.data)
    train_data, test_data = load_data(source)
    print(f"{len(train_data[1]):,} training and {len(test_data[1]):,} test images: {source}; "
          f"device: {pick_device(args.device)}")  # fmt: skip
    print("epoch  train loss  test loss  accuracy  seconds")
    torch.manual_seed(args.seed)
    net = Net(int(train_data[1].max()) + 1)
    started = time.perf_counter()

    def after_epoch(epoch: int, train_loss: float) -> None:
        seconds = time.perf_counter() - started
        test_loss, accuracy = test(net, test_data, device=args.device)
        print(f"{epoch:5}  {train_loss:10.4f}  {test_loss:9.4f}  {accuracy:8.4f}  {seconds:7.1f}", flush=True)
        save(net.state_dict(), args.out / "model.pt")

    train(
        net, train_data, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        device=args.device, after_epoch=after_epoch,
    )  # fmt: skip
    print(f"saved {args.out / 'model.pt'}")


if __name__ == "__main__":
    main()
