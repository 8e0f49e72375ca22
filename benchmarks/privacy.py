"""Measure what differential privacy costs, and what it protects: accuracy and membership inference against epsilon.

    python benchmarks/privacy.py                 # about 20 minutes on one core; see --help
    python benchmarks/privacy.py --table         # only print the table of what has been measured

300 clients hold two images of CIFAR-10 each, and all of them train in every one of 20 rounds. The model is a linear
layer on random features that stay as they are: the noise has a component for each parameter, so that a model of few
parameters needs fewer clients. It is trained by cifar.train, and this file is the task, `benchmarks.privacy`. Each
seed has members of its own. The learning rate and the clipping norm were chosen by trying a few on these data, which
itself is not private.

The attack is that of Yeom et al. 2018 (section 3, a loss threshold): an image is taken for a member if its loss under
the final model is at most the mean training loss. Its advantage is the share of the members of which that is true, less
that of 10,000 other images of the training set: 0 for an attack that guesses, 1 for one that always knows.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (finds the number of threads in the environment)
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from cifar import Data, find_data, normalise, test, train  # noqa: E402
from cifar import load_data as load_images  # noqa: E402

__all__ = ["Net", "find_data", "load_data", "test", "train"]

CLIENTS, ROUNDS = 300, 20
MEMBERS, OTHERS = 600, 10_000
NORM = 1.0  # the clipping norm
MULTIPLIERS = (0.0, 0.5, 2.0, 8.0, 32.0)  # 0: no differential privacy
SETTING = {
    "num-clients": CLIENTS, "local-epochs": 5, "batch-size": 2, "learning-rate": 0.2,
    "fraction-evaluate": 0.0, "server-evaluation": False,
}  # fmt: skip
FILTERS, POOLED = 64, 3


class Net(nn.Module):
    """A linear layer on random features: (n, 3, 32, 32) float32 to (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        filters = torch.randn(FILTERS, 3, 6, 6, generator=torch.Generator().manual_seed(0)) / 108**0.5
        self.register_buffer("filters", filters, persistent=False)  # is not federated
        self.head = nn.Linear(2 * FILTERS * POOLED**2, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = F.conv2d(x, self.get_buffer("filters"), stride=2)
        halves = torch.cat([F.relu(found - 0.2), F.relu(-found - 0.2)], dim=1)
        pooled = F.adaptive_avg_pool2d(halves, POOLED).flatten(1)
        logits: Tensor = self.head(0.2 * F.layer_norm(pooled, pooled.shape[1:]))
        return logits


chosen: list[int] = [0]  # the seed by which members are


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return the members' images, and others: both from the training set of CIFAR-10."""
    (images, labels), _ = load_images(root)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(chosen[0]))
    members, others = order[:MEMBERS], order[MEMBERS : MEMBERS + OTHERS]
    return (images[members], labels[members]), (images[others], labels[others])


def advantage(members: Tensor, others: Tensor) -> float:
    """Return the advantage of the attack from the losses of members and of others."""
    threshold = members.mean()
    return float((members <= threshold).float().mean() - (others <= threshold).float().mean())


@torch.no_grad()
def attacked(path: Path, root: str) -> dict[str, float]:
    """Return what a final model has learnt, and what it gives away."""
    net = Net()
    net.load_state_dict(torch.load(path))
    members, others = load_data(root)
    logits = [torch.cat([net(normalise(part)) for part in data[0].split(500)]) for data in (members, others)]
    losses = [F.cross_entropy(*pair, reduction="none") for pair in zip(logits, (members[1], others[1]), strict=True)]
    hits = [
        float((found.argmax(1) == data[1]).float().mean())
        for found, data in zip(logits, (members, others), strict=True)
    ]
    accuracy = test(net, load_images(root)[1], device="cpu")[1]
    return {"accuracy": accuracy, "members": hits[0], "others": hits[1], "advantage": advantage(*losses)}


def run(multiplier: float, seed: int, rounds: int, out: Path, root: str) -> dict[str, Any]:
    """Train with the real client and server, in this process, and attack the final model."""
    chosen[:] = [seed]
    import logging

    from flwr.app import Context, RecordDict

    import server
    from tests.in_memory import InMemoryGrid, in_a_run

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    private = {"dp": "server-fixed", "dp-noise-multiplier": multiplier, "dp-clipping-norm": NORM} if multiplier else {}
    own = {"task": "benchmarks.privacy", "data": root, "out": str(out), "seed": seed, "num-server-rounds": rounds}
    config = SETTING | own | private
    with in_a_run():
        grid = InMemoryGrid(config, {1: {"partition-id": 0, "num-partitions": 1}})
        server.main(grid, Context(1, 0, {}, RecordDict(), config))
    last = json.loads((out / "metrics.json").read_text())["rounds"][-1]
    return {"epsilon": last.get("epsilon"), **attacked(out / "final_model.pt", root)}


def shown(results: dict[str, Any]) -> str:
    """Return the table: a row for each noise multiplier, with means and standard deviations over the seeds."""
    columns = ["noise multiplier", "ε", "accuracy, test set", "accuracy, members", "advantage", "at most", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for multiplier in sorted({float(key.split()[0]) for key in results}):
        cells = [cell for key, cell in results.items() if key.startswith(f"{multiplier} ")]
        if cells:
            spread = [_spread([cell[name] for cell in cells]) for name in ("accuracy", "members", "advantage")]
            epsilon, most = cells[0]["epsilon"], _most(cells[0]["epsilon"])
            named = [multiplier or "none", "-" if epsilon is None else f"{epsilon:.3g}"]
            row = [*named, *spread, f"{most:.2f}", len(cells)]
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _most(epsilon: float | None, delta: float = 1e-5) -> float:
    """Return the largest advantage that any attack can have (from Kairouz et al. 2015, theorem 2.1)."""
    return 1.0 if epsilon is None else min(1.0, 1 - 2 * (1 - delta) / (1 + math.exp(epsilon)))


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    from benchmarks.cells import load_cells, save_cells
    from benchmarks.privacy import run  # of the module that is the task

    parser = argparse.ArgumentParser(description=f"{__doc__.split(chr(10))[0]} Continues if it was interrupted.")
    parser.add_argument("--data", metavar="DIR", help="CIFAR-10")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks", metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--multipliers", type=float, nargs="+", default=MULTIPLIERS, metavar="F", help="of the noise")
    parser.add_argument("--table", action="store_true", help="print what has been measured, and measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    saved, root = args.out / "privacy.json", find_data(args.data)
    results = load_cells(saved)
    for seed in range(0 if args.table else args.seeds):
        for multiplier in args.multipliers:
            if (key := f"{multiplier} {seed}") not in results:
                results[key] = run(multiplier, seed, args.rounds, args.out / f"privacy-{multiplier}-{seed}", root)
                save_cells(saved, results)
                print(key, results[key], flush=True)
    print(shown(results))


if __name__ == "__main__":
    main()
