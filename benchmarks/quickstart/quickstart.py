"""CIFAR-10 as in Flower's quickstart-pytorch: a DataLoader over PIL images, created for every message."""

import json
from functools import cache
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
    """Return 80 % of this client's samples for training, the rest for evaluation."""
    folder = images(str(context.run_config["data"]), "train")
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist()
    own = order[context.node_config["partition-id"] :: context.node_config["num-partitions"]]
    cut = int(0.8 * len(own))
    rows = own[:cut] if training else own[cut:]
    return DataLoader(Subset(folder, rows), batch_size=context.run_config["batch-size"], shuffle=training)


def fit(net: nn.Module, batches: DataLoader, epochs: int, lr: float) -> float:
    optimizer = torch.optim.SGD(net.to(device).train().parameters(), lr=lr, momentum=0.9)
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
    loss = fit(net, batches, config["local-epochs"], config["learning-rate"])
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
    config, net = context.run_config, lenet()

    def central_test(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(score(net, DataLoader(images(str(config["data"]), "test"), batch_size=128)))

    rounds = int(config["num-server-rounds"])
    result = FedAvg().start(grid, ArrayRecord(net.state_dict()), num_rounds=rounds, evaluate_fn=central_test)
    print(f"result {json.dumps(dict(result.evaluate_metrics_serverapp[rounds]))}", flush=True)
