"""Compare centralized, local and federated training of a task.

A comparison of accuracies depends on which budget is equal. Three budgets are used here: sample visits (of all clients
together), sequential steps (of the client with the most samples), and seconds on this machine. All three are those of
the federated run on IID partitions; the accuracy of every other training is taken where it has used up the budget.
Other strategies may be compared as well, each on the same non-IID partitions.

Every training has one thread, unless OMP_NUM_THREADS is set. On a busy machine, two threads of one training mostly
wait for each other, which would make the seconds meaningless.
"""

import inspect
import io
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from federation.app import metrics, samples
from federation.app.config import RunConfig, Settings, validate
from federation.app.cores import THREADS, share_cores
from federation.app.partition import Rows, split_data
from federation.app.run_folder import METRICS
from federation.app.strategy import check_strategy
from federation.app.task import (
    build_net,
    classes_of,
    client_seed,
    find_data,
    load_task,
    read_data,
    train_settings,
)
from federation.launch import host, simulation
from federation.launch.network import LaunchError
from federation.launch.prepare import check_federated
from federation.tools import comparison
from federation.tools.comparison import Cell, Cells, Point

FULL: Settings = {"num-clients": 10, "num-server-rounds": 6, "out": "runs/compare"}
QUICK: Settings = {
    "num-clients": 2,
    "num-server-rounds": 2,
    "out": "runs/compare-quick",
    "data": "embedded",
    "learning-rate": 0.02,
}
Training = Callable[["Lab", int, Cells], Cell]  # called with a seed and the finished cells of that seed
Strategies = Mapping[str, dict[str, str]]  # what each changes in the run config, by its name and parameters


class Lab:
    """A task with its data, and several ways to train it, all of which start from the same net."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.task = config, load_task(config.task)
        self.train_data, self.test_data = read_data(self.task, config.data)
        self.samples = samples.count(self.train_data)
        self.classes = classes_of(self.task, self.train_data)
        self.rounds, self.clients, self.local_epochs = config.num_server_rounds, config.num_clients, config.local_epochs

    def steps(self, samples: int) -> int:
        """Return the number of steps in an epoch over `samples` samples."""
        return -(-samples // int(self.config.batch_size))

    def parts(self, partitioner: str, seed: int) -> list[Rows]:
        config = self.config.changed(partitioner=partitioner, seed=seed)
        return split_data((self.train_data, self.test_data), self.clients, config)["train"]

    def net(self, seed: int) -> Any:
        return build_net(self.task, seed, self.classes)

    def test(self, net: Any) -> float:
        """Return the accuracy on the whole test set. Raises ValueError if test() returns none."""
        found = metrics.named("test", self.task.test(net, samples.take(self.test_data)))
        if "accuracy" not in found:
            raise ValueError(f"{self.task.__name__}.test() returns no accuracy, which is needed to compare trainings")
        return found["accuracy"]

    def train(self, net: Any, rows: Rows | None, epochs: int, seed: int, **more: Any) -> None:
        """Train `net` on the samples in `rows` (None: all), with the settings that client.py would use."""
        data = samples.take(self.train_data, rows)
        self.task.train(net, data, seed=seed, **train_settings(self.task, self.config) | {"epochs": epochs} | more)

    def train_at_once(self, rows: Rows | None, epochs: int, seed: int) -> list[Point]:
        """Train as the script itself does. Return a point per epoch, or one if `train` has no `after_epoch`."""
        net, started, points = self.net(seed), time.perf_counter(), []
        samples = self.samples if rows is None else len(rows)

        def after_epoch(epoch: int, loss: float = 0.0) -> None:
            seconds, accuracy = time.perf_counter() - started, self.test(net)
            points.append(Point(epoch * samples, epoch * self.steps(samples), seconds, accuracy))

        has_hook = "after_epoch" in inspect.signature(self.task.train).parameters
        self.train(net, rows, epochs, seed, **({"after_epoch": after_epoch} if has_hook else {}))
        if not has_hook:
            after_epoch(epochs)
        return points

    def train_in_turns(self, shards: Sequence[Rows | None], seed: int) -> list[Point]:
        """Train one net on one shard after another in every round, each time with a new optimizer."""
        net, started, points = self.net(seed), time.perf_counter(), []
        steps = sum(self.steps(self.samples if rows is None else len(rows)) for rows in shards) * self.local_epochs
        for done in range(self.rounds):
            for position, rows in enumerate(shards):
                self.train(net, rows, self.local_epochs, client_seed(seed, position, done * self.local_epochs))
            visits, seconds = (done + 1) * self.local_epochs * self.samples, time.perf_counter() - started
            points.append(Point(visits, (done + 1) * steps, seconds, self.test(net)))
        return points

    def federate(
        self, partitioner: str, seed: int, fraction: float = 1.0, strategy: Mapping[str, str] | None = None
    ) -> list[Any]:
        """Run client.py and server.py on Flower's Simulation Engine, and return the rounds in metrics.json."""
        strategy = strategy or {}
        name = "-".join([f"federated-{partitioner}-{fraction:g}-{seed}", *filter(None, strategy.values())])
        out = Path(self.config.out) / re.sub(r"[^\w.-]+", "-", name)
        config = self.config.changed(
            **strategy,
            partitioner=partitioner, seed=seed, out=host.writable(str(out)), resume=False,
            fraction_train=fraction, fraction_evaluate=0.0, num_server_rounds=round(self.rounds / fraction),
        )  # fmt: skip
        with redirect_stdout(io.StringIO()):  # hide its table, but not its progress bar
            if host.host_run(("127.0.0.1", 0), config, simulation.plan(self.clients)):
                raise LaunchError(f"a federated run failed; see {out / 'log.txt'}")
        return list(json.loads((out / METRICS).read_text("utf-8"))["rounds"][1:])


# ------------------------------------------------------------------------------------------------- what is compared


def centralized(lab: Lab, seed: int, done: Cells) -> Cell:
    """Train on all data, for as many epochs as a client trains in all rounds."""
    return {"points": lab.train_at_once(None, lab.rounds * lab.local_epochs, seed)}


def as_many_steps(lab: Lab, seed: int, done: Cells) -> Cell:
    """Train on all data for as many steps as a client takes, which can be less than one epoch."""
    visits = lab.rounds * lab.local_epochs * -(-lab.samples // lab.clients)
    epochs = -(-visits // lab.samples)
    rows = np.sort(np.random.default_rng(seed).permutation(lab.samples)[: visits // epochs]).astype(np.int32)
    return {"points": lab.train_at_once(rows, epochs, seed)}


def as_long(lab: Lab, seed: int, done: Cells) -> Cell:
    """Train on all data for as many epochs as fit into the seconds of the federated run."""
    plain = done["centralized"]["points"][-1]
    epochs = int(done["federated, IID"]["points"][-1].seconds / plain.seconds * lab.rounds * lab.local_epochs)
    return {"points": lab.train_at_once(None, max(1, epochs), seed)}


def restarted(lab: Lab, seed: int, done: Cells) -> Cell:
    """Train on all data with a new optimizer in every round, like a federation of one client."""
    return {"points": lab.train_in_turns([None], seed)}


def in_turns(lab: Lab, seed: int, done: Cells) -> Cell:
    """Train one net on the clients' shards in turn, each time with a new optimizer, without averaging."""
    return {"points": lab.train_in_turns(lab.parts("iid", seed), seed)}


def local_only(partitioner: str) -> Training:
    """Train each client alone, on its own samples. The accuracy is the clients' mean on the whole test set."""

    def train(lab: Lab, seed: int, done: Cells) -> Cell:
        alone, parts = [], lab.parts(partitioner, seed)
        epochs, started = lab.rounds * lab.local_epochs, time.perf_counter()
        for position, rows in enumerate(parts):
            net = lab.net(seed)
            lab.train(net, rows, epochs, client_seed(seed, position, 0))
            alone.append(lab.test(net))
        steps, seconds = epochs * lab.steps(max(map(len, parts))), time.perf_counter() - started
        return {"points": [Point(epochs * lab.samples, steps, seconds, float(np.mean(alone)))], "clients": alone}

    return train


def federated(partitioner: str, fraction: float = 1.0, strategy: Mapping[str, str] | None = None) -> Training:
    """Train with client.py and server.py. With `fraction` of the clients per round, there are more rounds."""

    def train(lab: Lab, seed: int, done: Cells) -> Cell:
        visits, steps, seconds, points = 0, 0, 0.0, []
        rounds = lab.federate(partitioner, seed, fraction, strategy)
        for row in rounds:
            visits += lab.local_epochs * sum(row["samples"])
            steps += lab.local_epochs * lab.steps(max(row["samples"]))
            seconds += row["seconds"]
            points.append(Point(visits, steps, seconds, row["server_accuracy"]))
        return {"points": points, **{key: sum(row[key] for row in rounds) for key in ("bytes_down", "bytes_up")}}

    return train


def trainings(skew: str) -> dict[str, Training]:
    """Return the usual trainings, in the order in which they run: `as_long` needs the results of earlier ones."""
    return {
        "centralized": centralized,
        "centralized, as many steps": as_many_steps,
        "federated, IID": federated("iid"),
        "federated, non-IID": federated(skew),
        "local only, non-IID": local_only(skew),
        "local only, IID": local_only("iid"),
        "centralized, as long": as_long,
        "optimizer restart": restarted,
        "smaller shards": in_turns,
        "partial participation": federated(skew, 0.5),
    }


def with_strategies(skew: str, strategies: Strategies) -> dict[str, Training]:
    """Return a training by each of `strategies`, on the same partitions as the run config's own."""
    return {f"{comparison.STRATEGY}{name}": federated(skew, strategy=own) for name, own in strategies.items()}


# --------------------------------------------------------------------------------------------------------- command


def read_strategies(config: RunConfig, text: str) -> Strategies:
    """Read strategies with their parameters, "fedprox proximal_mu=0.1, scaffold". Raises ValueError for a wrong one."""
    found = {}
    for name in filter(None, (" ".join(part.split()) for part in text.split(","))):
        strategy, _, parameters = name.partition(" ")
        own = validate(config.values() | {"strategy": strategy, "strategy-arguments": parameters})
        check_strategy(own)
        found[name] = {"strategy": own.strategy, "strategy_arguments": own.strategy_arguments}
    return found


def compare(config: RunConfig, seeds: int, quick: bool, strategies: Strategies | None = None) -> int:
    """Run the trainings that are missing, with `seeds` seeds, print the results, and return the exit status."""
    strategies = strategies or {}
    os.environ.setdefault(THREADS[0], "1")
    share_cores()
    config = config.changed(
        partitioner="dirichlet" if config.partitioner == "iid" else config.partitioner,
        data=find_data(load_task(config.task), config.data), out=host.writable(config.out),
    )  # fmt: skip
    chosen = dict(islice(trainings(config.partitioner).items(), 5 if quick else None))
    chosen |= with_strategies(config.partitioner, strategies)
    run(config, chosen, range(config.seed, config.seed + seeds), strategies)
    return 0


def run(config: RunConfig, chosen: dict[str, Training], seeds: range, strategies: Strategies) -> None:
    """Run every cell that is not yet in compare.json, save each when it is finished, and show tables and plots."""
    lab, path = Lab(config), Path(config.out) / "compare.json"
    cells = comparison.load(path, config)
    lab.test(net := lab.net(seeds[0]))
    for own in strategies.values():
        check_federated(config.changed(**own), net)
    for partitioner in ("iid", config.partitioner):
        lab.parts(partitioner, seeds[0])  # an impossible split should fail before hours of training
    wanted = [(seed, name) for seed in seeds for name in chosen]
    for number, (seed, name) in enumerate(wanted, 1):
        done = cells.setdefault(str(seed), {})
        if name not in done:
            done[name] = chosen[name](lab, seed, done)
            comparison.save(path, config, cells)
        points = done[name]["points"]
        print(f"[{number}/{len(wanted)}] seed {seed}  {name:26}  accuracy {points[-1].accuracy:.4f}  "
              f"{points[-1].seconds:6.1f} s", flush=True)  # fmt: skip
    of_seeds = [{name: cells[str(seed)][name] for name in chosen} for seed in seeds]
    results = comparison.summary(of_seeds)
    comparison.save(path, config, cells, summary=results)
    print(comparison.tables(results))
    title = f"{config.task}: {lab.samples:,} samples, {lab.clients} clients; mean and deviation, n = {len(seeds)}"
    comparison.draw(path.with_suffix(".png"), of_seeds, results, title, lab.samples)
    print(f"\nsaved compare.json and compare.png in {path.parent}")
