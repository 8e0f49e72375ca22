"""FedAvg without a framework: worker processes train their share of the clients and return the sum."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from common import BATCH_SIZE, SEED, RoundLog, client_seed, read_options, split
from numpy.typing import NDArray

import cifar

Weights = dict[str, NDArray[Any]]


class Worker:
    """Runs a share of the clients, in its own process."""

    def __init__(self, data: str, clients: int) -> None:
        torch.set_num_threads(1)
        self.net = cifar.Net()
        self.images, self.labels = cifar.load_data(data)[0]
        self.partitions = split(len(self.labels), clients)

    def train(self, weights: Weights, clients: list[int], server_round: int) -> Weights:
        """Return the sum of the clients' weights, each multiplied by its number of samples."""
        totals = {name: np.zeros_like(array) for name, array in weights.items()}
        for client in clients:
            rows = self.partitions[client]
            samples = self.images[rows], self.labels[rows]
            self.net.load_state_dict(to_tensors(weights))
            cifar.train(self.net, samples, epochs=1, batch_size=BATCH_SIZE, seed=client_seed(client, server_round))
            for name, tensor in self.net.state_dict().items():
                totals[name] += tensor.numpy() * len(rows)
        return totals


def to_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in weights.items()}


def start_worker(data: str, clients: int) -> None:
    global worker
    worker = Worker(data, clients)


def train_share(weights: Weights, clients: list[int], server_round: int) -> Weights:
    return worker.train(weights, clients, server_round)


def main() -> None:
    options = read_options()
    log = RoundLog(options.out)
    (_, labels), test_data = cifar.load_data(options.data)
    torch.manual_seed(SEED)
    net = cifar.Net()
    log.add(0, cifar.test(net, test_data)[1])
    shares = [list(range(options.clients))[first :: options.workers] for first in range(options.workers)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn, start_worker, (options.data, options.clients)) as pool:
        for server_round in range(1, options.rounds + 1):
            weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
            sums = list(pool.map(train_share, *zip(*((weights, share, server_round) for share in shares), strict=True)))
            net.load_state_dict(to_tensors({name: sum(each[name] for each in sums) / len(labels) for name in weights}))
            log.add(options.clients, cifar.test(net, test_data)[1])


if __name__ == "__main__":
    main()
