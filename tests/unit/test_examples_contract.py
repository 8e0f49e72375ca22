"""The examples that bring their own data: each trains, repeats itself, measures what it says, and is a script alone."""

import ast
import functools
import importlib
import inspect
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from federation.app.samples import take
from federation.app.task import build_net, classes_of, seed_generators
from tests.conftest import ROOT, USUAL

SAMPLES = 90, 40  # for training and testing: the last batch of 32 is not full
Weights = dict[str, NDArray[Any]]


class Example(NamedTuple):
    """An example, what it needs, what its test() returns, and arguments of its train()."""

    name: str
    extra: str
    needs: tuple[str, ...]
    metrics: tuple[str, ...]  # besides the loss
    model: str  # the file that it saves
    setting: dict[str, float]  # an argument of its own, with another value than the default
    memoryless: dict[str, float]  # with these, nothing is kept from step to step

    @property
    def task(self) -> Any:
        return importlib.import_module(f"examples.{self.name}")

    @property
    def path(self) -> Path:
        return ROOT / "examples" / f"{self.name}.py"


EXAMPLES = [
    Example("diabetes_torch", "sklearn", ("torch", "sklearn"), ("mae", "r2"), "model.pt",
            {"momentum": 0.5}, {"momentum": 0.0}),
    Example("digits_sklearn", "sklearn", ("numpy", "sklearn"), ("accuracy",), "model.npz", {"alpha": 0.01}, {}),
    Example("digits_lightning", "lightning", ("torch", "pytorch_lightning", "sklearn"), ("accuracy",), "model.pt",
            {"momentum": 0.5}, {"momentum": 0.0}),
    Example("text_lora", "text", ("torch", "peft", "transformers"), ("perplexity",), "adapters.pt",
            {"beta1": 0.5}, {"beta1": 0.0, "beta2": 0.0}),
]  # fmt: skip


def need(example: Example) -> Example:
    for module in example.needs:
        pytest.importorskip(module, reason=f"needs pip install '.[{example.extra}]'")
    return example


def the(name: str) -> Any:
    """Return the module of an example. Skips the test if what it needs is not installed."""
    return need(next(example for example in EXAMPLES if example.name == name)).task


@pytest.fixture(params=EXAMPLES, ids=lambda example: example.name, scope="module")
def example(request: pytest.FixtureRequest) -> Example:
    return need(request.param)


@functools.cache
def some_data(task: Any) -> Any:
    """Return a few samples for training and a few for testing."""
    return [take(split, np.arange(most)) for split, most in zip(task.load_data(), SAMPLES, strict=True)]


def new_net(task: Any, seed: int = 3) -> Any:
    return build_net(task, seed, classes_of(task, task.load_data()[0]))


def weights_of(net: Any) -> Weights:
    """Return copies of all weights."""
    state = net if isinstance(net, dict) else {name: tensor.numpy() for name, tensor in net.cpu().state_dict().items()}
    return {name: np.array(value) for name, value in state.items()}


def same(one: Weights, other: Weights) -> bool:
    """Tell whether two models have the same weights, bit for bit."""
    assert one.keys() == other.keys()
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


def trained(task: Any, calls: int = 1, seed: int = 5, **settings: Any) -> Weights:
    """Return the weights after `calls` of train(), which goes on from the seed, as the rounds of a federation do."""
    net, epochs = new_net(task), settings.get("epochs", 1)
    seed_generators(random.randrange(2**31))  # all that train() draws should come from its own seed
    for call in range(calls):
        task.train(net, some_data(task)[0], **{"epochs": 1, "seed": seed + call * epochs} | settings)
    return weights_of(net)


# ----------------------------------------------------------------------------------------------------------- training


def test_training_lowers_the_loss(example: Example) -> None:
    net, (data, _) = new_net(example.task), some_data(example.task)
    before = example.task.test(net, data)[0]
    losses: list[float] = []
    last = example.task.train(net, data, epochs=4, batch_size=10, after_epoch=lambda _, loss: losses.append(loss))
    assert type(last) is float and len(losses) == 4 and losses[-1] == last < losses[0]
    assert example.task.test(net, data)[0] < 0.9 * before


def test_losses_are_means_over_the_samples(example: Example) -> None:
    """With steps of length 0, train() sees the loss that test() sees, whatever the batches."""
    net, (data, _) = new_net(example.task), some_data(example.task)
    expected = example.task.test(net, data)[0]
    for batch_size in (32, 64, 90):
        loss = example.task.train(net, data, epochs=1, lr=0.0, batch_size=batch_size)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_several_calls_of_one_epoch_are_one_call_of_several(example: Example) -> None:
    together = trained(example.task, epochs=3, **example.memoryless)
    assert same(trained(example.task, calls=3, epochs=1, **example.memoryless), together)


def test_the_seed_decides_the_order_and_nothing_else_does(example: Example) -> None:
    one = trained(example.task)
    assert same(trained(example.task), one)
    assert not same(trained(example.task, seed=6), one)


def test_an_argument_of_its_own_takes_effect(example: Example) -> None:
    assert not same(trained(example.task, epochs=2, **example.setting), trained(example.task, epochs=2))


def test_testing_leaves_the_net_as_it_is(example: Example) -> None:
    net = new_net(example.task)
    before = weights_of(net)
    first = example.task.test(net, some_data(example.task)[1])
    assert example.task.test(net, some_data(example.task)[1]) == first
    assert same(weights_of(net), before)


# ------------------------------------------------------------------------------------------------- what each measures


def test_diabetes_measures_what_scikit_learn_measures() -> None:
    task = the("diabetes_torch")
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    x, y = some_data(task)[1]
    weights = trained(task, epochs=5)
    hidden = np.maximum(x.numpy() @ weights["layers.0.weight"].T + weights["layers.0.bias"], 0)
    scores = (hidden @ weights["layers.2.weight"].T + weights["layers.2.bias"])[:, 0] * 77 + 152
    net = new_net(task)
    task.train(net, some_data(task)[0], epochs=5, seed=5)
    loss, metrics = task.test(net, (x, y))
    assert loss == pytest.approx(mean_squared_error(y, scores) / 77**2, rel=1e-4)
    assert metrics == pytest.approx({"mae": mean_absolute_error(y, scores), "r2": r2_score(y, scores)}, rel=1e-3)


def test_diabetes_r2_of_a_single_patient_is_finite() -> None:
    task = the("diabetes_torch")
    x, y = some_data(task)[1]
    assert task.test(task.Net(), (x[:1], y[:1]))[1]["r2"] == 0.0


def test_diabetes_data_are_scaled_and_in_points() -> None:
    (x_train, y_train), (x_test, y_test) = the("diabetes_torch").load_data()
    assert (len(x_train), len(x_test)) == (len(y_train), len(y_test)) == (353, 89)
    x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
    np.testing.assert_allclose((x.mean(0), x.std(0)), (np.zeros(10), np.ones(10)), atol=1e-5)
    assert (y.min(), y.max()) == (25, 346) and (y.mean(), y.std()) == pytest.approx((152, 77), abs=0.5)


def test_digits_sklearn_measures_what_its_weights_say() -> None:
    """The class with the largest score is predicted; its probability is its share of the sigmoids of all scores."""
    task = the("digits_sklearn")
    net, (x, y) = new_net(task), some_data(task)[1]
    task.train(net, some_data(task)[0], epochs=3)
    sigmoids = 1 / (1 + np.exp(-(x @ net["coef"].T + net["intercept"])))
    likely = sigmoids[np.arange(len(y)), y] / sigmoids.sum(1)
    accuracy = (sigmoids.argmax(1) == y).mean()
    assert 0.5 < accuracy < 1
    assert task.test(net, (x, y)) == pytest.approx((-np.log(likely).mean(), accuracy))


def test_digits_sklearn_trains_the_arrays_that_it_is_given() -> None:
    task = the("digits_sklearn")
    net = task.Net()
    arrays = dict(net)
    task.train(net, some_data(task)[0], epochs=1)
    assert type(net) is dict and all(net[name] is arrays[name] for name in ("coef", "intercept")) and len(net) == 2
    assert arrays["coef"].shape == (10, 64) and arrays["coef"].any() and arrays["intercept"].any()


def test_digits_sklearn_trains_as_scikit_learn_does_by_itself() -> None:
    task = the("digits_sklearn")
    from sklearn.linear_model import SGDClassifier

    net, (x, y) = task.Net(), task.load_data()[0]
    task.train(net, (x, y), epochs=1, seed=5)
    alone = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1, alpha=0.0001, shuffle=False)
    order = np.random.default_rng(5).permutation(len(y))
    for start in range(0, len(y), 32):
        alone.partial_fit(x[order[start : start + 32]], y[order[start : start + 32]], classes=np.arange(10))
    np.testing.assert_array_equal(net["coef"], alone.coef_)
    np.testing.assert_array_equal(net["intercept"], alone.intercept_)


def test_digits_lightning_measures_what_pytorch_computes() -> None:
    task = the("digits_lightning")
    import torch

    net, (train, test) = new_net(task), some_data(task)
    task.train(net, train, epochs=8, batch_size=10)
    images, labels = torch.stack([image for image, _ in test]), torch.tensor([label for _, label in test])
    with torch.no_grad():
        logits = net(images)
    loss, accuracy = torch.nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).sum() / 40
    assert 0.5 < accuracy < 1
    assert task.test(net, test, batch_size=7) == pytest.approx((loss, accuracy.item()))


def test_digits_lightning_has_data_sets_with_targets() -> None:
    task = the("digits_lightning")
    from torch.utils.data import Dataset, Subset

    train, test = task.load_data()
    assert isinstance(train, Dataset) and isinstance(some_data(task)[0], Subset)
    assert (len(train), len(test)) == (1437, 360)
    assert [train[row][1] for row in range(50)] == train.targets[:50].tolist()
    image, label = train[0]
    assert image.shape == (1, 8, 8) and (image.min(), image.max()) == (-1, 1) and type(label) is int


def test_digits_lightning_takes_the_number_of_classes() -> None:
    task = the("digits_lightning")
    assert task.Net(classes=4).linear.bias.shape == (4,)
    assert task.Net().linear.bias.shape == (10,)


def test_digits_lightning_says_and_leaves_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = the("digits_lightning")
    monkeypatch.chdir(tmp_path)
    net = new_net(task)
    capfd.readouterr()
    task.train(net, some_data(task)[0], epochs=2, after_epoch=lambda *_: task.test(net, some_data(task)[1]))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert next(net.parameters()).device.type == "cpu" and net.training


def test_text_measures_what_transformers_measures() -> None:
    """Its loss for labels compares each byte with the one before; here the labels are the bytes that follow."""
    task = the("text_lora")
    import torch

    net, (train, (x, y)) = new_net(task), some_data(task)
    task.train(net, train, epochs=1)
    with torch.no_grad():
        expected = net.model(torch.cat([x, y[:, -1:]], dim=1), labels=torch.cat([x, y[:, -1:]], dim=1)).loss.item()
    loss, metrics = task.test(net, (x, y), batch_size=7)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics == pytest.approx({"perplexity": np.exp(loss)})


def test_text_trains_the_adapters_alone() -> None:
    task = the("text_lora")
    net = task.Net(seed=3)
    names = net.trainable()
    before = weights_of(net)
    assert set(names) < set(before) and all("lora" in name for name in names)
    assert (sum(before[name].size for name in names), sum(map(np.size, before.values()))) == (19_968, 134_976)
    task.train(net, some_data(task)[0], epochs=1)
    after = weights_of(net)
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert moved == set(names)


def test_text_has_one_base_whatever_the_seeds() -> None:
    task = the("text_lora")
    import torch

    torch.manual_seed(1)
    one, state = task.Net(seed=1), torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state()), "Net() draws no random numbers of others"
    torch.manual_seed(2)
    other = task.Net(seed=2)
    differ = [name for name, weight in weights_of(one).items() if (weight != weights_of(other)[name]).any()]
    assert differ == [name for name in one.trainable() if "lora_A" in name]
    tokens = some_data(task)[1][0]
    with torch.no_grad():
        torch.testing.assert_close(one(tokens), other(tokens), msg="untrained adapters have no effect")


def test_text_of_ones_own(tmp_path: Path) -> None:
    task = the("text_lora")
    text = "".join(chr(97 + i % 26) for i in range(30 * 64 + 17))
    (tmp_path / "own.txt").write_text(text)
    (x_train, y_train), (x_test, y_test) = task.load_data(str(tmp_path / "own.txt"))
    assert x_train.shape == y_train.shape == (27, 64) and x_test.shape == y_test.shape == (3, 64)
    assert bytes([*x_train.flatten(), *x_test.flatten()]).decode() == text[: 30 * 64]
    assert bytes([*y_train.flatten(), *y_test.flatten()]).decode() == text[1 : 30 * 64 + 1]


def test_text_that_is_made_up_follows_the_grammar() -> None:
    task = the("text_lora")
    text = task.sentences(200, seed=4)
    assert text == task.sentences(200, seed=4) != task.sentences(200, seed=5)
    words = {word for options in task.GRAMMAR.values() for option in options for word in option.split()}
    assert {word.rstrip(".") for word in text.split()} == {word.rstrip(".") for word in words} - task.GRAMMAR.keys()
    assert text.count(".") == 200


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def cli(example: Example, failed: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
    return lambda *line: failed(example.task.main, example.path.name, *line)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--epochs", "0"), ("--epochs", "many"), ("--batch-size", "-1"), ("--batch-size", "99999999999999999999"),
     ("--lr", "0"), ("--lr", "nan"), ("--seed", "-1"), ("--seed", "1.5"), ("--colour", "red")],
)  # fmt: skip
def test_a_wrong_line_is_refused(
    example: Example, cli: Any, monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    monkeypatch.setattr(example.task, "train", lambda *_, **__: pytest.fail("it started to train"))
    status, errors = cli(option, value)
    *_, last = errors.splitlines()
    assert status == 2
    assert last.startswith(f"{example.path.name}: error: ") and option in last and value in last


def test_an_output_folder_that_cannot_be_made_ends_the_command_in_one_line(
    example: Example, cli: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    status, errors = cli("--out", str(tmp_path / "file" / "run"))
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"{example.path.name}: ") and str(tmp_path / "file") in errors


def test_data_that_are_not_there_are_named_and_not_replaced(example: Example, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "nowhere"))):
        example.task.load_data(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), ("too short", "has 9 bytes, but at least 1,281")]
)
def test_text_that_cannot_be_used_ends_the_command_in_one_line(
    failed: Callable[..., tuple[int, str]], tmp_path: Path, content: str | None, said: str
) -> None:
    task = the("text_lora")
    if content:
        (tmp_path / "own.txt").write_text(content)
    status, errors = failed(task.main, "text_lora.py", "--data", "own.txt")
    assert (status, errors.count("\n")) == (1, 1) and errors.startswith("text_lora.py: ")
    assert said in errors and "own.txt" in errors


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Give back Ctrl-C, which Lightning switches off when it has come."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupts")
def test_stopped_by_ctrl_c_it_says_so(example: Example, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes in the midst of an epoch."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    inner = {
        "diabetes_torch": "relative_error", "digits_sklearn": "log_loss",
        "digits_lightning": "Net.training_step", "text_lora": "Net.forward",
    }[example.name]  # fmt: skip
    monkeypatch.setattr(f"{example.task.__name__}.{inner}", interrupt)
    assert cli() == (1, f"{example.path.name}: stopped\n")


def test_the_defaults_of_the_command_are_those_of_train(
    example: Example, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parameters = inspect.signature(example.task.train).parameters
    calls: list[dict[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example.path.name])
    monkeypatch.setattr(example.task, "train", lambda net, data, **options: calls.append(options))
    example.task.main()
    [options] = calls
    del options["after_epoch"]
    assert options == {name: parameters[name].default for name in ("epochs", "lr", "batch_size", "seed")}


ALONE = """
import atexit, json, os, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(99)

def note():
    with open(os.environ["NOTES"], "w") as notes:
        json.dump(sorted(sys.modules), notes)

sys.addaudithook(refuse)
atexit.register(note)
"""


@pytest.fixture(scope="module")
def alone(example: Example, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of the script in a process of its own, in an empty folder, which may connect to nothing."""
    folder = tmp_path_factory.mktemp(example.name)
    (folder / "site").mkdir()
    (folder / "work").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(ALONE)
    path = os.pathsep.join([str(folder / "site"), *filter(None, [USUAL.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(example.path), "--epochs", "2", "--batch-size", "64", "--seed", "4", "--out", "here"],
        cwd=folder / "work", capture_output=True, text=True, timeout=300,
        env=USUAL | {"PYTHONPATH": path, "NOTES": str(folder / "notes.json"), "HOME": str(folder / "home")},
    )  # fmt: skip
    modules = json.loads((folder / "notes.json").read_text()) if done.returncode == 0 else []
    return SimpleNamespace(done=done, folder=folder / "work", modules={name.split(".")[0] for name in modules})


def test_alone_it_prints_an_aligned_line_per_epoch(example: Example, alone: SimpleNamespace) -> None:
    assert (alone.done.returncode, alone.done.stderr) == (0, "")
    _, header, *rows, last = alone.done.stdout.splitlines()
    assert header.split() == ["epoch", "train", "loss", "test", "loss", *example.metrics, "seconds"]
    ends = [match.end() for match in re.finditer(r"\S+( loss)?", header)]
    assert [[match.end() for match in re.finditer(r"\S+", row)] for row in rows] == [ends] * 2
    assert float(rows[1].split()[1]) < float(rows[0].split()[1]), "the loss falls"
    assert last == f"saved here/{example.model}"


def test_alone_it_saves_the_model_that_it_reports(example: Example, alone: SimpleNamespace) -> None:
    """It is also the one that the same calls make in this process: all is drawn from the seed."""
    task = example.task
    net = task.Net(4) if "seed" in inspect.signature(task.Net).parameters else build_net(task, 4)
    train, test = task.load_data()
    task.train(net, train, epochs=2, batch_size=64, seed=4)
    saved, expected = load(alone.folder / "here" / example.model), weights_of(net)
    assert [path.name for path in alone.folder.rglob("*")] == ["here", example.model]
    assert saved.keys() == set(net.trainable() if hasattr(net, "trainable") else expected)
    for name in saved:
        np.testing.assert_allclose(saved[name], expected[name], rtol=1e-2, atol=1e-4)
    loss, metrics = task.test(net, test)
    values = [loss, *(metrics.values() if isinstance(metrics, dict) else [metrics])]
    shown = alone.done.stdout.splitlines()[3].split()[2:-1]
    assert [float(value) for value in shown] == pytest.approx(values, rel=2e-2)


def load(path: Path) -> Weights:
    if path.suffix == ".npz":
        with np.load(path) as saved:
            return dict(saved)
    import torch

    return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}


def test_alone_it_imports_nothing_of_this_project_nor_flower(example: Example, alone: SimpleNamespace) -> None:
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {"federation", "examples", "cifar", "server", "client"} <= ours
    assert set(example.needs) <= alone.modules
    assert alone.modules & (ours | {"flwr", "jax", "keras", "tensorflow"}) == set()


def test_the_script_names_no_import_but_what_it_needs(example: Example) -> None:
    nodes = list(ast.walk(ast.parse(example.path.read_text())))
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"numpy"} == {*example.needs} - {"numpy"}


def test_without_what_it_needs_it_says_how_to_get_it(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in set(example.needs) - {"torch", "numpy"}:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            for name in [name for name in sys.modules if name.split(".")[0] == missing]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, missing, None)
            runpy.run_path(str(example.path))
        said = rf"{example.path.name}: .*{missing}.*; install what it needs by: pip install '\.\[{example.extra}\]'"
        assert re.fullmatch(said, str(end.value.code))


def test_the_extra_brings_what_it_needs(example: Example) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.split("[<>=]", requirement)[0] for requirement in extras[example.extra]}
    assert {{"sklearn": "scikit-learn"}.get(name, name.replace("_", "-")) for name in example.needs} - {
        "torch", "numpy"
    } <= packages  # fmt: skip


def test_the_guide_shows_it(example: Example) -> None:
    guide = (ROOT / "docs" / "other_frameworks.md").read_text()
    assert f"examples/{example.name}.py" in guide and f'pip install ".[{example.extra}]"' in guide
