"""A task to start from: it trains a small model on generated data. Replace what is in each of the four functions.

python skeleton.py              # trains it here, with nothing federated
federate check skeleton         # can it be federated?
federate server --task skeleton --simulate 2
"""

import torch
import torch.nn.functional as F
from torch import nn


def Net():
    """Build the model, freshly initialized. The random generators are seeded before each call.

    This one takes samples x of shape (samples, 16), and returns a score for each of four classes, (samples, 4).
    """
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def load_data(root=None):
    """Return `(x_train, y_train), (x_test, y_test)`: all samples and labels, as arrays or tensors.

    Each has a row for each sample: here x has the shape (samples, 16), and y has a class from 0 to 3 for each, in the
    shape (samples,). `root` is what --data names, None without it. Every process calls this, so it should be fast the
    second time.
    """
    random = torch.Generator().manual_seed(0)
    x, directions = torch.randn(1200, 16, generator=random), torch.randn(16, 4, generator=random)
    y = (x @ directions).argmax(1)
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def train(net, data, *, epochs=3, lr=0.1, batch_size=32, seed=0):
    """Train `net` in place on `data = (x, y)`, and return the mean loss per sample of the last epoch.

    A client calls this in each round, with its own samples. `epochs` is how many times each of them is used, `lr` the
    learning rate, `batch_size` the number of samples in a step, and everything random comes from `seed`. The defaults
    are for training without a federation, except that of `lr`: clients use it, too, unless the run config has a
    learning-rate.
    """
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + epoch))  # another one each epoch
        total = 0.0
        for rows in order.split(batch_size):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
    return total / len(y)


@torch.no_grad()
def test(net, data):
    """Return the mean loss per sample of `data = (x, y)`, and the accuracy in 0..1."""
    x, y = data
    outputs = net.eval()(x)
    return F.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).double().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)  # so that each run starts from the same initial weights
    train_data, test_data = load_data()
    net = Net()
    print(f"mean training loss {train(net, train_data):.4f}")
    print("mean test loss {:.4f}, accuracy {:.4f}".format(*test(net, test_data)))
