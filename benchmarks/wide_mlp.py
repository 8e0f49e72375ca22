"""A task with a model of any size, the training of which is a single step: a perceptron with two hidden layers.

The environment variable PARAMETERS says how many it has, about: `PARAMETERS=1000000 python server.py --task
benchmarks.wide_mlp`. The samples are random numbers.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUTS, CLASSES = 1024, 10
Data = tuple[Tensor, Tensor]


def Net() -> nn.Module:
    width = width_of(int(os.environ.get("PARAMETERS", "62000")))
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def width_of(parameters: int) -> int:
    """Return the width of both hidden layers: w^2 + (INPUTS + CLASSES + 2) w + CLASSES is the number of parameters."""
    linear = INPUTS + CLASSES + 2
    return round((math.sqrt(linear**2 + 4 * (parameters - CLASSES)) - linear) / 2)


def load_data(root: str | None = None) -> tuple[Data, Data]:
    x = torch.randn(160, INPUTS, generator=torch.Generator().manual_seed(0))
    y = x[:, :CLASSES].argmax(1)
    return (x[:128], y[:128]), (x[128:], y[128:])


def train(net: nn.Module, data: Data, *, epochs: int, lr: float = 0.01, batch_size: int = 32, seed: int = 0) -> float:
    x, y = data[0][:batch_size], data[1][:batch_size]
    loss = F.cross_entropy(net(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():  # torch.optim would take seconds to import
        for weights in net.parameters():
            weights -= lr * weights.grad  # type: ignore[operator]
            weights.grad = None
    return loss.item()


@torch.no_grad()
def test(net: nn.Module, data: Data) -> tuple[float, float]:
    logits = net(data[0])
    return F.cross_entropy(logits, data[1]).item(), (logits.argmax(1) == data[1]).double().mean().item()
