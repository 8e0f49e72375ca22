"""The setting of Flower's baseline `niid_bench`, as a task of niid_bench.py: that of NIID-Bench (Li et al. 2022).

Network and data are those of cifar.py. SGD has lr 0.01, momentum 0.9 and weight decay 1e-5, and batches of 64; pixels
are in 0..1, and images are cropped at random after reflection padding of 4 pixels, and flipped at random.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import Data, Net, find_data, load_data, pick_device

__all__ = ["Net", "find_data", "load_data", "test", "train"]

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
        order, total = torch.randperm(len(labels), generator=random).to(device), torch.zeros((), device=device)
        shown = augmented(images[order], random)
        for x, y in zip(shown.split(batch_size), labels[order].split(batch_size), strict=True):
            loss = F.cross_entropy(net(scaled(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
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
    where = torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]
    return images[tuple(index.to(images.device) for index in where)]


def scaled(images: Tensor) -> Tensor:
    """Turn (n, 32, 32, 3) bytes into (n, 3, 32, 32) floats in 0..1."""
    return images.permute(0, 3, 1, 2).float().div_(255)
