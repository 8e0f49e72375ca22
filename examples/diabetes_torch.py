"""Predict how far diabetes has progressed after a year: regression, in plain PyTorch.

    python examples/diabetes_torch.py                 # 20 epochs, 0.3 s on one core
    python examples/diabetes_torch.py --epochs 50 --lr 0.001

The data come with scikit-learn: ten measurements of each of 442 patients, such as age and blood pressure, and a score
between 25 and 346. Predictions are 44.9 ± 0.7 points off on average, with an R² of 0.34 ± 0.02 (five seeds). The mean
score as a prediction is 59.2 points off.
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

try:
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    sys.exit(f"diabetes_torch.py: {error}; install what it needs by: pip install '.[sklearn]'")

Data = tuple[Tensor, Tensor]  # measurements (n, 10) float32 of variance 1, scores (n,) float32

MEAN, DEVIATION = 152.0, 77.0  # of all scores


class Net(nn.Module):
    """One hidden layer: (n, 10) measurements to (n,) scores; 385 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x).squeeze(1) * DEVIATION + MEAN
        return scores


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)`, of 353 and 89 patients. Raises ValueError if `root` is given."""
    if root:
        raise ValueError(f"there are no data to read from {root}: they come with scikit-learn; name no folder")
    measurements, scores = load_diabetes(return_X_y=True)
    x = torch.from_numpy(measurements * len(scores) ** 0.5).float()  # each column has a sum of squares of 1
    x_train, x_test, y_train, y_test = train_test_split(
        x, torch.from_numpy(scores).float(), test_size=0.2, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def train(
    net: nn.Module, data: Data, *, epochs: int = 20, lr: float = 0.003, batch_size: int = 32, momentum: float = 0.9,
    weight_decay: float = 0.001, seed: int = 0,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:  # fmt: skip
    """Train `net` in place with SGD and return the mean loss per patient of the last epoch.

    Each epoch visits every patient once, in an order drawn from `seed + epoch` (counted from 0), so that E calls
    of one epoch see the batches of one call of E. `after_epoch(epoch, loss)` is called after each, from 1.
    """
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    for epoch in range(epochs):
        total = 0.0
        net.train()
        for rows in torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + epoch)).split(batch_size):
            loss = relative_error(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        after_epoch(epoch + 1, total / len(y))
    return total / len(y)


@torch.no_grad()
def test(net: nn.Module, data: Data) -> tuple[float, dict[str, float]]:
    """Return the mean loss per patient, and the mean absolute error in points and R² of `net` on `data`.

    R² is 0 if the scores do not vary, as with a single patient.
    """
    x, y = data
    scores = net.eval()(x)
    variance = y.var(correction=0)
    r2 = 1 - F.mse_loss(scores, y) / variance if variance > 0 else variance
    return relative_error(scores, y).item(), {"mae": F.l1_loss(scores, y).item(), "r2": r2.item()}


def relative_error(scores: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error as a share of the variance of all scores: predicting MEAN gives about 1."""
    return F.mse_loss(scores, y) / DEVIATION**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--epochs", type=int, default=20, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--lr", type=float, default=0.003, metavar="F", help="learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/diabetes_torch"), metavar="DIR", help="for model.pt")
    args = parser.parse_args()
    for option, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0}.items():
        if not least <= (value := getattr(args, option)) < 2**31:
            parser.error(f"argument --{option.replace('_', '-')}: {value} is not in the range {least} to {2**31 - 1}")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"diabetes_torch.py: {error}")
    except KeyboardInterrupt:
        sys.exit("diabetes_torch.py: stopped")


def run(args: argparse.Namespace) -> None:
    """Train for `args.epochs`, print a line after each, and save the model."""
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written should show before the training
    train_data, test_data = load_data()
    print(f"{len(train_data[1])} training and {len(test_data[1])} test patients")
    print("epoch  train loss  test loss    mae      r2  seconds")
    torch.manual_seed(args.seed)
    net = Net()
    started = time.perf_counter()

    def after_epoch(epoch: int, train_loss: float) -> None:
        test_loss, metrics = test(net, test_data)
        print(f"{epoch:5}  {train_loss:10.4f}  {test_loss:9.4f}  {metrics['mae']:5.1f}  {metrics['r2']:6.3f}  "
              f"{time.perf_counter() - started:7.1f}", flush=True)  # fmt: skip

    train(
        net, train_data, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        after_epoch=after_epoch,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.out) as folder:  # so that model.pt is never seen half written
        torch.save(net.state_dict(), part := Path(folder, "model.pt"))
        part.replace(args.out / "model.pt")
    print(f"saved {args.out / 'model.pt'}")


if __name__ == "__main__":
    main()
