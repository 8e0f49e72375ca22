"""`federate new`: a task that runs at once, and tasks that adapt scripts of others as they are."""

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from federation import new
from federation.app import cores
from federation.launch.command_line import run_script
from federation.tools import check
from federation.tools.new import gaps, write_new
from tests.conftest import ROOT
from tests.tasks import write_digits

OTHERS = ROOT / "tests" / "scripts_of_others"
EPOCHS = {"digits": 1, "clothes": 5, "hour": 2, "trainer": 40, "loaders": 2}  # until it has learnt something
UNTOLD = ("trainer", "save_every")  # of the others, everything could be told


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a user, from which tasks are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "addaudithook", lambda hook: None)
    for variable in (*cores.THREADS, "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.setenv(variable, "1")  # so that it is put back
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def said(capsys: pytest.CaptureFixture[str], task: str, data: str = "") -> list[str]:
    """Return what the check says of a task that can be federated."""
    capsys.readouterr()
    assert check.check_script(task, data) == 0
    return capsys.readouterr().out.splitlines()


# ---------------------------------------------------------------------------------------------------- one that runs


def test_a_new_task_runs_and_can_be_federated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_new(Path("my_task.py"), None)
    assert said(capsys, "my_task") == ["my_task can be federated"]
    assert "python my_task.py " in Path("my_task.py").read_text()
    printed = [subprocess.check_output([sys.executable, "my_task.py"], text=True) for _ in range(2)]
    assert printed[0] == printed[1] and float(printed[0].split()[-1]) > 0.8


def test_no_file_is_overwritten(folder: Path, failed: Callable[..., tuple[int, str]]) -> None:
    Path("mine.py").write_text("precious")
    ended = failed(lambda: run_script(new.new), "new.py", "mine.py")
    assert ended == (2, "new.py: error: mine.py exists, and is left as it is: choose another name\n")
    assert Path("mine.py").read_text() == "precious"


@pytest.mark.parametrize("name", ["my-task.py", "task", "task.txt", "client.py", "random.py", "1.py"])
def test_names_that_cannot_be_imported_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} cannot be imported as a task"):
        write_new(Path(name), None)
    assert list(folder.iterdir()) == []


# ----------------------------------------------------------------------------------------- one that adapts a script


def adapted(name: str, folder: Path) -> Path:
    """Adapt a script of others; what could not be told is filled in. Return the file."""
    shutil.copy(OTHERS / f"{name}.py", folder)
    task = Path(f"my_{name}.py")
    write_new(task, Path(f"{name}.py"))
    if name == UNTOLD[0]:
        fill_in(task, UNTOLD[1], "10")
    return task


def fill_in(task: Path, name: str, value: str) -> None:
    lines = task.read_text().splitlines()
    [place] = [number for number, line in enumerate(lines) if "TODO" in line]
    assert f"{name}=..." in lines[place + 2]
    lines[place : place + 3] = [lines[place + 2].replace(f"{name}=...", f"{name}={value}")]
    task.write_text("\n".join(lines))


@pytest.mark.parametrize("name", EPOCHS)
def test_scripts_of_others_can_be_federated_as_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_digits(folder / "elsewhere")
    task = adapted(name, folder)
    assert said(capsys, task.stem, data="elsewhere")[-1].startswith(f"my_{name} can be federated")
    assert Path(f"{name}.py").read_bytes() == (OTHERS / f"{name}.py").read_bytes()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EPOCHS)
def test_the_adapter_trains_with_the_functions_of_the_script(folder: Path, name: str) -> None:
    write_digits(folder / "data")
    task = importlib.import_module(adapted(name, folder).stem)
    torch.manual_seed(0)
    net, (training, testing) = task.Net(), task.load_data()
    before = task.test(net, testing)
    loss = task.train(net, training, epochs=EPOCHS[name])
    after = task.test(net, testing)
    assert loss < before[0] and after[0] < before[0] and after[1] > max(0.5, before[1])


def test_the_guide_shows_what_is_written(folder: Path) -> None:
    text = adapted("digits", folder).read_text()
    [shown] = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "your_own_script.md").read_text("utf-8"), re.DOTALL)
    without_spaces = "".join(text.split())  # the page has shorter lines
    assert all("".join(part.split()) in without_spaces for part in shown.split("\n\n\n"))


def test_gaps_are_listed_until_they_are_filled_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(OTHERS / "trainer.py", folder)
    assert new.new(Path("my_task.py"), Path("trainer.py")) == 0
    [line] = gaps(Path("my_task.py"))
    assert line.endswith("TODO: say below what save_every should be, and remove this line")
    todo = f"my_task.py, {line}\nwrote my_task.py; fill in what is listed above\nnext: federate check my_task\n"
    assert capsys.readouterr().out == todo
    with pytest.raises(ValueError, match="my_task cannot be federated yet: fill in what is listed above"):
        check.check_script("my_task", "")
    assert capsys.readouterr().out == f"my_task, {line}\n"


def test_a_script_in_which_nothing_is_recognised_has_a_gap_for_each_of_it(folder: Path) -> None:
    Path("odd.py").write_text("import numpy\nprint(numpy.pi)\n")
    write_new(Path("my_task.py"), Path("odd.py"))
    todos = [line.partition("TODO: ")[2] for line in gaps(Path("my_task.py"))]
    assert todos == [
        "build the model of odd.py here",
        "make train_data, the training set of odd.py, here",
        "make test_data, the test set of odd.py, here",
        "make the optimizer of net, with lr here",
        "define criterion(outputs, labels) here",
        "define criterion(outputs, labels) here",
    ]


def test_a_script_that_acts_when_it_is_imported_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hour: ModuleType = importlib.import_module(adapted("hour", folder).stem)
    clothes: ModuleType = importlib.import_module(adapted("clothes", folder).stem)
    assert capsys.readouterr().out == "" and not Path("data").exists()
    assert hour.script.classes == tuple("0123456789") and not hasattr(hour.script, "trainset")
    assert hasattr(clothes.script, "train_loop") and not hasattr(clothes.script, "model")


@pytest.mark.parametrize(
    ("script", "said"), [("elsewhere/train.py", "could not import"), ("no-name.py", "could not import")]
)
def test_a_script_that_could_not_be_imported_is_refused(folder: Path, script: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_new(Path("my_task.py"), Path(script))


def test_a_script_that_is_not_there_or_is_no_python_is_named(
    folder: Path, failed: Callable[..., tuple[int, str]]
) -> None:
    status, errors = failed(lambda: run_script(new.new), "new.py", "my_task.py", "--from", "none.py")
    assert status == 1 and "none.py" in errors and errors.count("\n") == 1
    Path("broken.py").write_text("def (")
    ended = failed(lambda: run_script(new.new), "new.py", "my_task.py", "--from", "broken.py")
    assert ended[0] == 2 and "broken.py, line 1, is not valid Python" in ended[1]
    assert not Path("my_task.py").exists()


OWN_WAYS = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, x):
        return self.layer(x)

def load_sets():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    sets = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    train_set, valid_set, test_set = torch.utils.data.random_split(sets, [50, 10, 30])
    return train_set, valid_set, test_set

def fit(model, loader, n_epochs, weight=0.5):
    optimizer = torch.optim.RMSprop(model.parameters())
    criterion = nn.CrossEntropyLoss()
    for _ in range(n_epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

if __name__ == "__main__":
    size, outputs = 4, 3
    hidden = 2 * 8
    network = Network(size, hidden, outputs)
    fit(network, torch.utils.data.DataLoader(load_sets()[0], batch_size=5), 3)
"""


def test_what_a_script_does_by_itself_is_left_to_it_and_noted(folder: Path) -> None:
    Path("own_ways.py").write_text(OWN_WAYS)
    write_new(Path("my_task.py"), Path("own_ways.py"))
    text = Path("my_task.py").read_text()
    assert "train_data, _, test_data = script.load_sets()\n" in text, "the test set, and not that for validation"
    assert "# load_sets() has no parameter for the folder: root does not reach it\n" in text
    assert "# the script's own function makes an optimizer: lr does not reach it\n" in text
    assert "script.fit(model=net, loader=loader, n_epochs=epochs)" in text and "for epoch in range" not in text
    assert "epochs=1, lr=0.01, batch_size=5, seed=0" in text, "as RMSprop and the script's DataLoader have it"
    [gap] = gaps(Path("my_task.py"))
    assert gap.endswith("TODO: say what size, outputs should be: replace this line")
    assert "    hidden = 2 * 8\n    return script.Network(size, hidden, outputs)  # line" in text
