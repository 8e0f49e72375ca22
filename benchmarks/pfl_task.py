"""The network, the training and the images of pfl-research's benchmark with CIFAR-10, as a task of pfl_cifar.py.

Written from benchmarks/model/pytorch/cnn.py and benchmarks/dataset/cifar10 of github.com/apple/pfl-research. The script
there that prepares the images takes the bytes of CIFAR-10, a plane per colour, for pixels of three colours each, and so
the network sees each image in a third of its height, three times below one another, with neighbouring pixels as its
colours. What was published was measured with these images, so they are used here, too.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import pick_device
from cifar_data import Data, find_data
from cifar_data import load_data as load_images

__all__ = ["Net", "find_data", "load_data", "test", "train"]

MEAN, DEVIATION = 120.69, 63.86  # of the bytes of the training images; to 0.01 the same for all three colours


class Net(nn.Module):
    """Two convolutions and two dense layers, 1,626,442 parameters: (n, 3, 32, 32) floats to (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(14 * 14 * 64, 128)
        self.fc2 = nn.Linear(128, 10)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        x = F.dropout(F.relu(x), 0.25, self.training)  # the same as pooling last, on a quarter of the numbers
        x = F.dropout(F.relu(self.fc1(x.flatten(1))), 0.5, self.training)
        logits: Tensor = self.fc2(x)
        return logits


@functools.cache
def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)`, images as (n, 32, 32, 3) bytes in the order described above."""
    train, test = ((reordered(images), labels) for images, labels in load_images(root))
    return train, test


def reordered(images: Tensor) -> Tensor:
    """Return (n, 32, 32, 3) images whose bytes are those of the colour planes, one plane after another."""
    return images.permute(0, 3, 1, 2).reshape(images.shape)


def train(
    net: nn.Module, data: Data, *, epochs: int = 1, lr: float = 0.1, batch_size: int = 10, seed: int = 0
) -> float:
    """Train `net` in place with plain SGD and return the mean loss per sample of the last epoch."""
    net.to(pick_device("auto"), memory_format=torch.channels_last).train()
    images, labels = scaled(data[0]), data[1].to(pick_device("auto"))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, fused=True)
    with torch.random.fork_rng():  # dropout draws from the global generator
        for epoch in range(epochs):
            torch.manual_seed(seed + epoch)
            order, total = torch.randperm(len(labels)).to(labels.device), torch.zeros((), device=labels.device)
            for rows in order.split(batch_size):
                loss = F.cross_entropy(net(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(rows)
    return total.item() / len(labels)


@torch.no_grad()
def test(net: nn.Module, data: Data) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    net.to(pick_device("auto"), memory_format=torch.channels_last).eval()
    logits = torch.cat([net(scaled(images)) for images in data[0].split(500)])
    labels = data[1].to(logits.device)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def scaled(images: Tensor) -> Tensor:
    """Turn (n, 32, 32, 3) bytes into (n, 3, 32, 32) floats of mean 0 and deviation 1, on the device of the training."""
    return images.to(pick_device("auto")).permute(0, 3, 1, 2).float().sub_(MEAN).div_(DEVIATION)
