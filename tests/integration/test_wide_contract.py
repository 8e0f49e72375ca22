"""What a task may be beyond the simple case: own metrics and settings, data sets, groups, dictionaries, and more."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch.utils.data import Dataset, Subset

import server
from federation.app import picture, weights
from federation.app.config import Settings, validate
from federation.app.partition import split_data
from federation.app.task import train_settings
from tests.in_memory import InMemoryGrid

pytestmark = pytest.mark.usefixtures("in_a_run")
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(120, 4)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5, 0.0], np.float32) + 0.3).astype(np.float32)
SITES = np.repeat(["a", "b", "c"], [60, 36, 24])
TEST_SITES = np.repeat(["a", "b", "c"], [20, 12, 8])

Run = Callable[..., dict[str, Any]]


def load_data(root: str | None = None) -> Any:
    return (X, Y), (X[:40], Y[:40])


def net() -> dict[str, np.ndarray[Any, Any]]:
    return {"w": np.zeros(4, np.float32), "b": np.zeros(1, np.float32)}


def train(
    net: Any, data: Any, *, epochs: int = 1, lr: float = 0.1, batch_size: int = 16, seed: int = 0,
    decay: float = 0.0, robust: bool = False, power: int = 2, kind: str = "plain", steps: Any = None,
) -> Any:  # fmt: skip
    """Fit a line by gradient descent."""
    x, y = data
    for epoch in range(epochs):
        order = np.random.default_rng(seed + epoch).permutation(len(y))
        for rows in np.split(order, range(batch_size, len(y), batch_size)):
            error = x[rows] @ net["w"] + net["b"] - y[rows]
            net["w"] -= lr * (x[rows].T @ error / len(rows) + decay * net["w"])
            net["b"] -= lr * error.mean()
    error = x @ net["w"] + net["b"] - y
    return float((error**2).mean()), {"mae": float(abs(error).mean())}


def evaluate(net: Any, data: Any) -> Any:
    error = data[0] @ net["w"] + net["b"] - data[1]
    return float((error**2).mean()), {"mae": float(abs(error).mean()), "r2": float(1 - error.var() / data[1].var())}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """Return a regression whose model is a dictionary of arrays. A test may change it before it runs it."""
    module: Any = ModuleType("wide_task")
    module.__file__ = str(tmp_path / "wide_task.py")
    Path(module.__file__).touch()  # which server and clients compare
    module.__spec__ = ModuleSpec("wide_task", None, origin=module.__file__)
    monkeypatch.syspath_prepend(tmp_path)
    module.Net, module.load_data, module.train, module.test = net, load_data, train, evaluate
    monkeypatch.setitem(sys.modules, "wide_task", module)
    for drawing in ("curves", "partitions"):
        monkeypatch.setattr(picture, drawing, lambda metrics, path: path.touch())
    yield module


@pytest.fixture
def run(task: ModuleType, tmp_path: Path) -> Run:
    """Return a function that runs the server and its clients in this process, and returns metrics.json."""

    def run(clients: int = 2, own_data: bool = False, out: str = "run", **settings: Any) -> dict[str, Any]:
        config: Settings = {"task": "wide_task", "num-clients": clients, "out": str(tmp_path / out)}
        config |= {key.replace("_", "-"): value for key, value in settings.items()}
        nodes = {node: {"own-data": True} if own_data else {} for node in range(1, clients + 1)}
        server.main(InMemoryGrid(config, nodes), Context(1, 0, {}, RecordDict(), config))
        return dict(json.loads((tmp_path / out / "metrics.json").read_text("utf-8")))

    return run


# ------------------------------------------------------------------------------------------------------ own metrics


def test_metrics_have_their_own_names_everywhere(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run()
    table = capsys.readouterr().out
    first, *_, last = metrics["rounds"]
    assert {key for key in last if "accuracy" in key} == set() and "accuracy" not in table
    assert last["server_mae"] < first["server_mae"] and last["server_r2"] > 0.5 > first["server_r2"]
    for name in ("loss", "mae"):  # r2 is no mean over samples, but still averaged
        weighted = np.average(last["tested"][name], weights=last["tested"]["samples"])
        assert last[f"clients_{name}"] == pytest.approx(weighted, rel=1e-5)
        assert last[f"clients_{name}"] == pytest.approx(last[f"server_{name}"], rel=1e-5)
    assert "mae" in table and "r2" in table
    assert "differ on the same" not in table, "r2 of clients is another one than that of the server, and may be"


def test_each_client_is_in_the_metrics_and_the_extremes_are_printed(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run(clients=3)["rounds"][-1]
    trained, tested = last["trained"], last["tested"]
    assert trained["client"] == tested["client"] == [0, 1, 2] and trained["samples"] == last["samples"] == [40] * 3
    assert len(trained["loss"]) == len(tested["r2"]) == 3
    losses = tested["loss"]
    assert last["fairness"]["worst"] == losses.index(max(losses)) and last["fairness"]["best"] == losses.index(
        min(losses)
    )
    assert last["fairness"]["standard_deviation"]["mae"] == pytest.approx(np.std(tested["mae"]), rel=1e-4)
    worst = f"worst: client {last['fairness']['worst']} (loss {max(losses):.4f}, mae "
    assert worst in capsys.readouterr().out


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        ((0.5, {3: 1.0}), "returns a metric called 3"),
        ((0.5, {"loss": 1.0}), "returns a metric called 'loss'"),
        ((0.5, {"a b": 1.0}), "returns a metric called 'a b'"),
        ((0.5, {"mae": "1"}), "returns mae of type str, but it should be a number"),
        ((0.5, [1.0]), "but it should return (mean loss per sample, accuracy), or (loss, {name: number})"),
        (0.5, "but it should return (mean loss per sample, accuracy), or (loss, {name: number})"),
        ((0.5, 1.5), "returns an accuracy of 1.5; it should lie in 0..1"),
        ((0.5, {"mae": float("nan")}), "the mae of the global model is nan"),
    ],
)
def test_what_test_returns_is_checked(run: Run, task: Any, returned: Any, why: str) -> None:
    task.test = lambda net, data: returned
    with pytest.raises((ValueError, RuntimeError)) as error:
        run()
    assert why in str(error.value)


def test_a_client_that_reports_other_metrics_than_most_is_left_out(
    run: Run, task: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def test(net: Any, data: Any) -> Any:
        calls.append(1)
        return (0.5, {"odd": 1.0}) if len(calls) == 3 else evaluate(net, data)  # of the server, client 0 and client 1

    task.test = test
    row = run(clients=3, num_server_rounds=1)["rounds"][-1]
    (left_out,) = {0, 1, 2} - {*row["tested"]["client"]}
    assert row["dropped"] == 1
    assert f"client {left_out} is left out: it reports other metrics than most clients: loss, num-examples, odd" in (
        capsys.readouterr().out
    )


# ----------------------------------------------------------------------------------------------------- own settings


def test_arguments_of_train_can_be_set_and_change_the_training(run: Run) -> None:
    plain, decayed = run(out="a"), run(out="b", train_arguments="decay=0.5")
    assert plain["final_weights_sha256"] != decayed["final_weights_sha256"]
    assert decayed["config"]["train-arguments"] == "decay=0.5"
    assert run(out="c", train_arguments="decay=0")["final_weights_sha256"] == plain["final_weights_sha256"]


def test_arguments_have_the_types_of_their_defaults(task: ModuleType) -> None:
    config = validate({"train-arguments": "power=3 robust=true decay=1 kind='huber' steps=7"})
    found = train_settings(task, config)
    assert (found["power"], found["robust"], found["decay"], found["kind"], found["steps"]) == (
        3,
        True,
        1.0,
        "huber",
        7,
    )
    assert type(found["decay"]) is float and (found["epochs"], found["batch_size"]) == (1, 32) and "lr" not in found


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("moment=0.5", "wide_task.train() takes no moment; what can be set: decay, robust, power, kind, steps"),
        ("lr=0.5", "takes no lr"),
        ("epochs=2", "takes no epochs"),
        ("decay='x'", "decay='x' should be of type float"),
        ("robust=1", "robust=1 should be of type bool"),
        ("power=2.5", "power=2.5 should be of type int"),
        ("power=true", "power=True should be of type int"),
        ("kind=1", "kind=1 should be of type str"),
    ],
)
def test_wrong_arguments_are_refused(task: ModuleType, arguments: str, why: str) -> None:
    with pytest.raises(ValueError) as error:
        train_settings(task, validate({"train-arguments": arguments}))
    assert why in str(error.value)


def test_the_order_of_arguments_is_no_setting_and_nonsense_is_refused() -> None:
    one, other = (validate({"train-arguments": text}) for text in ("b=1 a='x y'", 'a="x y"  b=1'))
    assert one == other
    with pytest.raises(ValueError, match="run config 'nonsense' is not of the form key=value"):
        validate({"train-arguments": "nonsense"})


# ------------------------------------------------------------------------------------------------- local validation


def test_a_part_of_the_training_samples_is_held_back(run: Run) -> None:
    row = run(clients=3, validation_fraction=0.25)["rounds"][-1]
    assert row["trained"]["samples"] == [30] * 3 and row["tested"]["samples"] == [10] * 3
    own = run(clients=2, own_data=True, out="own", validation_fraction=0.25)["rounds"][-1]
    assert own["trained"]["samples"] == [90] * 2 and own["tested"]["samples"] == [30] * 2


@pytest.mark.parametrize("clients", [1, 3, 40])
def test_what_is_held_back_is_seeded_and_of_the_client(clients: int) -> None:
    config = validate({"num-clients": clients, "validation-fraction": 0.2})
    data = load_data()
    parts, whole = split_data(data, clients, config), split_data(data, clients, validate({"num-clients": clients}))
    for train_rows, held, all_rows in zip(parts["train"], parts["test"], whole["train"], strict=True):
        assert sorted([*train_rows, *held]) == all_rows.tolist()
        assert len(held) == max(1, round(0.2 * len(all_rows)))
    assert [part.tolist() for part in split_data(data, clients, config)["test"]] == [p.tolist() for p in parts["test"]]
    other = split_data(data, clients, config.changed(seed=1))["test"]
    assert [part.tolist() for part in other] != [part.tolist() for part in parts["test"]]


def test_a_lone_sample_cannot_be_held_back() -> None:
    config = validate({"num-clients": 120, "validation-fraction": 0.2})
    with pytest.raises(ValueError, match="needs 2 training samples or more, and client 0 has 1"):
        split_data((load_data()[0], load_data()[0]), 120, config)


# --------------------------------------------------------------------------------------------------------- data sets


class Rows(Dataset[Any]):
    """A map-style data set that notes which items are read."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y, self.read = x, y, set[int]()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> Any:
        self.read.add(row)
        return self.x[row], self.y[row]


def through_loader(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that works on arrays the items of a data set."""

    def call(net: Any, data: Any, **given: Any) -> Any:
        assert isinstance(data, Dataset)
        x, y = zip(*(data[row] for row in range(len(data))), strict=True)  # type: ignore[arg-type]
        return function(net, (np.stack(x), np.stack(y)), **given)

    return call


def test_clients_train_on_subsets_of_a_data_set_as_on_arrays(run: Run, task: Any) -> None:
    arrays = run(out="arrays")
    train_set, test_set = Rows(X, Y), Rows(X[:40], Y[:40])
    task.load_data = lambda root: (train_set, test_set)
    task.train, task.test = through_loader(train), through_loader(evaluate)
    sets = run(out="sets")
    assert sets["final_weights_sha256"] == arrays["final_weights_sha256"]
    assert sets["partitions"]["train"] == [[60], [60]], "no labels are read for a picture"


def test_nothing_of_a_data_set_is_read_that_is_not_asked_for(task: Any) -> None:
    data = Rows(X, Y), Rows(X[:40], Y[:40])
    parts = split_data(data, 3, validate({"num-clients": 3}))
    assert not data[0].read and sorted(np.concatenate(parts["train"]).tolist()) == list(range(120))


def test_labels_of_a_data_set_are_its_targets_or_read_once() -> None:
    classes = np.arange(120) % 3
    config = validate({"num-clients": 3, "partitioner": "pathological", "labels-per-client": 1})
    data = Rows(X, classes), Rows(X[:40], classes[:40])
    one_pass = split_data(data, 3, config)
    assert data[0].read == set(range(120))
    data[0].read.clear()
    assert [p.tolist() for p in split_data(data, 3, config)["train"]] == [p.tolist() for p in one_pass["train"]]
    assert not data[0].read
    named: Any = Rows(X, classes), Rows(X[:40], classes[:40])
    for one in named:
        one.targets = torch.tensor(one.y)
    assert [p.tolist() for p in split_data(named, 3, config)["train"]] == [p.tolist() for p in one_pass["train"]]
    assert not named[0].read


@pytest.mark.parametrize("data", [5, "text", {"a": 1}, (X, X), ((X, Y), (X, Y[:3])), ((X[:0], Y[:0]), (X, Y))])
def test_what_is_neither_arrays_nor_data_sets_is_refused(run: Run, task: Any, data: Any) -> None:
    task.load_data = lambda root: data
    with pytest.raises(ValueError, match=r"load_data\(\) should return \(x_train, y_train\), \(x_test, y_test\)"):
        run()


# ------------------------------------------------------------------------------------------------ natural partitions


def with_groups(root: str | None = None) -> Any:
    return (X, Y, SITES), (X[:40], Y[:40], TEST_SITES)


def test_each_group_is_a_client(run: Run, task: Any) -> None:
    task.load_data = with_groups
    row = run(clients=3, partitioner="by-column")["rounds"][-1]
    assert row["trained"]["samples"] == [60, 36, 24] and row["tested"]["samples"] == [20, 12, 8]
    two = run(clients=2, partitioner="grouped-natural-id", group_size=2, out="two")["rounds"][-1]
    assert two["trained"]["samples"] == [96, 24]


def test_groups_can_be_an_attribute_of_a_data_set() -> None:
    data: Any = Rows(X, Y), Rows(X[:40], Y[:40])
    data[0].groups = SITES
    parts = split_data(data, 3, validate({"num-clients": 3, "partitioner": "by-column"}))
    assert [len(part) for part in parts["train"]] == [60, 36, 24]
    assert sorted(np.concatenate(parts["test"]).tolist()) == list(range(40)), "at random, where the test set has none"


@pytest.mark.parametrize(
    ("data", "clients", "why"),
    [
        (
            with_groups(),
            2,
            "partitioner=by-column makes 3 clients of the 3 groups in the data, not 2: set num-clients=3",
        ),
        (load_data(), 3, r"the data have no groups: load_data\(\) should return \(x, y, groups\)"),
        (((X, Y, SITES), (X[:2], Y[:2], np.array(["a", "z"]))), 3, "the test data have the group 'z'"),
        (((X, Y, SITES), (X[:2], Y[:2], np.array(["a", "b"]))), 3, "the group c has no test samples"),
    ],
)
def test_groups_that_make_no_clients_are_refused(data: Any, clients: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        split_data(data, clients, validate({"num-clients": clients, "partitioner": "by-column"}))


# -------------------------------------------------------------------------------------------------- number of classes


def test_a_net_that_takes_classes_is_given_their_number(run: Run, task: Any) -> None:
    given: list[int] = []
    task.load_data = lambda root: ((X, np.arange(120) % 7), (X[:40], np.arange(40) % 7))
    task.Net = lambda classes: given.append(classes) or net()
    run()
    assert set(given) == {7}
    task.load_data = load_data
    with pytest.raises(ValueError, match=r"Net\(\) takes the number of classes, but labels of type float32 are none"):
        run(out="other")


# ----------------------------------------------------------------------------------------------------- other starts


def test_a_run_can_begin_with_saved_weights(run: Run, tmp_path: Path) -> None:
    first = run(num_server_rounds=2)
    again = run(out="again", initial=str(tmp_path / "run" / "final_model.npz"))
    assert again["rounds"][0]["server_loss"] == first["rounds"][-1]["server_loss"]
    assert again["rounds"][-1]["server_loss"] < first["rounds"][-1]["server_loss"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"no archive", "cannot read the model"),
        ({"w": np.zeros(5, np.float32), "b": np.zeros(1, np.float32)}, "w does not match: received float32 of shape"),
        ({"w": np.zeros(4, np.float32)}, "b does not match: received no such entry"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run: Run, tmp_path: Path, content: Any, why: str) -> None:
    path = tmp_path / "start.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(ValueError, match=why) as error:
        run(initial=str(path))
    assert str(path) in str(error.value)


def test_the_best_model_is_kept(run: Run, task: Any, tmp_path: Path) -> None:
    worse = iter([1.0, 0.5, 0.2, 0.7, 0.9])
    task.test = lambda net, data: (next(worse) if len(data[1]) == 40 else 1.0, {})
    metrics = run(num_server_rounds=4)
    assert metrics["best"] == {"round": 2, "metric": "server_loss", "value": 0.2}
    best = weights.sha256(weights.read_model(tmp_path / "run" / "best_model.npz"))
    assert best != metrics["final_weights_sha256"]
    task.test = evaluate
    assert run(num_server_rounds=2, out="short")["final_weights_sha256"] == best


def test_the_best_model_can_be_chosen_by_another_metric(run: Run) -> None:
    metrics = run(best_metric="server_r2")
    values = [row["server_r2"] for row in metrics["rounds"]]
    assert metrics["best"]["value"] == max(values)
    assert run(best_metric="server_mae:min", out="mae")["best"]["value"] < 1
    with pytest.raises(ValueError, match="best-metric=server_accuracy: a round has only server_loss, server_mae"):
        run(best_metric="server_accuracy", out="none")
    with pytest.raises(ValueError, match="best-metric='foo' is no metric"):
        validate({"best-metric": "foo"})


def test_a_run_that_does_not_improve_ends_early_and_says_so(
    run: Run, task: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = itertools.chain([1.0, 0.5, 0.6, 0.7], itertools.repeat(0.4))
    task.test = lambda net, data: (next(losses) if len(data[1]) == 40 else 1.0, {})
    metrics = run(num_server_rounds=20, patience=2)
    assert [row["round"] for row in metrics["rounds"]] == [0, 1, 2, 3] and metrics["status"] == "finished"
    assert "ended after round 3: server_loss has not improved since round 1 (patience=2)" in capsys.readouterr().out
    more = run(num_server_rounds=20, patience=3, resume=True)
    assert more["rounds"][4]["server_loss"] == 0.4 and more["best"]["round"] == 4


def test_a_server_can_do_without_task_and_data(run: Run, task: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "start.npz", **net())
    full = run(own_data=True, initial=str(tmp_path / "start.npz"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("federation.app.global_model.load_task", lambda name: pytest.fail("the task is loaded"))
        bare = run(own_data=True, initial=str(tmp_path / "start.npz"), server_evaluation=False, out="bare")
    assert bare["final_weights_sha256"] == full["final_weights_sha256"]
    assert "server_loss" not in bare["rounds"][-1] or bare["rounds"][-1]["server_loss"] is None
    assert bare["rounds"][-1]["clients_mae"] == full["rounds"][-1]["clients_mae"]
    assert bare["best"]["metric"] == "clients_loss"


def test_only_trainable_weights_are_federated() -> None:
    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.adapter = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

        def trainable(self) -> list[str]:
            return [name for name in self.state_dict() if name.startswith("adapter")]

    one, other = Adapted(), Adapted()
    arrays = weights.from_net(one)
    assert list(arrays) == ["adapter.weight", "adapter.bias"]
    weights.to_net(arrays, other)
    assert torch.equal(one.adapter.weight, other.adapter.weight) and not torch.equal(one.base.weight, other.base.weight)
    one.trainable = lambda: ["no such"]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"trainable\(\) of the model names no such"):
        weights.from_net(one)


def test_a_subset_is_a_data_set_too() -> None:
    data = Subset(Rows(X, Y), range(10, 20)), Subset(Rows(X, Y), range(5))
    assert [len(part) for part in split_data(data, 2, validate({}))["train"]] == [5, 5]
