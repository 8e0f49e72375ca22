"""The equivalence ladder: the federated run is the same training, shown rung by rung on the real client and server.

    pytest tests/evidence/test_ladder.py                              # cifar.py, on the data that it carries
    pytest tests/evidence/test_ladder.py --task my_script --data DIR  # a script of yours, which is in this folder

All clients live in this process, on a Grid in memory: one thread, a few hundred samples, and no GPU, unless --gpu is
given: see benchmarks/deterministic_cifar.py. A rung that a script
cannot climb, whoever federates it, is skipped with the reason. One that fails is a difference between the script and
its federation; mostly, train() draws random numbers that do not come from its `seed`.
"""

import functools
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict
from numpy.typing import NDArray

import server
from federation.app import client_grid, delivery, partition, picture, samples, weights
from federation.app.config import Settings, validate
from federation.app.task import build_net, classes_of, find_data, load_task
from tests.in_memory import InMemoryGrid, another_process

Rows = NDArray[np.int64]

pytestmark = pytest.mark.usefixtures("in_a_run")
SAMPLES = 400, 120  # for training and testing: enough for ten unequal clients, and few enough for a second a test
SEED = 7  # no default of anything, so that a seed which is lost on the way shows
BATCH = 32
ROUNDS = 3
SOME = {"num_server_rounds": 2, "fraction_train": 0.6}  # of five clients, three train in each of two rounds

# How far two models may be apart, as a part of the full-batch step that both have made. They are equal but for the
# rounding of float32, 6e-8 of each weight. Weights being 0.1 to 1, and a step with LARGE 0.01 to 1, that is some 1e-6
# of the step; a mean with wrong weights is off by 1e-1 of it.
TOLERANCE = 1e-4
LARGE = 1.0  # a learning rate that makes the step as large as the weights, so that it stands out from their rounding


class Ladder:
    """A script on a few of its samples, which trains as it does by itself, and as it does in the federation.

    The federation is told to run `module`: the script, but with these few samples, and where a test asks for it, with
    other defaults for arguments of train() that no run config knows.
    """

    def __init__(self, task: ModuleType, root: str, new_folder: Callable[[], Path]) -> None:
        self.task, self.new_folder, self.root = task, new_folder, find_data(task, root)
        self.parameters = inspect.signature(task.train).parameters
        no_default = "lr" in self.parameters and self.parameters["lr"].default is inspect.Parameter.empty
        self.lr = 0.01 if no_default else 0.0  # 0 leaves the choice to the script, as in the run config
        self.read = functools.cache(task.load_data)
        self.module: Any = ModuleType("ladder_task")
        vars(self.module).update(vars(task) | {"load_data": self.load_data})

    def load_data(self, root: str | None) -> Any:
        """Return a few samples: copies, so that no client can change what another one sees."""
        return tuple(few(split, most) for split, most in zip(self.read(root), SAMPLES, strict=True))

    @property
    def data(self) -> Any:
        return self.load_data(self.root or None)

    def central(self, calls: int = 1, rows: Rows | None = None, seed: int = SEED, **given: Any) -> ArrayRecord:
        """Return the weights after `calls` of the script's own train(), without anything federated."""
        train = self.data[0]
        net, data = build_net(self.task, SEED, classes_of(self.task, train)), samples.take(train, rows)
        given = {"epochs": 1, "batch_size": BATCH} | ({"lr": self.lr} if self.lr else {}) | given
        with another_process():  # whatever it draws at random has to come from its seed
            for call in range(calls):
                self.task.train(net, data, seed=seed + call * given["epochs"], **given)
        return weights.from_net(net)

    def federate(
        self,
        clients: int,
        nodes: Mapping[int, Settings] | None = None,
        given: Mapping[str, Any] | None = None,
        deliver: Callable[[list[str]], list[str]] = list,
        tamper: Callable[[Message], object] = id,
        **settings: Any,
    ) -> SimpleNamespace:
        """Run the server's main() with `clients` clients; `given` are defaults for train(), the rest run config."""
        config: Settings = {"num-server-rounds": 1, "batch-size": BATCH, "learning-rate": self.lr, "seed": SEED}
        config |= {key.replace("_", "-"): value for key, value in settings.items()}
        config |= {"task": "ladder_task", "data": self.root, "num-clients": clients, "out": str(self.new_folder())}
        self.check_split(clients, config)
        self.module.train = functools.partial(self.task.train, **given or {})
        grid = InMemoryGrid(config, nodes or {node: {} for node in range(1, clients + 1)}, deliver, tamper)
        server.main(grid, Context(1, 0, {}, RecordDict(), config))
        metrics = json.loads(Path(config["out"], "metrics.json").read_text("utf-8"))
        initial, final = grid.models("train")[0], grid.models("evaluate")[-1]
        return SimpleNamespace(initial=initial, final=final, metrics=metrics, rounds=metrics["rounds"][1:])

    def needs_momentum(self) -> None:
        if "momentum" not in self.parameters:
            self.skip("train() has no momentum argument to set to 0, so that no step depends on the steps before it")

    @property
    def memoryless(self) -> dict[str, float]:
        """Arguments that make SGD plain: a step is the learning rate times the gradient."""
        return {name: 0.0 for name in ("momentum", "weight_decay") if name in self.parameters}

    def check_split(self, clients: int, config: Settings) -> None:
        """Skip where the script has too few samples, or no classes, for the partitions that a test asks for."""
        try:
            partition.split_data(self.data, clients, validate(config))
        except ValueError as error:
            self.skip(str(error))

    def skip(self, reason: str) -> NoReturn:
        assert self.task.__name__ != "cifar", f"cifar.py has to climb every rung, but {reason}"
        pytest.skip(reason)


def few(split: Any, most: int) -> Any:
    """Take up to `most` samples, from all over: those of one class may follow one another."""
    rows = np.sort(np.random.default_rng(0).permutation(samples.count(split))[:most])
    return tuple(part[rows] for part in split) if samples.is_arrays(split) else samples.take(split, rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: another number of them adds in another order."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ladder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ladder]:
    name, root = request.config.getoption("--task"), request.config.getoption("--data")
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # a GPU adds in whatever order it likes
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(Path.cwd())
        for drawing in ("curves", "partitions"):  # they would take longer than all of the training
            patch.setattr(picture, drawing, lambda metrics, path: path.touch())
        task = load_task(name)
        ours = Ladder(task, root or "embedded" * (name == "cifar"), lambda: tmp_path_factory.mktemp("run"))
        patch.setitem(sys.modules, "ladder_task", ours.module)
        with one_thread():
            yield ours


def digest(run: SimpleNamespace) -> str:
    """Return the digest that the run noted down of its final model, which is the one that the clients tested last."""
    assert weights.sha256(run.final) == run.metrics["final_weights_sha256"]
    return str(run.metrics["final_weights_sha256"])


# --------------------------------------------------------------------------------- 1: one client, one round


def test_one_client_in_one_round_is_the_script(ladder: Ladder) -> None:
    run, start = ladder.federate(1, local_epochs=3), ladder.central(calls=0)
    assert weights.sha256(run.initial) == weights.sha256(start)
    assert digest(run) == weights.sha256(ladder.central(epochs=3))
    assert digest(run) != weights.sha256(start)


# -------------------------------------------------------------------------------- 2: rounds, and epochs


def test_rounds_of_one_client_are_calls_of_train(ladder: Ladder) -> None:
    assert digest(ladder.federate(1, num_server_rounds=ROUNDS)) == weights.sha256(ladder.central(calls=ROUNDS))


def test_rounds_are_epochs_where_the_optimizer_remembers_nothing(ladder: Ladder) -> None:
    ladder.needs_momentum()
    epochs = weights.sha256(ladder.central(epochs=ROUNDS, momentum=0.0))
    if weights.sha256(ladder.central(calls=ROUNDS, momentum=0.0)) != epochs:
        ladder.skip("one call of train() for some epochs is not as many calls for one, with the seed counted on: "
                    "more than the weights goes from epoch to epoch (a schedule, a random generator?)")  # fmt: skip
    assert digest(ladder.federate(1, num_server_rounds=ROUNDS, given={"momentum": 0.0})) == epochs


def test_momentum_is_lost_between_rounds(ladder: Ladder) -> None:
    ladder.needs_momentum()
    run = ladder.federate(1, num_server_rounds=ROUNDS, given={"momentum": 0.9})
    assert digest(run) != weights.sha256(ladder.central(epochs=ROUNDS, momentum=0.9))


# ------------------------------------------------------------------- 3: many clients, one full-batch step


def flat(model: ArrayRecord) -> NDArray[np.float64]:
    return np.concatenate([array.numpy().ravel().astype(np.float64) for array in model.values()])


def deviation(found: NDArray[np.float64], expected: NDArray[np.float64], start: NDArray[np.float64]) -> float:
    """Return the largest difference between two models, as a part of the largest step from `start`."""
    step = np.abs(expected - start).max()
    assert step > 0, "train() changed nothing"
    return float(np.abs(found - expected).max() / step)


@pytest.fixture(scope="module")
def one_step(ladder: Ladder) -> dict[str, Any]:
    """Return the settings for one step on all samples at once. Skip where not even the script's own steps average."""
    ladder.needs_momentum()
    count = samples.count(ladder.data[0])
    settings = {"batch_size": count, "lr": LARGE} | ladder.memoryless
    start, whole, cut = flat(ladder.central(calls=0)), flat(ladder.central(**settings)), count // 3
    if not deviation(flat(ladder.central(seed=SEED + 1, **settings)), whole, start) <= TOLERANCE:
        ladder.skip("a step of train() on all samples at once depends on its seed: it draws random numbers (dropout, "
                    "augmentation?), which are others in every client")  # fmt: skip
    parts = [flat(ladder.central(rows=rows, **settings)) for rows in np.split(np.arange(count), [cut])]
    if not deviation(np.average(parts, 0, [cut, count - cut]), whole, start) <= TOLERANCE:
        ladder.skip("a step of train() on all samples at once is not the mean of its steps on two parts of them: a "
                    "sample's gradient depends on the others (BatchNorm, clipping?), or is summed")  # fmt: skip
    return settings


def federated_deviation(ladder: Ladder, clients: int, settings: dict[str, Any], **grid: Any) -> float:
    """Return how far the mean of unequal clients' steps is from the script's own step on all samples."""
    shape = {"partitioner": "size-skewed", "batch_size": settings["batch_size"], "learning_rate": settings["lr"]}
    run = ladder.federate(clients, given=ladder.memoryless, **shape, **grid)
    return deviation(flat(run.final), flat(ladder.central(**settings)), flat(run.initial))


@pytest.mark.parametrize("clients", [2, 3, 10])
def test_the_mean_of_unequal_clients_is_the_step_on_all_samples(
    ladder: Ladder, one_step: dict[str, Any], clients: int
) -> None:
    assert federated_deviation(ladder, clients, one_step) <= TOLERANCE


@pytest.mark.parametrize("clients", [2, 3, 10])
def test_a_mean_that_is_not_weighted_by_samples_would_show(
    ladder: Ladder, one_step: dict[str, Any], clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_grid, "check_reply", lambda *_, **__: None)  # which refuses such replies
    assert federated_deviation(ladder, clients, one_step, tamper=count_one_sample) > 100 * TOLERANCE


def count_one_sample(reply: Message) -> None:
    """Let all clients weigh the same."""
    for metrics in reply.content.metric_records.values():
        metrics["num-examples"] = 1


# ------------------------------------------------------------------ 4: which node, and in which order


@pytest.fixture(scope="module")
def reference(ladder: Ladder) -> str:
    """Return the digest of a run of five clients that join, and answer, in order."""
    return digest(ladder.federate(5, **SOME))


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 1, 0, 3]])
def test_which_node_has_which_partition_does_not_matter(ladder: Ladder, reference: str, places: list[int]) -> None:
    nodes = {70 - 3 * i: {"partition-id": place, "num-partitions": 5} for i, place in enumerate(places)}
    assert digest(ladder.federate(5, nodes, **SOME)) == reference


@pytest.mark.parametrize("order", ["last first", "one by one"])
def test_the_order_of_arrival_does_not_matter(
    ladder: Ladder, reference: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffle = random.Random(1).sample
    deliver = {"last first": lambda ready: ready[::-1], "one by one": lambda ready: shuffle(ready, len(ready))[:1]}
    monkeypatch.setattr(client_grid, "POLL", 0)
    assert digest(ladder.federate(5, deliver=deliver[order], **SOME)) == reference


# ------------------------------------------------------------------------ 5: one seed, one set of weights


def test_one_seed_has_one_digest(ladder: Ladder, reference: str) -> None:
    assert digest(ladder.federate(5, **SOME)) == reference


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_how_many_nodes_play_the_clients_does_not_matter(ladder: Ladder, reference: str, nodes: int) -> None:
    simulated = {7 + i: {"partition-id": i, "num-partitions": nodes} for i in range(nodes)}
    run = ladder.federate(5, simulated, **SOME)
    assert digest(run) == reference and [row["clients"] for row in run.rounds] == [3, 3]


def test_how_many_models_a_bundle_holds_does_not_matter(
    ladder: Ladder, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "BUNDLED", 1)
    assert digest(ladder.federate(5, {7: {"partition-id": 0, "num-partitions": 1}}, **SOME)) == reference


def test_another_seed_has_another_digest(ladder: Ladder, reference: str) -> None:
    run = ladder.federate(5, **SOME, seed=SEED + 1)
    assert digest(run) != reference and run.metrics["seed"] == SEED + 1


# ---------------------------------------------------------------------------------------- 6: one loss, one accuracy


def test_the_clients_losses_average_to_the_global_one(ladder: Ladder) -> None:
    """They are sums in single precision, in another order: equal to 1e-6 or so."""
    run = ladder.federate(5, partitioner="size-skewed", num_server_rounds=2)
    assert [row["clients_loss"] for row in run.rounds] == pytest.approx(
        [row["server_loss"] for row in run.rounds], rel=1e-5
    )


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "size-skewed"])
def test_the_clients_accuracies_average_to_the_global_one(ladder: Ladder, partitioner: str) -> None:
    """Each test sample is one client's, so that the clients have as many right as the server: a number of samples.

    Where accuracies are in single precision, as `(…).float().mean()` makes them, they are equal as far as that goes.
    """
    run = ladder.federate(5, partitioner=partitioner, num_server_rounds=2)
    if "server_accuracy" not in run.rounds[0]:
        ladder.skip("test() returns no accuracy, of which each sample has an equal share whatever its client")
    samples, server_accuracies = len(ladder.data[1][1]), [row["server_accuracy"] for row in run.rounds]
    single = all(float(np.float32(accuracy)) == accuracy for accuracy in server_accuracies)
    assert len(run.rounds) == 2
    for row in run.rounds:
        assert round(row["clients_accuracy"] * samples) == round(row["server_accuracy"] * samples)
        assert row["clients_accuracy"] == pytest.approx(row["server_accuracy"], rel=1e-6 if single else 1e-9)
