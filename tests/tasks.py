"""A task so small that its training takes no time, and its import little: for tests of all but the training."""

TINY = """
import torch
import torch.nn.functional as F
from torch import nn

def Net():
    return nn.Linear(256, 10)

def load_data(root=None):
    x = torch.randn(90, 256, generator=torch.Generator().manual_seed(0))
    return (x[:62], x[:62, :10].argmax(1)), (x[62:], x[62:, :10].argmax(1))

def train(net, data, *, epochs, lr=0.1, batch_size, seed):
    for epoch in range(epochs):
        for rows in torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed + epoch)).split(8):
            loss = F.cross_entropy(net(data[0][rows]), data[1][rows])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():  # torch.optim would take seconds to import
                for weights, gradient in zip(net.parameters(), gradients):
                    weights -= lr * gradient
    return loss.item()

def test(net, data):
    with torch.no_grad():
        logits = net(data[0])
    return F.cross_entropy(logits, data[1]).item(), (logits.argmax(1) == data[1]).float().mean().item()
"""
