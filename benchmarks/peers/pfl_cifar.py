"""pfl-research 0.6 on its own benchmark with CIFAR-10, in one process. Requires: pip install "pfl[pytorch]" tqdm.

pfl_cifar.py starts it, and starts it again to go on: every tenth round, the model is tested and saved with the log of
the rounds. The network, the images, the users' samples and the optimizer are those of pfl_task.py, and the users of a
round are drawn without replacement, as there. Which ones these are, and the dropout, differ.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import SEED, RoundLog, read_options, split
from pfl.aggregate.base import get_num_devices_weight_name
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.callback.base import TrainingProcessCallback
from pfl.common_types import Population
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl_research import Averaging, CentralTest

from benchmarks import pfl_task

COHORT, BATCH_SIZE, RATE, EVERY = 50, 10, 0.1, 10
ACCURACY = StringMetricName("Central val | accuracy")


class Net(pfl_task.Net):
    """The network, with the two functions that pfl requires."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.train()(images), labels)

    @torch.no_grad()
    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        correct = (self.eval()(images).argmax(1) == labels).sum().item()
        return {"accuracy": Weighted(correct, len(labels))}


class Cohorts:
    """Draws the users of one round after another, each round without replacement."""

    def __init__(self, users: int, rounds: int) -> None:
        self.users, self.rounds = users, rounds
        self.left: list[int] = []

    def __call__(self) -> int:
        if not self.left:
            self.rounds += 1
            self.left = np.random.default_rng([SEED, self.rounds]).permutation(self.users)[:COHORT].tolist()
        return self.left.pop()


class Record(TrainingProcessCallback):
    """Logs each round, and saves the model and the log after each test."""

    def __init__(self, log: RoundLog, file: Path) -> None:
        self.log, self.file = log, file

    def on_train_begin(self, *, model: Any) -> Metrics:
        if not self.log.rounds:
            self.log.add(0)
        self.log.started = time.perf_counter()  # the first round begins, whether or not it is that of the run
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
        users = aggregate_metrics[get_num_devices_weight_name(Population.TRAIN)]
        tested = ACCURACY in aggregate_metrics
        self.log.add(int(users), aggregate_metrics[ACCURACY].overall_value if tested else None)
        if tested:
            unfinished = self.file.with_suffix(".unfinished")  # so that the file is never seen half written
            torch.save({"weights": model.pytorch_model.state_dict(), "rounds": self.log.rounds}, unfinished)
            unfinished.replace(self.file)
        return False, Metrics()


def main() -> None:
    options = read_options()
    log, file = RoundLog(options.out), options.out / "checkpoint.pt"
    net = new_net()
    if file.exists():
        saved = torch.load(file, map_location="cpu")  # it may come from a GPU
        log.rounds = saved["rounds"]
        net.load_state_dict(saved["weights"])
    done = max(0, len(log.rounds) - 1)
    np.random.seed(SEED + done)
    torch.manual_seed(SEED + done)
    (images, labels), test_data = pfl_task.load_data(options.data)
    partitions = split(len(labels), options.clients)

    def shuffled(user: int) -> PyTorchTensorDataset:
        rows = partitions[user][torch.randperm(len(partitions[user]))]
        return PyTorchTensorDataset((pfl_task.scaled(images[rows]), labels[rows]), user_id=str(user))

    users = FederatedDataset(shuffled, Cohorts(options.clients, done))
    test = PyTorchTensorDataset((pfl_task.scaled(test_data[0]), test_data[1]))
    Averaging().run(
        NNAlgorithmParams(
            central_num_iterations=options.rounds - done, evaluation_frequency=1, train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        SimulatedBackend(users, users, [WeightByUser()]),
        PyTorchModel(net, partial(torch.optim.SGD, fused=True), torch.optim.SGD(net.parameters(), lr=1.0)),
        NNTrainHyperParams(local_batch_size=BATCH_SIZE, local_num_epochs=1, local_learning_rate=RATE),
        callbacks=[CentralTest(test, NNEvalHyperParams(local_batch_size=500), EVERY), Record(log, file)],
    )  # fmt: skip


def new_net() -> Net:
    torch.manual_seed(SEED)
    return Net().to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
