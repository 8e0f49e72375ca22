"""Recognise handwritten digits with a small convolutional network, in Lightning.

    python examples/digits_lightning.py               # 10 epochs, 1.3 s on one core
    python examples/digits_lightning.py --epochs 20 --lr 0.01

The data come with scikit-learn: 1,797 images of 8×8 pixels, here as two PyTorch data sets instead of arrays.
Lightning's Trainer picks the device and runs the training loop. The accuracy is 0.978 ± 0.004 (five seeds).
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

try:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.callbacks import LambdaCallback
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    sys.exit(f"digits_lightning.py: {error}; install what it needs by: pip install '.[lightning]'")

Sample = tuple[Tensor, int]  # an image (1, 8, 8) float32 in -1..1, and its label

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False
}  # fmt: skip
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # or each Trainer lists the devices


class Digits(Dataset[Sample]):
    """Images and their labels, `targets`."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], int(self.targets[index])


class Net(LightningModule):
    """Two convolutions and a linear layer: (n, 1, 8, 8) images to (n, classes) logits; 6,090 parameters for ten."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.linear = nn.Linear(32 * 2 * 2, classes)
        self.optimizer_options: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.linear(x.flatten(1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.optimizer_options)


def load_data(root: str | None = None) -> tuple[Digits, Digits]:
    """Return 1,437 images for training and 360 for testing. Raises ValueError if `root` is given."""
    if root:
        raise ValueError(f"there are no data to read from {root}: they come with scikit-learn; name no folder")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 8 - 1).float().view(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(
        images, torch.from_numpy(labels), test_size=0.2, random_state=0, stratify=labels
    )
    return Digits(x_train, y_train), Digits(x_test, y_test)


def train(
    net: Net, data: Dataset[Sample], *, epochs: int = 10, lr: float = 0.05, batch_size: int = 32, momentum: float = 0.9,
    weight_decay: float = 0.0005, seed: int = 0,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:  # fmt: skip
    """Train `net` in place with SGD and return the mean loss per sample of the last epoch.

    Each epoch visits every sample once, in an order drawn from `seed + epoch` (counted from 0), so that E calls
    of one epoch see the batches of one call of E. `after_epoch(epoch, loss)` is called after each, from 1.
    """
    net.optimizer_options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    batches = DataLoader(data, batch_size, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=seed))
    losses: list[float] = []

    def on_train_epoch_end(trainer: Trainer, net: LightningModule) -> None:
        losses.append(trainer.callback_metrics["loss"].item())
        after_epoch(len(losses), losses[-1])
        net.train()

    net.train()
    trainer = Trainer(
        accelerator="auto", devices=1, max_epochs=epochs, deterministic=True, **QUIET,
        callbacks=[LambdaCallback(on_train_epoch_end=on_train_epoch_end)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")  # it recommends more worker processes
        trainer.fit(net, batches)
    return losses[-1]


@torch.no_grad()
def test(net: Net, data: Dataset[Sample], *, batch_size: int = 500) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    net.eval()
    loss, correct, samples = 0.0, 0, 0
    for images, labels in DataLoader(data, batch_size):
        labels = labels.to(net.device)
        logits = net(images.to(net.device))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
        samples += len(labels)
    return loss / samples, correct / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--epochs", type=int, default=10, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--lr", type=float, default=0.05, metavar="F", help="learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_lightning"), metavar="DIR", help="for model.pt")
    args = parser.parse_args()
    for option, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0}.items():
        if not least <= (value := getattr(args, option)) < 2**31:
            parser.error(f"argument --{option.replace('_', '-')}: {value} is not in the range {least} to {2**31 - 1}")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"digits_lightning.py: {error}")
    except (KeyboardInterrupt, SystemExit):  # the Trainer turns the first into the second
        sys.exit("digits_lightning.py: stopped")


def run(args: argparse.Namespace) -> None:
    """Train for `args.epochs`, and print a line and save the model after each."""
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written should show before the training
    train_data, test_data = load_data()
    print(f"{len(train_data):,} training and {len(test_data):,} test images")
    print("epoch  train loss  test loss  accuracy  seconds")
    torch.manual_seed(args.seed)
    net = Net()
    started = time.perf_counter()

    def after_epoch(epoch: int, train_loss: float) -> None:
        seconds = time.perf_counter() - started
        test_loss, accuracy = test(net, test_data)
        print(f"{epoch:5}  {train_loss:10.4f}  {test_loss:9.4f}  {accuracy:8.4f}  {seconds:7.1f}", flush=True)
        with tempfile.TemporaryDirectory(dir=args.out) as folder:  # so that model.pt is never seen half written
            torch.save(net.state_dict(), part := Path(folder, "model.pt"))
            part.replace(args.out / "model.pt")

    train(
        net, train_data, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        after_epoch=after_epoch,
    )  # fmt: skip
    print(f"saved {args.out / 'model.pt'}")


if __name__ == "__main__":
    main()
