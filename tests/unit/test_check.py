"""`python -m federation.check`: a sound script passes without a word, and each fault is named, by its own check."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from federation.app import cores
from federation.check import check as command
from federation.launch.command_line import run_script
from federation.tools import check
from tests.screen import printed_on_a_terminal, screen

SOUND = '''"""A script that may be federated without a second thought."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16

def Net():
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))

def load_data(root=None):
    random = np.random.default_rng(0)
    x, directions = random.normal(size=(300, 8)), random.normal(size=(8, 3))
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor((x @ directions).argmax(1))
    return (x[:200], y[:200]), (x[200:], y[200:])

def train(net, data, *, epochs, lr=0.1, batch_size=32, seed=0):
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    for epoch in range(epochs):
        torch.manual_seed(seed + epoch)
        total = 0.0
        for rows in torch.randperm(len(y)).split(batch_size):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
    return total / len(y)

@torch.no_grad()
def test(net, data):
    logits = net.eval()(data[0])
    return F.cross_entropy(logits, data[1]).item(), (logits.argmax(1) == data[1]).double().mean().item()

if __name__ == "__main__":
    training, testing = load_data(int(input("which one?")))
'''


def faulty(*changes: tuple[str, str]) -> str:
    """Return the sound script with something replaced."""
    source = SOUND
    for before, after in changes:
        assert before in source
        source = source.replace(before, after)
    return source


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that checks a script and returns what is said of it, line by line, and last its verdict."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "addaudithook", lambda hook: None)  # none can be removed again: see test_guide.py
    for variable in (*cores.THREADS, "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.setenv(variable, "1")  # so that it is put back

    def run(source: str) -> list[str]:
        name = f"script_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(source, "utf-8")
        assert check.check_script(name, data="") == 0
        return [line.replace(name, "NAME") for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_sound_script_passes_without_a_word(checked: Any) -> None:
    assert checked(SOUND) == ["NAME can be federated"]


def test_on_a_terminal_warnings_stand_above_the_progress_bar(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(faulty(*HURTS["no rate"][0], *HURTS["dropout"][0]), "utf-8")
    printed = printed_on_a_terminal(tmp_path, "-m", "federation.check", "script")
    assert "trying:   0%" in printed, "there is a bar"
    one, other, verdict, end = screen(printed)
    assert one.startswith("script: train() makes random steps") and other.startswith("script: train() has no default")
    assert (verdict, end) == ("script can be federated (2 warnings above)", "")


HURTS = {
    "a seed that is ignored": (
        [("torch.manual_seed(seed + epoch)", "torch.manual_seed(1)")], "ignores its seed"),
    "random numbers from elsewhere": (
        [("torch.manual_seed(seed + epoch)", "pass")], "draws random numbers that do not come from its seed"),
    "a net of its own mind": (
        [("def Net():", "def Net():\n    torch.seed()")], "is not deterministic for a fixed seed"),
    "an optimizer that restarts": (
        [("lr=lr)", "lr=lr, momentum=0.9)")], "restarts in every call"),
    "Adam": ([("SGD", "Adam"), ("lr=0.1", "lr=0.01")], "restarts in every call"),
    "a schedule that restarts": (
        [("torch.manual_seed(seed + epoch)",
          "torch.manual_seed(seed + epoch); optimizer.param_groups[0]['lr'] = lr / (epoch + 1)")],
        "restarts in every call"),
    "epochs that are not shuffled by seed and epoch": (
        [("for epoch in range(epochs):\n        torch.manual_seed(seed + epoch)",
          "torch.manual_seed(seed)\n    for epoch in range(epochs):")], "is not shuffled with seed + e"),
    "dropout": ([("nn.Tanh()", "nn.Tanh(), nn.Dropout(0.5)")], "random steps (dropout"),
    "batch statistics": (
        [("nn.Tanh()", "nn.BatchNorm1d(WIDTH)")],
        "1.num_batches_tracked, 1.running_mean, 1.running_var: changed although"),
    "a rate of its own": ([("lr=lr", "lr=0.1")], "ignores its lr"),
    "a rate of its own for some": (
        [("net.parameters()", "[{'params': net[0].parameters(), 'lr': 0.1}, {'params': net[2].parameters()}]")],
        "0.bias, 0.weight: changed although"),
    "no rate": ([("lr=0.1", "lr")], "no default for lr"),
    "a training loss that is a sum": (
        [("total / len(y)", "total")], "train() returns a sum"),
    "the sum of the last batch": (
        [("return total / len(y)", "return loss.item() * len(rows)")], "train() returns a sum"),
    "a test loss that is a sum": (
        [("F.cross_entropy(logits, data[1])", "F.cross_entropy(logits, data[1], reduction='sum')")],
        "test() returns a sum"),
    "steps along a sum": (
        [("loss.backward()", "(loss * len(rows)).backward()"), ("lr=0.1", "lr=0.001")], "follows the sum"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HURTS)
def test_what_hurts_is_named_and_nothing_else(checked: Any, fault: str) -> None:
    changes, expected = HURTS[fault]
    *found, verdict = checked(faulty(*changes))
    assert len(found) == 1 and expected in found[0] and found[0].startswith("NAME: ")
    assert verdict == "NAME can be federated (1 warning above)"


def test_a_test_in_training_mode_is_named(checked: Any) -> None:
    *found, _ = checked(faulty(("nn.Tanh()", "nn.BatchNorm1d(WIDTH)"), ("net.eval()", "net")))
    assert any("test() changes the net" in line for line in found) and len(found) == 2


def test_faults_are_named_together(checked: Any) -> None:
    changes = [change for fault in ("dropout", "a test loss that is a sum", "no rate") for change in HURTS[fault][0]]
    *found, verdict = checked(faulty(*changes))
    assert [line[:30] for line in found] == ["NAME: train() makes random ste", "NAME: test() returns a sum of ",
                                            "NAME: train() has no default f"]  # fmt: skip
    assert verdict == "NAME can be federated (3 warnings above)"


IMPORTS = {
    "a loop": ("for epoch in range(2):\n    WIDTH += epoch", "work is done at import, "),
    "long work": ("import time\nslept = time.sleep(0.6)", "work is done at import, "),
    "large data": ("x_train = np.zeros((200, 60))", "x_train is created at import"),
    "a command line": (
        "import argparse\nargs = argparse.ArgumentParser().parse_args()", "the command line is read at import"),
}  # fmt: skip


@pytest.mark.parametrize("deed", IMPORTS)
def test_what_an_import_should_not_do_is_named_with_its_line(checked: Any, deed: str) -> None:
    code, expected = IMPORTS[deed]
    *found, verdict = checked(faulty(("WIDTH = 16", f"WIDTH = 16\n{code}")))
    line = 11 + code.count("\n") if deed != "a loop" else 11
    assert len(found) == 1 and found[0].startswith(f"NAME, line {line}: {expected}")
    assert verdict == "NAME can be federated (1 warning above)"


USELESS = {
    "a new model": (
        [("x, y = data", "x, y = data\n    import copy\n    net = copy.deepcopy(net)")],
        "leaves the net that it is given as it was"),
    "a model that is returned": (
        [("return total / len(y)", "return net")], "train() returns Sequential, but it should train the net"),
    "no loss": ([("return total / len(y)", "pass")], "train() returns NoneType"),
    "one figure": ([("return F.cross_entropy(logits, data[1]).item(), ", "return ")], "test() returns 0."),
    "percent": ([(".double().mean()", ".double().mean().mul(100)")], "it should lie in 0..1"),
    "an error": ([("loss.backward()", "loss.forward()")], "failed in line 31: 'Tensor' object has no attribute"),
    "lists": ([("x[:200], y[:200]", "x[:200].tolist(), y[:200].tolist()")], "it returns list and list"),
    "no model": ([("return nn.Sequential", "return list")], ".Net() failed: list expected"),
    "another model": ([("return nn.Sequential", "return nn, ")], "Net() returned an object of type tuple, not one"),
    "a data set alone": ([(", (x[200:], y[200:])", "")], "load_data() should return (x_train, y_train), (x_test"),
    "labels that lack": ([("y[:200]", "y[:100]")], "lengths are: [200, 100]"),
    "data that are not there": ([("random = np", "random = open('/no/such/file') and np")], "No such file"),
    "half a task": (
        [("def train(", "def fit("), ("def test(net, data)", "def test(net)")],
        ".py has no train(), and it has a test() in line 36 that takes no data; a task has Net(), "),
    "a package that is missing": ([("import torch\n", "import torch, no_such\n")], "line 6, breaks the import: No mod"),
    "an exit": ([("WIDTH = 16", "exit('good bye')")], "line 10, breaks the import: good bye"),
    "a syntax error": ([("WIDTH = 16", "WIDTH = ")], "line 10"),
}  # fmt: skip


@pytest.mark.parametrize("fault", USELESS)
def test_what_cannot_be_federated_is_an_error_in_one_line(checked: Any, fault: str) -> None:
    changes, expected = USELESS[fault]
    with pytest.raises(ValueError) as error:
        checked(faulty(*changes))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_two_models_are_as_far_apart_as_their_weights(checked: Any) -> None:
    one, other = ({"a": np.array([1.0, 2.0]), "b": np.array(shift)} for shift in (0, 12))
    other["a"] = other["a"] + [3, 4]
    records = [ArrayRecord({name: Array(value) for name, value in model.items()}) for model in (one, other)]
    assert check.norm(*records) == 13.0 and check.norm(records[0], records[0]) == 0.0


@pytest.mark.parametrize(
    ("line", "status", "expected"),
    [
        (["useless"], 1, ["check.py: ", "useless.py has no Net(), and it has no load_data(), and"]),
        (["not_there"], 1, ["check.py: ", "'not_there' cannot be imported: there is no not_there.py"]),
        ([], 2, ["check.py: error: Missing argument 'SCRIPT'"]),
    ],
    ids=["useless", "missing", "unnamed"],
)
def test_the_command_fails(
    failed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], status: int, expected: list[str]
) -> None:
    (tmp_path / "useless.py").write_text("import numpy\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "addaudithook", lambda hook: None)
    ended, errors = failed(lambda: run_script(command), "check.py", *line)
    assert ended == status and all(text in errors for text in expected), errors
