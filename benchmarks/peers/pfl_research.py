"""FedAvg in pfl-research 0.6, in the workers that torchrun starts. Requires: pip install "pfl[pytorch]==0.6.*" tqdm.

The optimizer, its settings, the batches and the weights of the mean are those of cifar.train and FedAvg. The
differences: samples are gathered once per round instead of once per batch, losses are not summed, and the workers share
the central test.
"""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import BATCH_SIZE, SEED, RoundLog, read_options, split
from pfl.aggregate.base import get_num_devices_weight_name
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.common_types import Population
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel

import cifar

DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(cifar.train).parameters.items()}


class Net(cifar.Net):
    """The network, with the two functions that pfl requires."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(cifar.normalise(images)), labels)

    @torch.no_grad()
    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        logits = self(cifar.normalise(images))
        loss = F.cross_entropy(logits, labels, reduction="sum").item()
        correct = (logits.argmax(1) == labels).sum().item()
        return {"loss": Weighted(loss, len(labels)), "accuracy": Weighted(correct, len(labels))}


class Averaging(FederatedAveraging):
    """FedAvg that never evaluates on the clients, which pfl does in the first round for any frequency."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        return contexts and tuple(replace(each, do_evaluation=False) for each in contexts), model, metrics


class CentralTest(CentralEvaluationCallback):
    """pfl's central test, of the initial model and after every round; pfl would count the initial one as the first."""

    def on_train_begin(self, *, model: Any) -> Metrics:
        super().on_train_begin(model=model)
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
        return super().after_central_iteration(aggregate_metrics, model, central_iteration=central_iteration + 1)


class Record(TrainingProcessCallback):
    """Logs each round, in the first worker."""

    def __init__(self, log: RoundLog) -> None:
        self.log = log

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.log.add(0)
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
        clients = aggregate_metrics[get_num_devices_weight_name(Population.TRAIN)]
        accuracy = aggregate_metrics[StringMetricName("Central val | accuracy")]
        self.log.add(int(clients), accuracy.overall_value)
        return False, Metrics()


def main() -> None:
    options = read_options()
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    (images, labels), test_data = cifar.load_data(options.data)
    partitions = split(len(labels), options.clients)

    def shuffled(client: int) -> PyTorchTensorDataset:
        rows = partitions[client][torch.randperm(len(partitions[client]))]
        return PyTorchTensorDataset((images[rows], labels[rows]), user_id=str(client))

    net = Net().to(memory_format=torch.channels_last)
    momentum, weight_decay = DEFAULTS["momentum"], DEFAULTS["weight_decay"]
    local_optimizer = partial(torch.optim.SGD, momentum=momentum, weight_decay=weight_decay, fused=True)
    model = PyTorchModel(net, local_optimizer, torch.optim.SGD(net.parameters(), lr=1.0))
    clients = FederatedDataset(shuffled, MinimizeReuseUserSampler(range(options.clients)))
    callbacks = [CentralTest(PyTorchTensorDataset(test_data), NNEvalHyperParams(local_batch_size=500))]
    callbacks += [Record(RoundLog(options.out))] if torch.distributed.get_rank() == 0 else []
    Averaging().run(
        NNAlgorithmParams(
            central_num_iterations=options.rounds, evaluation_frequency=1, train_cohort_size=options.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(clients, clients, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_batch_size=BATCH_SIZE, local_num_epochs=1, local_learning_rate=DEFAULTS["lr"],
        ),
        callbacks=callbacks,
    )  # fmt: skip
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
