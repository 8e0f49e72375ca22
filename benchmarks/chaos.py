"""Train for two hundred rounds with ten clients that often fail, and measure accuracy and memory.

    python benchmarks/chaos.py --data DIR

This uses the server's main() and the ClientApp, with a Grid in memory that starts a process for each message. One
training in ten fails: its process is killed, and the client stays away for a while and comes back as another node; or
it raises an error, returns a model that is not finite or has another shape, or reports more samples than it has.
(Flower's Simulation Engine is not used because it does not survive the death of a worker.) For comparison, the same run
is repeated without faults. Prints the accuracy, the number of dropped replies, and the memory of server and clients
during the run.
"""

import argparse
import functools
import itertools
import json
import os
import pickle
import random
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar
import client
import server
from cifar import Data, Net, find_data, test, train
from federation.app.config import Settings
from federation.app.packing import unpack
from tests.in_memory import InMemoryGrid, in_a_run

__all__ = ["Net", "find_data", "load_data", "test", "train"]

SAMPLES = 3_000, 1_000  # for training and for testing: each of the ten clients has 300 and 100
FAULTS = 0.1  # the fraction of trainings that fail
AWAY = 3  # the number of messages to others during which a killed client stays away


@functools.cache
def load_data(root: str | None) -> tuple[Data, Data]:
    """Return a random subset of the data of cifar.py, whose files are sorted by class."""
    (x, y), (x_test, y_test) = cifar.load_data(root)
    rows, test_rows = (
        torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:most]
        for labels, most in zip((y, y_test), SAMPLES, strict=True)
    )
    return (x[rows], y[rows]), (x_test[test_rows], y_test[test_rows])


class Chaos(InMemoryGrid):
    """A Grid whose nodes are processes, some of which are killed or return invalid replies."""

    def __init__(self, config: Settings, clients: int, faults: float) -> None:
        names = {node: {"name": f"host/{node}", "key": f"key {node}"} for node in range(1, clients + 1)}
        super().__init__(config, names)
        self.faults, self.dice = faults, random.Random(0)
        self.ids = itertools.count(clients + 1)
        self.away: dict[int, int] = {}  # by node: the number of messages during which it stays away
        self.peaks: list[float] = []  # memory of the clients, in MiB
        self.memory: list[float] = []  # memory of the server after each message, in MiB

    def get_node_ids(self) -> list[int]:
        return [node for node in self.contexts if node not in self.away]

    def push(self, message: Message) -> str:
        self.come_back()
        self.messages = [message] * (len(self.messages) + 1)  # only its length is used
        identity = message.metadata.__dict__["_message_id"] = str(len(self.messages))
        fault = self.dice.choice(["failed", *FAULTY]) if self.dice.random() < self.faults else ""
        reply = self.work(message, fault if message.metadata.message_type == "train" else "")
        if reply:
            self.replies[identity] = reply
        else:
            self.away[message.metadata.dst_node_id] = AWAY
        self.memory.append(memory_of(os.getpid()))
        return identity

    def come_back(self) -> None:
        """Count a message for the clients that are away, and bring one back as another node when its time is over."""
        for node in list(self.away):
            self.away[node] -= 1
            if self.away[node] <= 0:
                context = self.contexts.pop(node)
                del self.away[node]
                new = next(self.ids)
                self.contexts[new] = Context(1, new, context.node_config, RecordDict(), context.run_config)

    def work(self, message: Message, fault: str) -> Message | None:
        """Let a process answer, and return its reply, unless it was killed."""
        reading, writing = os.pipe()
        if (process := os.fork()) == 0:
            os.close(reading)
            reply = client.app(message, self.contexts[message.metadata.dst_node_id])
            reply.content = unpack(reply.content)
            reply = FAULTY[fault](reply) if fault in FAULTY else reply
            reply = Message(Error(0, "a deliberate fault"), reply_to=message) if fault == "failed" else reply
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump((memory_of(os.getpid()), reply), pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(process, 0)
        if not answer:
            return None
        peak, reply = pickle.loads(answer)
        self.peaks.append(peak)
        return reply  # type: ignore[no-any-return]


def memory_of(process: int) -> float:
    return float(psutil.Process(process).memory_info().rss / 2**20)


def killed(reply: Message) -> Message:
    os.kill(os.getpid(), signal.SIGKILL)
    return reply


def not_finite(reply: Message) -> Message:
    return changed(reply, lambda values: values * float("nan"))


def misshapen(reply: Message) -> Message:
    return changed(reply, lambda values: values[:1])


def changed(reply: Message, how: Any) -> Message:
    """Return a reply whose first array is replaced."""
    arrays = reply.content.array_records["arrays"]
    first = next(iter(arrays))
    new = ArrayRecord({name: Array(how(array.numpy())) if name == first else array for name, array in arrays.items()})
    reply.content["arrays"] = new
    return reply


def boastful(reply: Message) -> Message:
    metrics = reply.content.metric_records["metrics"]
    reply.content["metrics"] = MetricRecord({**metrics, "num-examples": 10**9})
    return reply


FAULTY = {f.__name__: f for f in (killed, not_finite, misshapen, boastful)}


def run(name: str, faults: float, args: argparse.Namespace) -> None:
    """Run a federation, and print its results."""
    config: Settings = {"task": "benchmarks.chaos", "data": find_data(args.data), "num-clients": args.clients}
    config |= {"num-server-rounds": args.rounds, "out": str(args.out / name), "learning-rate": 0.01}
    config |= {"min-clients": args.clients // 2, "retries": 5, "fraction-evaluate": 0.3}
    grid = Chaos(config, args.clients, faults)
    server.main(grid, Context(1, 0, {}, RecordDict(), config))
    rounds = json.loads((args.out / name / "metrics.json").read_text("utf-8"))["rounds"]
    last = [row["server_accuracy"] for row in rounds[-20:]]
    dropped = sum(row["dropped"] or 0 for row in rounds)
    fewest = min(row["clients"] for row in rounds[1:])
    print(f"{name}: {len(rounds) - 1} rounds, accuracy {statistics.mean(last):.3f} ± {statistics.stdev(last):.3f} "
          f"(last 20 rounds), {dropped} replies dropped, at least {fewest} clients per round")  # fmt: skip
    for whose, sizes in (("server", grid.memory), ("clients", grid.peaks)):
        tenths = [statistics.median(sizes[len(sizes) * i // 10 : len(sizes) * (i + 1) // 10]) for i in (1, 5, 9)]
        print(f"{name}: memory of {whose} in the second, sixth and last tenth: "
              + ", ".join(f"{size:.0f} MiB" for size in tenths))  # fmt: skip


def main() -> None:
    """Run both federations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="the data folder, as in cifar.py")
    parser.add_argument("--clients", type=int, default=10, metavar="N")
    parser.add_argument("--rounds", type=int, default=200, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), metavar="DIR")
    args = parser.parse_args()
    args.out = args.out.absolute()
    torch.set_num_threads(1)  # a process that forks must have no other threads
    train(
        Net(), [part[:32] for part in load_data(find_data(args.data))[0]], epochs=1, batch_size=32
    )  # imports the rest
    with in_a_run():
        for name, faults in (("faults", FAULTS), ("none", 0.0)):
            run(name, faults, args)


if __name__ == "__main__":
    main()
