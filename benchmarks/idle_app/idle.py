"""A Flower app whose clients import torch and do nothing. Its server times each round."""

import json
import time
from itertools import pairwise

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

SHAPES = {  # of the model in cifar.py, so that messages have the same size
    "conv1.weight": (6, 3, 5, 5), "conv1.bias": (6,), "conv2.weight": (16, 6, 5, 5), "conv2.bias": (16,),
    "fc1.weight": (120, 400), "fc1.bias": (120,), "fc2.weight": (84, 120), "fc2.bias": (84,),
    "fc3.weight": (10, 84), "fc3.bias": (10,),
}  # fmt: skip


@client.train()
def train(message: Message, context: Context) -> Message:
    records = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(records), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    ends: list[float] = []  # of round 0, 1, …

    def after_round(server_round: int, arrays: ArrayRecord) -> None:
        ends.append(time.perf_counter())

    rounds, clients = (int(context.run_config[key]) for key in ("num-server-rounds", "num-clients"))
    strategy = FedAvg(min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients)
    strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=after_round)
    seconds = [end - start for start, end in pairwise(ends)]
    print(f"result {json.dumps({'seconds': seconds})}", flush=True)
