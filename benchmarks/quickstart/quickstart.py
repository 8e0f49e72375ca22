"""CIFAR-10 as in Flower's quickstart-pytorch: a DataLoader over PIL images, created for every message."""

import json
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, ToTensor

client = ClientApp()
server = ServerApp()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lenet() -> nn.Sequential:
    """Build the network of cifar.py."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


@cache  # like the quickstart, which keeps its list of samples in the process
def images(root: str, split: str) -> ImageFolder:
    return ImageFolder(Path(root, split), Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]))


def partition(context: Context, *, training: bool) -> DataLoader:
    """Return this client's samples for training, by default 80 %, or the rest, for evaluation."""
    folder = images(str(context.run_config["data"]), "train")
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist()
    own = order[context.node_config["partition-id"] :: context.node_config["num-partitions"]]
    cut = int(context.run_config["train-share"] * len(own))
    rows = own[:cut] if training else own[cut:]
    return DataLoader(Subset(folder, rows), batch_size=context.run_config["batch-size"], shuffle=training)


def fit(net: nn.Module, batches: DataLoader, epochs: int, lr: float, weight_decay: float) -> float:
    parameters = net.to(device).train().parameters()
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    total = 0.0
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(batches))


@torch.no_grad()
def score(net: nn.Module, batches: DataLoader) -> dict[str, float]:
    net.to(device).eval()
    loss, correct, samples = 0.0, 0, len(batches.dataset)
    for x, y in batches:
        logits = net(x.to(device)).cpu()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    return {"loss": loss / samples, "accuracy": correct / samples}


@client.train()
def train(message: Message, context: Context) -> Message:
    config, batches, net = context.run_config, partition(context, training=True), lenet()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = fit(net, batches, config["local-epochs"], config["learning-rate"], config["weight-decay"])
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(batches.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    batches, net = partition(context, training=False), lenet()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord(score(net, batches) | {"num-examples": len(batches.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config, net, ends = context.run_config, lenet(), []

    def central_test(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        metrics = score(net, DataLoader(images(str(config["data"]), "test"), batch_size=128))
        ends.append(time.perf_counter())  # of round 0, 1, …
        return MetricRecord(metrics)

    nodes, rounds = int(config["min-nodes"]), int(config["num-server-rounds"])
    strategy = FedAvg(
        fraction_evaluate=config["fraction-evaluate"], min_train_nodes=nodes, min_available_nodes=nodes,
        train_metrics_aggr_fn=lambda replies, _: MetricRecord({"clients": len(replies)}),
    )  # fmt: skip
    result = strategy.start(grid, ArrayRecord(net.state_dict()), num_rounds=rounds, evaluate_fn=central_test)
    trained = [int(result.train_metrics_clientapp[number]["clients"]) for number in range(1, rounds + 1)]
    seconds = [end - start for start, end in pairwise(ends)]
    final = dict(result.evaluate_metrics_serverapp[rounds])
    print(f"result {json.dumps(final | {'clients': trained, 'seconds': seconds})}", flush=True)
