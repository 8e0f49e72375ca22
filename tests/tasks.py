"""Scripts that the project has never seen: for tests of all but the training, and for tests of what scripts may be."""

from pathlib import Path

import numpy as np

# So small that its training takes no time, and its import little.
TINY = """
import torch
import torch.nn.functional as F
from torch import nn

def Net():
    return nn.Linear(256, 10)

def load_data(root=None):
    if root:
        raise ValueError(f"{root} does not exist")
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

# The same model without PyTorch, which each command of a federation would import for seconds.
TINY_NUMPY = """
import numpy as np

def Net():
    return {"weight": np.random.uniform(-1 / 16, 1 / 16, (10, 256)).astype("f"), "bias": np.zeros(10, "f")}

def load_data(root=None):
    if root:
        raise ValueError(f"{root} does not exist")
    x = np.random.default_rng(0).standard_normal((90, 256), "f")
    return (x[:62], x[:62, :10].argmax(1)), (x[62:], x[62:, :10].argmax(1))

def train(net, data, *, epochs, lr=0.1, batch_size, seed):
    for epoch in range(epochs):
        order = np.random.default_rng(seed + epoch).permutation(len(data[1]))
        for rows in np.split(order, range(8, len(order), 8)):
            error = probabilities(net, data[0][rows]) - np.eye(10, dtype="f")[data[1][rows]]
            net["weight"] -= lr * error.T @ data[0][rows] / len(rows)
            net["bias"] -= lr * error.mean(0)
    return test(net, data)[0]

def test(net, data):
    found = probabilities(net, data[0])
    return -float(np.log(found[range(len(found)), data[1]]).mean()), float((found.argmax(1) == data[1]).mean())

def probabilities(net, x):
    odds = np.exp(x @ net["weight"].T + net["bias"])
    return odds / odds.sum(1, keepdims=True)
"""


def held_by(path: Path) -> str:
    """Return the tiny task, whose training waits for as long as there is a file at `path`."""
    wait = f"    while os.path.exists({str(path)!r}):\n        time.sleep(0.1)\n"
    start = "    for epoch in range(epochs):\n"
    assert start in TINY_NUMPY
    return "import os, time\n" + TINY_NUMPY.replace(start, wait + start)


# A user's own: with its data and a helper beside it, and with what is easily lost on the way.
OWN = """
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        import helper

        super().__init__()
        self.first = nn.Linear(8, helper.WIDTH)
        self.norm = nn.BatchNorm1d(helper.WIDTH)
        self.last = nn.Linear(helper.WIDTH, 3)
        self.last.weight = nn.Parameter(0.1 * torch.randn(helper.WIDTH, 3).t())
        self.register_buffer("scale", torch.arange(6.0)[::2] + 1)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x)))) * self.scale

def load_data(root=None):
    with np.load(Path(root or Path(__file__).parent / "data") / "samples.npz") as saved:
        x, y = torch.from_numpy(saved["x"]), torch.from_numpy(saved["y"])
    return (x[:200], y[:200]), (x[200:], y[200:])

def train(net, data, *, epochs, lr=0.1, batch_size=32, seed=0, momentum=0.0):
    x, y = data
    inner = [*net.first.parameters(), *net.norm.parameters()]
    groups = [{"params": inner}, {"params": net.last.parameters(), "weight_decay": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    net.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + epoch)).split(batch_size):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
    return total / len(y)

@torch.no_grad()
def test(net, data):
    logits = net.eval()(data[0])
    return F.cross_entropy(logits, data[1]).item(), (logits.argmax(1) == data[1]).double().mean().item()

if __name__ == "__main__":
    training, testing = load_data()
    net = Net()
    train(net, training, epochs=20)
    print(f"accuracy {test(net, testing)[1]:.3f}")
"""


def write_own(folder: Path) -> None:
    """Make a folder of a script of one's own, `my_script`, with its helper and its data."""
    (folder / "data").mkdir(parents=True)
    random = np.random.default_rng(0)
    x, directions = random.normal(size=(300, 8)).astype(np.float32), random.normal(size=(8, 3))
    np.savez(folder / "data" / "samples.npz", x=x, y=(x @ directions).argmax(1))
    (folder / "my_script.py").write_text(OWN)
    (folder / "helper.py").write_text("WIDTH = 16\n")


def write_digits(folder: Path) -> None:
    """Make 600 training and 200 test images of ten patterns, in the files of MNIST and of Fashion-MNIST."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 60, (10, 7, 7), np.uint8).repeat(4, 1).repeat(4, 2)
    for split, count in (("train", 600), ("t10k", 200)):
        labels = random.integers(10, size=count).astype(np.uint8)
        images = patterns[labels] * 3 + random.integers(0, 70, (count, 28, 28), np.uint8)
        for name in ("MNIST", "FashionMNIST"):
            raw = folder / name / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for file, array in (("images-idx3", images), ("labels-idx1", labels)):
                head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
                (raw / f"{split}-{file}-ubyte").write_bytes(head + array.tobytes())
