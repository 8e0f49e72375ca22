"""TensorFlow beside PyTorch and JAX: a simulation loads it for tasks that use it, and for no others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from federation.app import hide_tensorflow
from tests.conftest import ROOT, Terminals

STATE = """
import importlib.util
def state():
    try:
        import tensorflow
    except ModuleNotFoundError:
        return "hidden" if importlib.util.find_spec("tensorflow") is None else "broken"
    return tensorflow.__name__
"""
SPY = """
import sys
import cifar
from cifar import Net, load_data, test

def train(net, data, **settings):
    if sys.modules.get("tensorflow"):
        raise RuntimeError("TensorFlow is loaded")
    return cifar.train(net, data, **settings)
"""
TRAINING = """
import tensorflow
from federation.app import hide_tensorflow
hide_tensorflow.from_workers()
import torch
net = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
before = net.weight.clone()
net(torch.ones(3, 2)).sum().backward()
optimizer.step()
print((before - net.weight).tolist(), float(tensorflow.reduce_sum([1.0, 2.0])))
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with a package of the name tensorflow, a task that imports it, and a sitecustomize."""
    for name, text in (
        ("tensorflow.py", ""),
        ("state.py", STATE),
        ("sitecustomize.py", "import sys; sys.customized = getattr(sys, 'customized', 0) + 1"),
        ("task.py", "import tensorflow\ndef Net(): ...\ndef load_data(root): ...\ndef test(net, data): ...\n"
                    "def train(net, data, *, epochs, lr, batch_size, seed): ..."),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    return tmp_path


def python(code: str, *path: Path | str, **environment: str) -> str:
    """Return what a Python that has `path` on its search path prints when it runs `code`."""
    search = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", code]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, env=inherited | {"PYTHONPATH": search} | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_hidden_until_a_task_is_loaded(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (installed, ROOT))))
    code = """
import sys
from state import state
print(state(), sys.customized)
from federation.app.task import load_task
print(load_task("task").tensorflow.__name__, state())
"""
    assert python(code, **hide_tensorflow.environment()).splitlines() == ["hidden 1", "tensorflow tensorflow"]


def test_without_it_nothing_is_hidden(installed: Path) -> None:
    code = "import sys, federation.app.hide_tensorflow as it; from state import state; it.from_workers(); it.reveal(); "
    assert python(f"{code} print(state(), it.FOLDER in sys.path)", installed, ROOT) == "tensorflow False"


def test_workers_of_a_process_that_has_loaded_it_start_without(installed: Path) -> None:
    """Flower's engine starts Ray with this process's sys.path as its workers' PYTHONPATH."""
    code = """
import os, subprocess, sys
import tensorflow
from federation.app import hide_tensorflow
hide_tensorflow.from_workers()
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path, os.environ["PYTHONPATH"]])
worker = "import sys; from state import state; print(state(), sys.customized)"
subprocess.run([sys.executable, "-c", worker], check=True)
"""
    assert python(code, installed, ROOT) == "hidden 1"


@pytest.mark.slow
def test_pytorch_trains_in_a_process_that_flower_has_loaded_it_into() -> None:
    """So it is in the server's process after flwr run."""
    for needed in ("tensorflow", "torch"):
        pytest.importorskip(needed)
    moved, total = python(TRAINING, ROOT).splitlines()[-1].rsplit(" ", 1)
    assert [[round(step, 4) for step in row] for row in eval(moved)] == [[0.3, 0.3]] and float(total) == 3


@pytest.mark.slow
def test_a_simulated_client_of_pytorch_does_not_load_it(terminals: Terminals) -> None:
    pytest.importorskip("tensorflow")
    (terminals.folder / "spy.py").write_text(SPY)
    status, text = terminals.run("server.py", "--task", "spy", "--simulate", "2", "--rounds", "1", "--data", "embedded")
    assert status == 0, text
    assert "left out" not in text
