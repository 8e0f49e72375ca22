"""The script of an exercise: cifar.py, where some of the clients send noise instead of what they have learned.

`train-arguments='bad=2'` lets the first two clients add Gaussian noise to each weight after their training:

    python server.py --simulate 10 --task benchmarks.bad_clients --run-config "train-arguments='bad=2'"
"""

import torch
from torch import nn

from cifar import Net, test
from cifar import train as train_well
from cifar_data import Data, find_data, load_data

__all__ = ["Net", "find_data", "load_data", "test", "train"]

SEEDS = 1_000_003  # how far apart the seeds are that two clients get


def train(
    net: nn.Module, data: Data, *, epochs: int = 5, lr: float = 0.007, batch_size: int = 32, seed: int = 0,
    bad: int = 0, noise: float = 1.0,
) -> float:  # fmt: skip
    """Train as cifar.py does. The first `bad` clients then spoil their model by noise with that standard deviation."""
    loss = train_well(net, data, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    if seed // SEEDS < bad:
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weights in net.parameters():
                weights += noise * torch.randn(weights.shape, generator=random).to(weights.device)
    return loss
