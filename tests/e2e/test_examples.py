"""Three scripts that the project's client and server have never seen, each with another framework, across terminals.

Two are in examples/. The third is as a user's own: in a folder of its own, with its data and a helper
beside it, and with what is easily lost on the way: batch statistics, groups of parameters, tensors out of line.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from federation.app import weights
from federation.launch.network import free_port
from tests.conftest import ROOT, Terminal, Terminals
from tests.images import write_images
from tests.tasks import write_own

Runs = Callable[[str], SimpleNamespace]  # a task's name to its run
Site = tuple[dict[str, str], tuple[str, ...]]  # the environment of a client, and its options
IMAGES = 1000, 200  # for Keras, which is slow at the 12,000 that are generated
NO_TORCH = "raise ImportError('there is no torch here')\n"


def needs(framework: str) -> Any:
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason=f"needs {framework}")


@pytest.fixture(scope="module")
def own_folder(module_terminals: Terminals) -> Path:
    """A folder with a script, its helper and its data; one with the same data only; no torch for JAX; a few images."""
    folder = module_terminals.folder / "own"
    write_own(folder)
    shutil.copytree(folder / "data", module_terminals.folder / "elsewhere" / "data")
    (module_terminals.folder / "no_torch").mkdir()
    (module_terminals.folder / "no_torch" / "torch.py").write_text(NO_TORCH)
    write_images(module_terminals.folder / "images", *IMAGES)
    return folder


@pytest.fixture(scope="module")
def runs(module_terminals: Terminals, own_folder: Path) -> Runs:
    """Federate a script when it is first asked for, with one client or two."""
    plain, embedded = {"PWD": str(own_folder.parent)}, ("--data", "embedded", "--rounds", "2")
    no_torch = plain | {"PYTHONPATH": str(own_folder.parent / "no_torch")}
    elsewhere = own_folder.parent / "elsewhere"
    sites: list[Site] = [
        ({"PWD": str(own_folder)}, ()), ({"PWD": str(elsewhere)}, ("--data", str(elsewhere / "data")))
    ]  # fmt: skip
    settings: dict[str, tuple[tuple[str, ...], dict[str, str], list[Site]]] = {
        "examples.mnist_jax": (embedded, no_torch, [(no_torch, ())]),
        "examples.cifar_keras": (("--data", str(own_folder.parent / "images"), *embedded[2:]), plain, [(plain, ())]),
        "my_script": (("--rounds", "1"), sites[0][0], sites),
    }
    return functools.cache(lambda task: play(module_terminals, task, own_folder.parent / task, *settings[task]))


def play(
    terminals: Terminals, task: str, out: Path, options: tuple[str, ...], environment: dict[str, str], sites: list[Site]
) -> SimpleNamespace:
    """Federate a task across terminals, with a client for each of the sites."""
    address = f"127.0.0.1:{free_port()}"
    command = ("--task", task, "--clients", str(len(sites)), "--address", address, "--out", str(out), *options)
    server = terminals.open("server.py", *command, **environment)
    client = ("client.py", "--server", address, "--threads", "1")  # whoever else runs: one more, another sum
    return outcome(out, server, [terminals.open(*client, *own, **where) for where, own in sites])


def outcome(out: Path, server: Terminal, clients: list[Terminal]) -> SimpleNamespace:
    statuses = [server.wait(400), *(client.wait(60) for client in clients)]
    text = server.text + "".join(client.text for client in clients)
    assert set(statuses) == {0}, text
    assert "Traceback" not in text
    return SimpleNamespace(out=out, text=text, metrics=json.loads((out / "metrics.json").read_text()))


def digest(values: dict[str, Any]) -> str:
    return weights.sha256(ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()}))


@pytest.mark.parametrize(
    ("task", "clients", "samples"),
    [
        pytest.param("examples.mnist_jax", 1, (6000, 1000), marks=[needs("jax"), pytest.mark.slow]),
        pytest.param("examples.cifar_keras", 1, IMAGES, marks=[needs("keras"), pytest.mark.slow]),
        ("my_script", 2, (200, 100)),
    ],
)
def test_clients_train_it_and_the_server_agrees(runs: Runs, task: str, clients: int, samples: tuple[int, int]) -> None:
    metrics = runs(task).metrics
    assert metrics["task"] == task and metrics["status"] == "finished"
    assert (metrics["dataset"]["train"], metrics["dataset"]["test"]) == samples
    before, *_, after = metrics["rounds"]
    assert (
        after["clients"] == clients and after["dropped"] == 0 and after["samples"] == [samples[0] // clients] * clients
    )
    assert after["clients_accuracy"] == pytest.approx(after["server_accuracy"], rel=1e-6)
    assert after["clients_loss"] == pytest.approx(after["server_loss"], rel=1e-4)
    assert after["server_loss"] < before["server_loss"]
    messages = clients * (len(metrics["rounds"]) - 1)
    assert runs(task).text.count("trained on") == runs(task).text.count("tested on") == messages


@pytest.mark.slow
@needs("jax")
def test_flax_ends_with_an_npz_that_the_script_loads(runs: Runs) -> None:
    from examples import mnist_jax

    run = runs("examples.mnist_jax")
    net = mnist_jax.load(run.out / "final_model.npz")
    last = run.metrics["rounds"][-1]
    assert mnist_jax.test(net, mnist_jax.load_data("embedded")[1]) == pytest.approx(
        (last["server_loss"], last["server_accuracy"]), rel=1e-4
    )
    with np.load(run.out / "final_model.npz") as saved:
        assert digest(dict(saved)) == run.metrics["final_weights_sha256"]
    assert set(run.metrics["versions"]) == {"python", "flwr", "jax", "flax", "optax"}, "and no torch"


@pytest.mark.slow
@needs("keras")
def test_keras_ends_with_a_model_that_keras_loads(runs: Runs) -> None:
    import keras

    from examples import cifar_keras

    run = runs("examples.cifar_keras")
    net = keras.saving.load_model(run.out / "final_model.keras")
    last = run.metrics["rounds"][-1]
    assert cifar_keras.test(net, cifar_keras.load_data(str(run.out.parent / "images"))[1]) == pytest.approx(
        (last["server_loss"], last["server_accuracy"]), rel=1e-3
    )
    assert digest({v.path: v.numpy() for v in net.weights}) == run.metrics["final_weights_sha256"]
    assert {"keras", "tensorflow"} <= set(run.metrics["versions"]) and "torch" not in run.metrics["versions"]


def test_a_script_of_ones_own_ends_with_its_state_dict(runs: Runs) -> None:
    import torch

    run = runs("my_script")
    state = torch.load(run.out / "final_model.pt", weights_only=True)
    assert digest({name: tensor.numpy() for name, tensor in state.items()}) == run.metrics["final_weights_sha256"]
    assert state["norm.num_batches_tracked"] == 4 and state["norm.num_batches_tracked"].dtype == torch.int64
    assert state["scale"].tolist() == [1, 3, 5] and state["last.weight"].shape == (3, 16)


def test_a_script_of_ones_own_is_found_to_be_a_task(own_folder: Path) -> None:
    command = [sys.executable, "-m", "federation.check", "my_script"]
    check = subprocess.run(
        command, cwd=own_folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert check.returncode == 0, check.stderr
    first, last = check.stdout.splitlines()
    assert first.startswith(
        "my_script: norm.num_batches_tracked, norm.running_mean, norm.running_var: changed although"
    )
    assert last == "my_script can be federated (1 warning above)"


EXAMPLES = [
    pytest.param("examples.mnist_jax", marks=needs("jax")),
    pytest.param("examples.cifar_keras", marks=needs("keras")),
]


@pytest.mark.slow
@pytest.mark.parametrize("task", EXAMPLES)
def test_a_run_that_is_resumed_in_a_simulation_ends_with_the_same_weights(
    runs: Runs, module_terminals: Terminals, task: str
) -> None:
    """Of the two rounds across terminals, the second is played again."""
    out = module_terminals.folder / f"resumed-{task}"
    shutil.copytree(runs(task).out, out)
    (out / "checkpoint-2.npz").unlink()
    status, text = module_terminals.run("server.py", "--simulate", "1", "--resume", "--rounds", "2", "--out", str(out))
    assert status == 0, text
    resumed, played = json.loads((out / "metrics.json").read_text()), runs(task).metrics
    assert resumed["rounds"][:2] == played["rounds"][:2] and len(resumed["rounds"]) == 3
    assert resumed["rounds"][2]["seconds"] != played["rounds"][2]["seconds"], "it was played again"
    assert resumed["final_weights_sha256"] == played["final_weights_sha256"]
