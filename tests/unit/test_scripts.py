"""What the three scripts have in common: the data that they carry, their command line and its errors."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from federation.app import weights
from federation.app.task import seed_generators
from tests.conftest import ROOT

Outcome = tuple[int, str]


class Script(NamedTuple):
    """Where a script is, what it needs, and what it says in its own words."""

    module: str
    needs: tuple[str, ...]  # the first one is what tells whether the others are installed, too
    download: str  # the function that gets the data
    embedded: tuple[int, int]  # samples
    image: tuple[int, ...]
    missing: str  # what is said of data that are not there, and of damaged ones
    damaged: str

    @property
    def task(self) -> Any:
        return importlib.import_module(self.module)

    @property
    def data(self) -> Any:
        """The module that finds the data: the script, unless it has one for that."""
        return sys.modules[self.task.find_data.__module__]

    @property
    def path(self) -> Path:
        return ROOT / f"{self.module.replace('.', '/')}.py"


SCRIPTS = [
    Script(
        "cifar", ("torch", "torchvision", "numpy", "tqdm"), "torchvision.datasets.cifar.download_and_extract_archive",
        (10_000, 2_000), (32, 32, 3), "data folder {} does not exist", "image {}/train/0/a.png is damaged: ",
    ),
    Script(
        "examples.cifar_keras", ("keras", "numpy", "tqdm"), "keras.datasets.cifar10.load_data",
        (10_000, 2_000), (32, 32, 3), "data folder {} does not exist", "image {}/train/0/a.png is damaged: ",
    ),
    Script(
        "examples.mnist_jax", ("jax", "flax", "optax", "pooch", "numpy", "tqdm"), "pooch.retrieve",
        (6_000, 1_000), (28, 28), "data file {}/mnist.npz does not exist", "{}/mnist.npz is damaged or not MNIST: ",
    ),
]  # fmt: skip


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.path.name)
def script(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return each script, with an empty cache folder and no network."""

    def download(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    script: Script = request.param
    pytest.importorskip(script.needs[0], reason=f"needs pip install '.[{script.needs[0]}]'")
    monkeypatch.setattr(script.download, download)
    monkeypatch.setattr(script.data, "DATA_DIR", tmp_path / "cache" / "home")
    return script


# --------------------------------------------------------------------------------------------------- embedded data


def test_embedded_data_have_the_shape_of_the_real_ones(script: Script) -> None:
    for (images, labels), samples in zip(script.task.load_data("embedded"), script.embedded, strict=True):
        assert images.shape == (samples, *script.image) and str(images.dtype).split(".")[-1] == "uint8"
        assert labels.shape == (samples,) and str(labels.dtype).split(".")[-1] == "int64"
        counts = np.bincount(labels)
        assert len(counts) == 10 and counts.min() > samples / 10 * 0.8


def test_embedded_data_are_the_same_every_time(script: Script) -> None:
    one, other, third = (script.data.embedded_data(50, seed) for seed in (1, 1, 2))
    assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
    assert not np.array_equal(one[0], third[0])


def test_without_data_and_network_the_embedded_set_is_used_loudly(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.task.find_data() == "embedded"
    said, warning = capsys.readouterr()
    assert said == "" and [line[:9] for line in warning.splitlines()] == ["WARNING: "] * 2
    assert "EMBEDDED" in warning and "--data" in warning and str(script.data.DATA_DIR) in warning
    assert np.array_equal(script.task.load_data()[1][0], script.data.embedded_data(script.embedded[1], seed=2)[0])


def test_the_embedded_set_that_was_named_is_used_silently(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.task.find_data("embedded") == "embedded"
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def cli(script: Script, failed: Callable[..., Outcome]) -> Callable[..., Outcome]:
    return lambda *line: failed(script.task.main, script.path.name, *line)


def one_line(outcome: Outcome) -> str:
    """Return the one line of an error that the user made no mistake on the command line for."""
    status, errors = outcome
    assert (status, errors.count("\n")) == (1, 1), errors
    return errors


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"), ("--epochs", "-1"), ("--epochs", "many"), ("--epochs", "2.5"),
        ("--batch-size", "0"), ("--batch-size", "x"), ("--batch-size", "99999999999999999999"),
        ("--lr", "0"), ("--lr", "-0.1"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "fast"),
        ("--seed", "-1"), ("--seed", "1.5"), ("--seed", "99999999999999999999"), ("--colour", "red"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused(
    script: Script, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    monkeypatch.setattr(script.task, "train", lambda *_, **__: pytest.fail("it started to train"))
    status, errors = cli("--data", "embedded", option, value)
    *_, last = errors.splitlines()
    assert status == 2
    assert last.startswith(f"{script.path.name}: error: ") and option in last
    assert value in last


def test_missing_data_end_the_command_in_one_line(script: Script, cli: Callable[..., Outcome], tmp_path: Path) -> None:
    said = script.missing.format(tmp_path / "nowhere")
    assert one_line(cli("--data", "nowhere")).startswith(f"{script.path.name}: {said}")


def test_damaged_data_end_the_command_in_one_line(script: Script, cli: Callable[..., Outcome], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    images = [damaged / split / str(label) / "a.png" for split in ("train", "test") for label in range(10)]
    for file in (*images, damaged / "mnist.npz"):
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(b"PK\x03\x04 and no more")
    said = script.damaged.format(damaged)
    assert one_line(cli("--data", str(damaged))).startswith(f"{script.path.name}: {said}")


def test_an_output_folder_that_cannot_be_made_ends_the_command_in_one_line(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in one_line(cli("--data", "embedded", "--out", str(tmp_path / "file" / "run")))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_an_output_folder_that_cannot_be_written_is_refused_before_training(
    script: Script, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.task, "train", lambda *_, **__: pytest.fail("it started to train"))
    errors = one_line(cli("--data", "embedded", "--out", "/proc"))
    assert errors.startswith(f"{script.path.name}: ") and "/proc" in errors


def test_stopped_before_an_epoch_is_finished_it_promises_no_model(
    script: Script, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(script.task, "train", interrupted)
    assert cli("--data", "embedded") == (1, f"{script.path.name}: stopped\n")


@pytest.fixture
def given(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return a function that runs the command, and returns the net that it would train and with what options."""
    monkeypatch.chdir(tmp_path)

    def given(*line: str) -> tuple[Any, dict[str, Any]]:
        calls: list[tuple[Any, dict[str, Any]]] = []
        monkeypatch.setattr(script.task, "train", lambda net, data, **options: calls.append((net, options)))
        monkeypatch.setattr(sys, "argv", [script.path.name, "--data", "embedded", *line])
        script.task.main()
        [(net, options)] = calls
        del options["after_epoch"]
        assert options.pop("device", "auto") == "auto"
        return net, options

    return given


def digest(net: Any) -> str:
    return weights.sha256(weights.from_net(net))


def new_net(script: Script, seed: int) -> str:
    """Return the digest of the net that the script makes of a seed: JAX has no global generator to seed."""
    seed_generators(seed)
    return digest(script.task.Net(seed) if "jax" in script.needs else script.task.Net())


def test_options_are_what_it_trains_with(script: Script, given: Any, tmp_path: Path) -> None:
    net, options = given("--epochs", "7", "--batch-size", "9", "--lr", "0.5", "--seed", "3", "--out", "here")
    assert options == {"epochs": 7, "batch_size": 9, "lr": 0.5, "seed": 3}
    assert digest(net) == new_net(script, 3) != new_net(script, 4)
    assert (tmp_path / "here").is_dir()


def test_without_options_it_trains_with_the_defaults_of_its_train(script: Script, given: Any) -> None:
    parameters = inspect.signature(script.task.train).parameters
    net, options = given()
    assert options == {name: parameters[name].default for name in ("epochs", "batch_size", "lr", "seed")}
    assert digest(net) == new_net(script, 0)


# ------------------------------------------------------------------------------------------------------ what it needs


def test_the_script_names_no_import_but_what_it_needs(script: Script) -> None:
    files = {script.path, Path(script.data.__file__)}
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names - {script.data.__name__} == (
        set(script.needs)
    )
