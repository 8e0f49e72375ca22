"""The examples that bring their own data, federated: metrics under their own names, and models of several kinds."""

import importlib
import importlib.util
import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from federation.app import weights
from federation.app.samples import take
from federation.app.task import build_net, classes_of
from tests.conftest import Terminals, eventually
from tests.processes import assert_all_gone

pytestmark = pytest.mark.slow


class Example(NamedTuple):
    """An example, what it needs, the metrics that it reports besides the loss, and how its model is saved."""

    name: str
    needs: tuple[str, ...]
    metrics: set[str]
    model: str

    @property
    def task(self) -> Any:
        return importlib.import_module(f"examples.{self.name}")


EXAMPLES = [
    Example("diabetes_torch", ("sklearn",), {"mae", "r2"}, "final_model.pt"),
    Example("digits_sklearn", ("sklearn",), {"accuracy"}, "final_model.npz"),
    Example("digits_lightning", ("sklearn", "pytorch_lightning"), {"accuracy"}, "final_model.pt"),
    Example("text_lora", ("transformers", "peft"), {"perplexity"}, "final_model.pt"),
]


def need(name: str) -> Example:
    example = next(example for example in EXAMPLES if example.name == name)
    for module in example.needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} needs {module}")
    return example


ONE_NODE = ("--federation-config", "num-supernodes=1")  # plays both clients: to import what an example needs takes long


def simulate(terminals: Terminals, name: str, out: str, *options: str) -> SimpleNamespace:
    folder = terminals.folder / out
    line = ("--task", f"examples.{name}", "--simulate", "2", "--rounds", "2", "--out", str(folder), *ONE_NODE, *options)
    status, text = terminals.run("server.py", *line)
    assert status == 0, text
    return SimpleNamespace(text=text, folder=folder, metrics=json.loads((folder / "metrics.json").read_text()))


@pytest.fixture(scope="module", params=[example.name for example in EXAMPLES])
def example(request: pytest.FixtureRequest) -> Example:
    return need(request.param)


@pytest.fixture(scope="module")
def run(example: Example, module_terminals: Terminals) -> SimpleNamespace:
    return simulate(module_terminals, example.name, f"out-{example.name}")


def test_it_ends_well_and_says_nothing_but_the_run(example: Example, run: SimpleNamespace) -> None:
    assert run.metrics["status"] == "finished" and run.metrics["task"] == f"examples.{example.name}"
    assert (run.folder / example.model).is_file()
    assert "warn" not in run.text.lower() and "Traceback" not in run.text


def test_metrics_have_their_own_names(example: Example, run: SimpleNamespace) -> None:
    last = run.metrics["rounds"][-1]
    for side in ("server", "clients"):
        named = {key.removeprefix(f"{side}_") for key in last if key.startswith(f"{side}_")}
        assert named == {"loss"} | example.metrics
    assert set(last["tested"]) == {"client", "samples", "seconds", "loss"} | example.metrics
    header = next(line for line in run.text.splitlines() if line.startswith("round "))
    assert all(header.count(name) == 2 for name in example.metrics)
    assert ("accuracy" in run.text) == ("accuracy" in example.metrics)


def test_losses_fall(run: SimpleNamespace) -> None:
    initial, first, last = run.metrics["rounds"]
    assert initial["server_loss"] > first["server_loss"] > last["server_loss"]
    assert first["clients_loss"] > last["clients_loss"] and first["train_loss"] > last["train_loss"]
    assert last["clients_loss"] == pytest.approx(last["server_loss"], rel=1e-5)


def test_the_saved_model_is_the_one_that_was_measured(example: Example, run: SimpleNamespace) -> None:
    train, test = example.task.load_data()
    net = build_net(example.task, 0, classes_of(example.task, train))
    weights.to_net(weights.read_model(run.folder / example.model, net), net)
    loss, others = example.task.test(net, take(test))
    last = run.metrics["rounds"][-1]
    found = others if isinstance(others, dict) else {"accuracy": others}
    assert last["server_loss"] == pytest.approx(loss, rel=1e-4)
    assert {name: last[f"server_{name}"] for name in example.metrics} == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("example", ["text_lora"], indirect=True)
def test_the_language_models_base_is_neither_sent_nor_saved(example: Example, run: SimpleNamespace) -> None:
    import torch

    last = run.metrics["rounds"][-1]
    state = torch.load(run.folder / example.model, weights_only=True)
    adapters = sum(4 * tensor.numel() for tensor in state.values())
    assert adapters == 4 * 19_968 and all("lora" in name for name in state)
    assert 2 * adapters <= last["bytes_up"] < 2.2 * adapters, "each of two clients sends its adapters once a round"


@pytest.mark.parametrize("example", ["diabetes_torch"], indirect=True)
def test_arguments_of_the_scripts_own_can_be_set(
    example: Example, run: SimpleNamespace, module_terminals: Terminals
) -> None:
    given = ("--run-config", "train-arguments='momentum=0.5 weight_decay=0'")
    other = simulate(module_terminals, example.name, "other", *given)
    assert other.metrics["config"]["train-arguments"] == "momentum=0.5 weight_decay=0"
    assert other.metrics["rounds"][0]["server_loss"] == run.metrics["rounds"][0]["server_loss"], "it starts the same"
    assert other.metrics["final_weights_sha256"] != run.metrics["final_weights_sha256"]


LONG = """
from pathlib import Path

from examples import digits_lightning
from examples.digits_lightning import Net, load_data, test

def train(net, data, *, epochs, lr=0.05, batch_size=32, seed=0):
    def after_epoch(epoch, loss):
        if epoch > 1:
            Path({path!r}).touch()

    settings = {{"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed}}
    return digits_lightning.train(net, data, after_epoch=after_epoch, **settings)
"""


def test_ctrl_c_in_the_midst_of_lightnings_own_loop_leaves_nothing(terminals: Terminals) -> None:
    """Lightning handles signals itself while it trains."""
    need("digits_lightning")
    training = terminals.folder / "training"
    (terminals.folder / "long_task.py").write_text(LONG.format(path=str(training)))
    options = ("--task", "long_task", "--simulate", "2", "--run-config", "local-epochs=100000", *ONE_NODE)
    server = terminals.open("server.py", *options)
    eventually(lambda: training.exists() or server.process.poll() is not None, 240)
    assert training.exists(), server.text
    server.interrupt()
    assert server.wait(30) == 130 and server.text.endswith("server.py: stopped\n")
    assert_all_gone(terminals)
