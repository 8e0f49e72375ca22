"""The convolutional network of McMahan et al. 2017 for MNIST, as a task of mcmahan.py.

SGD is plain: without momentum and weight decay. Pixels are in 0..1, and the initial weights are PyTorch's. The data are
found and read as in examples/mnist_jax.py: `python server.py --task benchmarks.mcmahan_cnn --data mnist.npz`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import pick_device
from examples import mnist_jax
from examples.mnist_jax import find_data

__all__ = ["Net", "find_data", "load_data", "test", "train"]

Data = tuple[Tensor, Tensor]  # images (n, 28, 28) uint8, labels (n,) int64


class Net(nn.Module):
    """Two convolutions and two dense layers, 1,663,370 parameters: (n, 1, 28, 28) floats to (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding="same")
        self.conv2 = nn.Conv2d(32, 64, 5, padding="same")
        self.fc1 = nn.Linear(7 * 7 * 64, 512)
        self.fc2 = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # the same as pooling last, on a quarter of the numbers
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


@functools.cache
def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)`. Raises ValueError if the file is damaged."""
    train, test = (tuple(map(torch.from_numpy, split)) for split in mnist_jax.load_data(root))
    return train, test


def train(
    net: nn.Module, data: Data, *, epochs: int = 5, lr: float = 0.1, batch_size: int = 10, seed: int = 0
) -> float:
    """Train `net` in place with SGD and return the mean loss per sample of the last epoch."""
    net.to(pick_device("auto"), memory_format=torch.channels_last).train()
    images, labels = scaled(data[0]), data[1].to(pick_device("auto"))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, fused=True)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + epoch)).to(labels.device)
        total = torch.zeros((), device=labels.device)
        for x, y in zip(*(part[order].split(batch_size) for part in (images, labels)), strict=True):
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
    return total.item() / len(labels)


@torch.no_grad()
def test(net: nn.Module, data: Data) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    net.to(pick_device("auto"), memory_format=torch.channels_last).eval()
    logits = torch.cat([net(scaled(images)) for images in data[0].split(500)])
    labels = data[1].to(logits.device)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def scaled(images: Tensor) -> Tensor:
    """Turn (n, 28, 28) bytes into (n, 1, 28, 28) floats in 0..1, on the device of the training."""
    return images.to(pick_device("auto"))[:, None].float().div_(255)
