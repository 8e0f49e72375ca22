"""Federate cifar.py, or any other task, without changing a line of it: a client.

    python client.py                                  # joins the server on this machine
    python client.py --server HOST:PORT --data DIR    # joins another one, with the data in DIR

Flower calls the functions below when the server asks for them. None has a training loop: `train` calls the task's
own `train`, `evaluate` its `test`, on the samples that are this client's.
"""

import argparse
import time
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federation import certificates, hide_tensorflow, launch, network, weights
from federation.config import checked
from federation.console import say, tell
from federation.fingerprint import difference
from federation.mods import explain, play_clients
from federation.packing import packed_replies
from federation.sources import digests
from federation.task import build_net, client_seed, load_task, open_data

app = ClientApp(mods=[packed_replies, play_clients, explain])
hide_tensorflow.from_workers()  # here, because Flower imports this file before it starts them


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's training samples."""
    config, order, task = checked(context.run_config), instructions(message), open_task(context)
    started = time.perf_counter()
    x, y = own_samples("train", task, message, context)
    epochs_before = (order["server-round"] - 1) * config["local-epochs"]
    seed = client_seed(config["seed"], order["position"], epochs_before)
    net = build_net(task, seed)
    weights.to_net(message.content.array_records["arrays"], net)
    loss = task.train(
        net,
        (x, y),
        epochs=config["local-epochs"],
        batch_size=config["batch-size"],
        seed=seed,
        **({"lr": config["learning-rate"]} if config["learning-rate"] else {}),
    )
    seconds = time.perf_counter() - started
    say(f"round {order['server-round']}: trained on {len(y):,} samples, loss {loss:.4f}, {seconds:.1f} s")
    metrics = MetricRecord({"num-examples": len(y), "train-loss": float(loss), "seconds": seconds})
    return answer(message, arrays=weights.from_net(net), metrics=metrics)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on this client's test samples."""
    task = open_task(context)
    started = time.perf_counter()
    x, y = own_samples("test", task, message, context)
    net = build_net(task, checked(context.run_config)["seed"])
    weights.to_net(message.content.array_records["arrays"], net)
    loss, accuracy = task.test(net, (x, y))
    seconds = time.perf_counter() - started
    say(f"round {instructions(message)['server-round']}: tested on {len(y):,} samples, accuracy {accuracy:.4f}")
    metrics = {"num-examples": len(y), "loss": float(loss), "accuracy": float(accuracy), "seconds": seconds}
    return answer(message, metrics=MetricRecord({**metrics}))


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Tell the server who this is, which partition it wants (-1: any), and which data it has."""
    node, task, server = context.node_config, open_task(context), instructions(message)
    data, found = load_data(task, message, context)
    own = "it was started with --own-data" if node.get("own-data") else difference(found, server["fingerprint"])
    whose = f"of its own: {own}" if own else "at hand, a copy of the server's"
    say(f"joining with {len(data[0][1]):,} training and {len(data[1][1]):,} test samples {whose}")
    facts = {
        "name": node.get("name", ""),
        "partition-id": node.get("partition-id", -1),
        "num-partitions": node.get("num-partitions", 0),
        "key": node.get("key", ""),
        "clients": node.get("clients", 0),
        "flwr": version("flwr"),
        "files": digests(server["files"]),
        "own-data": own,
        "train-samples": len(data[0][1]),
        "test-samples": len(data[1][1]),
    }
    return answer(message, client=ConfigRecord({**facts}))


@app.query("leave")
def leave(message: Message, context: Context) -> Message:
    """Hear from the server that the run is over."""
    error = instructions(message)["error"]
    say(f"the server ended the run: {error}" if error else "the run has finished")
    tell(end=1 if error else 0)
    return answer(message)


def instructions(message: Message) -> dict[str, Any]:
    """Return all settings that a message carries, as one dictionary."""
    return {key: value for record in message.content.config_records.values() for key, value in record.items()}


def open_task(context: Context) -> ModuleType:
    """Import the task, with this client's share of the cores."""
    launch.share_cores()
    return load_task(checked(context.run_config)["task"])


def load_data(task: ModuleType, message: Message, context: Context) -> tuple[Any, str]:
    """Return the whole data set, this client's own or else the one that the server names, and its fingerprint."""
    return open_data(task, str(context.node_config.get("data") or instructions(message)["data"]))


def own_samples(split: str, task: ModuleType, message: Message, context: Context) -> tuple[Any, Any]:
    """Return this client's samples of a split: those that the server names, or all of its own."""
    data, found = load_data(task, message, context)
    x, y = data[0] if split == "train" else data[1]
    if "rows" not in message.content:
        return x, y
    if changed := difference(found, instructions(message)["fingerprint"]):
        raise ValueError(f"the data here are not the server's any more: {changed}; start the client again")
    rows = np.flatnonzero(np.unpackbits(message.content.array_records["rows"]["mask"].numpy(), count=len(y)))
    return x[rows], y[rows]


def answer(message: Message, **records: Any) -> Message:
    return Message(RecordDict(records), reply_to=message)


def command() -> int:
    """Read the command line and join a run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--server", default="127.0.0.1:8080", metavar="HOST:PORT", type=network.address)
    parser.add_argument("--data", metavar="DIR", help="this client's data (default: where the server has them)")
    parser.add_argument("--own-data", action="store_true", help="train on all of it, even if it is the server's")
    parser.add_argument("--clients", type=int, default=1, metavar="N", help="play so many clients (default: 1)")
    parser.add_argument("--partition-id", type=int, metavar="I", help="take this partition (default: a free one)")
    parser.add_argument("--num-partitions", type=int, metavar="N", help="of so many")
    parser.add_argument("--tls", metavar="DIR", type=certificates.client_folder, help="with ca.crt, and client.key")
    parser.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="how long to wait for a server")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the cores, divided by the clients here)")
    args = parser.parse_args()
    if (args.partition_id is None) != (args.num_partitions is None):
        parser.error("--partition-id and --num-partitions go together")
    if args.own_data and (args.clients > 1 or args.partition_id is not None):
        parser.error("--own-data goes with neither --clients nor --partition-id: the client trains on all of its data")
    if args.clients > 1 and args.partition_id is not None:
        parser.error("--clients and --partition-id exclude each other")
    for option in ("clients", "num_partitions", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} {value}: 1 or more is needed")
    if args.num_partitions and not 0 <= args.partition_id < args.num_partitions:
        parser.error(f"--partition-id {args.partition_id} is not one of 0 to {args.num_partitions - 1}")
    if not args.wait >= 0:
        parser.error(f"--wait {args.wait:g}: 0 or more is needed")
    wishes = {
        "clients": args.clients,
        "own-data": args.own_data,
        "data": args.data,
        "partition-id": args.partition_id,
        "num-partitions": args.num_partitions,
    }
    node_config = {key: value for key, value in wishes.items() if value is not None}
    return launch.join_run(args.server, args.wait, node_config, args.threads, args.tls)


if __name__ == "__main__":
    launch.run_command(command)
