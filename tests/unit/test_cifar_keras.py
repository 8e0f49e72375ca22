"""The example in Keras, as a script of its own: its network, training, testing, original data and command."""

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import ROOT, Terminals

for needed in ("keras", "tensorflow"):
    pytest.importorskip(needed, reason="needs pip install '.[keras]'")

import keras  # noqa: E402
from keras import layers  # noqa: E402

from examples import cifar_keras  # noqa: E402

SCRIPT = ROOT / "examples" / "cifar_keras.py"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras on TensorFlow
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache folder of its own, and no network."""

    def load_data() -> Any:
        raise OSError("no network")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", load_data)
    monkeypatch.setattr(cifar_keras, "DATA_DIR", tmp_path / "cache" / "cifar10")
    return tmp_path / "cache" / "cifar10"


@pytest.fixture(scope="module")
def some_data() -> cifar_keras.Data:
    return cifar_keras.embedded_data(101, seed=3)  # so that the last batch of 32 has five


@pytest.fixture(scope="module")
def whole_batches(some_data: cifar_keras.Data) -> cifar_keras.Data:
    """Return data that are quicker to train on: each shape of a batch is compiled."""
    return some_data[0][:64], some_data[1][:64]


def new_net(seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return cifar_keras.Net()


def weights_of(net: keras.Model) -> list[NDArray[Any]]:
    return [np.asarray(weight.value) for weight in net.weights]


def same(one: keras.Model, other: keras.Model) -> bool:
    """Tell whether two models have the same weights, bit for bit."""
    pairs = zip(weights_of(one), weights_of(other), strict=True)
    return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)


def loss_of(probabilities: NDArray[Any], labels: NDArray[np.int64]) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels].astype(float)).mean())


def pictures(split: str) -> cifar_keras.Data:
    """Return tiny data: two training images and one test image per class."""
    labels = np.repeat(np.arange(10), 2 if split == "train" else 1)
    noise = np.random.default_rng(len(labels)).integers(0, 50, (len(labels), 32, 32, 3), np.uint8)
    return noise + (20 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained() -> SimpleNamespace:
    """The network, trained in this process as `command` trains it in one of its own."""
    net = new_net(0)
    told: list[tuple[int, float]] = []
    loss = cifar_keras.train(
        net, pictures("train"), epochs=2, lr=0.004, batch_size=10, seed=0, after_epoch=lambda *facts: told.append(facts)
    )
    return SimpleNamespace(net=net, loss=loss, told=told)


# ----------------------------------------------------------------------------------------------------- the network


def test_net_is_the_one_of_the_quickstart() -> None:
    net = new_net()
    assert [tuple(weight.shape) for weight in net.weights] == [
        (3, 3, 3, 32), (32,), (3, 3, 32, 64), (64,), (2304, 10), (10,)
    ]  # fmt: skip
    assert net.input_shape == (None, 32, 32, 3) and net.output_shape == (None, 10)
    [dropout] = [layer for layer in net.layers if isinstance(layer, layers.Dropout)]
    assert dropout.rate == 0.5


def test_net_has_as_many_parameters_as_it_says() -> None:
    assert f"; {new_net().count_params():,} parameters" in str(cifar_keras.Net.__doc__)


def test_net_gives_probabilities_of_bytes(some_data: cifar_keras.Data) -> None:
    net = new_net()
    probabilities = np.asarray(net(some_data[0][:5]))
    assert probabilities.shape == (5, 10)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    x = some_data[0][:5] / np.float32(255)
    for layer in net.layers[1:]:
        x = layer(x)
    np.testing.assert_allclose(probabilities, np.asarray(x), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- train


def dropout_state(net: Any) -> list[int]:
    [state] = [layer.seed_generator.state for layer in net.layers if isinstance(layer, layers.Dropout)]
    return np.asarray(state.value).tolist()


def test_same_seed_same_weights_whatever_the_random_state_was(whole_batches: cifar_keras.Data) -> None:
    nets, losses = [new_net(3) for _ in range(3)], []
    nets[1](whole_batches[0][:2], training=True)  # so that it has dropped something before
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        keras.utils.set_random_seed(len(losses))
        losses.append(cifar_keras.train(net, whole_batches, epochs=2, seed=seed))
    assert same(nets[0], nets[1]) and losses[0] == losses[1]
    assert not same(nets[0], nets[2]) and losses[0] != losses[2]


def test_nets_do_not_know_of_each_other(whole_batches: cifar_keras.Data) -> None:
    one, other = new_net(1), new_net(2)
    before = cifar_keras.test(one, whole_batches)
    cifar_keras.train(other, whole_batches, epochs=1)
    assert same(one, new_net(1)) and not same(other, new_net(2))
    assert cifar_keras.test(one, whole_batches) == before != cifar_keras.test(other, whole_batches)


def test_the_steps_of_all_nets_are_traced_once(
    whole_batches: cifar_keras.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar_keras.train(new_net(), whole_batches, epochs=1)
    cifar_keras.test(new_net(), whole_batches)
    keras.utils.clear_session()
    net = new_net(1)
    monkeypatch.setattr(layers.Dropout, "call", lambda *_, **__: pytest.fail("it is traced again"))
    cifar_keras.train(net, whole_batches, epochs=2, lr=0.1, seed=3)
    cifar_keras.test(net, whole_batches)


class Recorder:
    """What can work in place of a net, and notes what it is shown; its loss of epoch n is n / 10."""

    def __init__(self) -> None:
        self.layers = [layers.Flatten(), layers.Dropout(0.5, seed=99)]
        self.weight = keras.Variable(np.ones(2))
        self.optimizer = keras.optimizers.Adam()
        self.labels: list[list[int]] = []
        self.dropout: list[list[int]] = []
        self.fitted: list[dict[str, Any]] = []
        self.states: list[list[Any]] = []

    def get_layer(self, name: str) -> Any:
        return {"dropout": self.layers[1]}[name]

    def get_weights(self) -> list[NDArray[Any]]:
        return [self.weight.numpy()]

    def set_weights(self, weights: list[NDArray[Any]]) -> None:
        self.weight.assign(*weights)

    def fit(self, images: NDArray[Any], labels: NDArray[Any], **options: Any) -> SimpleNamespace:
        assert images[:, 0, 0, 0].tolist() == labels.tolist()
        self.labels.append(labels.tolist())
        self.dropout.append(dropout_state(self))
        self.fitted.append(options)
        self.states.append([np.asarray(variable.value).tolist() for variable in self.optimizer.variables])
        self.optimizer.apply([keras.ops.ones(2)], [self.weight])
        return SimpleNamespace(history={"loss": [len(self.labels) / 10]})


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(cifar_keras, "worker", lambda: recorder)
    return recorder


NUMBERED = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8), np.arange(200)


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own(recorder: Recorder) -> None:
    cifar_keras.train(Recorder(), NUMBERED, epochs=2, batch_size=32, seed=5)
    first, second = recorder.labels
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second and list(range(200)) not in (first, second)
    assert {(options["batch_size"], options["shuffle"]) for options in recorder.fitted} == {(32, False)}
    cifar_keras.train(Recorder(), NUMBERED, epochs=1, seed=6)
    assert recorder.labels[2] == second, "epoch 2 of seed 5 is epoch 1 of seed 6"


def test_dropout_depends_on_seed_and_epoch_alone(recorder: Recorder) -> None:
    cifar_keras.train(Recorder(), NUMBERED, epochs=3, seed=5)
    cifar_keras.train(Recorder(), NUMBERED, epochs=1, seed=7)
    expected = [np.asarray(keras.random.SeedGenerator(seed).state.value).tolist() for seed in (5, 6, 7, 7)]
    assert recorder.dropout == expected and len({*map(tuple, expected)}) == 3


def test_each_call_has_an_optimizer_as_good_as_new_for_all_its_epochs(recorder: Recorder) -> None:
    for lr in (0.25, 0.5):
        cifar_keras.train(Recorder(), NUMBERED, epochs=2, lr=lr)
    assert recorder.states[0] == [0, 0.25]
    assert recorder.states[2] == [0, 0.5, [0, 0], [0, 0]]
    for lr, state in zip((0.25, 0.5), recorder.states[1::2], strict=True):
        assert state == [1, lr, pytest.approx([0.1, 0.1]), pytest.approx([0.001, 0.001])]


def test_each_epoch_ends_with_the_weights_in_the_net(recorder: Recorder) -> None:
    net = Recorder()
    seen: list[float] = []
    cifar_keras.train(net, NUMBERED, epochs=3, lr=0.1, after_epoch=lambda *_: seen.append(net.weight.numpy()[0]))
    assert seen == pytest.approx([0.9, 0.8, 0.7], abs=1e-4)


def test_after_each_epoch_its_number_and_loss_are_told(trained: SimpleNamespace, recorder: Recorder) -> None:
    told: list[tuple[int, float]] = []
    loss = cifar_keras.train(recorder, NUMBERED, epochs=3, after_epoch=lambda *facts: told.append(facts))
    assert told == [(1, 0.1), (2, 0.2), (3, 0.3)] and loss == 0.3
    assert [epoch for epoch, _ in trained.told] == [1, 2]
    assert isinstance(trained.loss, float) and trained.told[-1][1] == trained.loss < trained.told[0][1]


def test_trains_in_place_and_learns(trained: SimpleNamespace) -> None:
    before = new_net(0)
    assert all((mine != theirs).any() for mine, theirs in zip(weights_of(trained.net), weights_of(before), strict=True))
    images, labels = pictures("train")
    assert loss_of(np.asarray(trained.net(images)), labels) < loss_of(np.asarray(before(images)), labels) - 0.05


@pytest.fixture(scope="module")
def linear() -> keras.Model:
    """A net that can be computed by hand: it has the dropout layer that each needs, which drops nothing."""
    dropout, dense = layers.Dropout(1e-12, name="dropout"), layers.Dense(10, activation="softmax")
    net = keras.Sequential([keras.Input((32, 32, 3)), layers.Rescaling(1 / 255), layers.Flatten(), dropout, dense])
    net.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return net


def test_training_is_adam_as_keras_documents_it(
    linear: keras.Model, some_data: cifar_keras.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_keras, "worker", lambda: linear)
    net = keras.models.clone_model(linear)
    weights = [weight.astype(float) for weight in weights_of(net)]
    loss = cifar_keras.train(net, some_data, epochs=2, lr=0.002, seed=5)
    images, labels = some_data
    moments, squares = ([np.zeros_like(weight) for weight in weights] for _ in range(2))
    step = 0
    for epoch in range(2):
        total = 0.0
        for rows in np.split(np.random.default_rng(5 + epoch).permutation(101), [32, 64, 96]):
            x = images[rows].reshape(len(rows), -1) / 255
            logits = x @ weights[0] + weights[1]
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            total += loss_of(probabilities, labels[rows]) * len(rows)
            error = (probabilities - np.eye(10)[labels[rows]]) / len(rows)
            step += 1
            for i, gradient in enumerate((x.T @ error, error.sum(0))):
                moments[i] = 0.9 * moments[i] + 0.1 * gradient
                squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
                rate = 0.002 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
                weights[i] = weights[i] - rate * moments[i] / (np.sqrt(squares[i]) + 1e-7)
    assert loss == pytest.approx(total / 101, rel=1e-5), "the mean over samples, though the last batch is smaller"
    for weight, expected in zip(weights_of(net), weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)


def test_loss_is_the_mean_over_samples_even_if_the_last_batch_is_smaller(
    linear: keras.Model, some_data: cifar_keras.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_keras, "worker", lambda: linear)
    net = keras.models.clone_model(linear)
    before = weights_of(net)
    loss = cifar_keras.train(net, some_data, epochs=1, lr=0.0, seed=5)  # so that it is that of one fixed model
    assert all(np.array_equal(*pair) for pair in zip(before, weights_of(net), strict=True))
    images, labels = some_data
    assert loss == pytest.approx(loss_of(np.asarray(net(images)), labels), rel=1e-5)
    batches = np.split(np.random.default_rng(5).permutation(101), [32, 64, 96])
    each = [loss_of(np.asarray(net(images[rows])), labels[rows]) for rows in batches]
    assert abs(loss - np.mean(each)) > 1e-4, "the mean of the batches' means is another one"


# ----------------------------------------------------------------------------------------------------------- test


def test_result_is_that_of_the_predictions_whatever_the_batch_size(
    trained: SimpleNamespace, some_data: cifar_keras.Data
) -> None:
    before, dropout = weights_of(trained.net), dropout_state(trained.net)
    results = [cifar_keras.test(trained.net, some_data, batch_size=size) for size in (500, 101, 32)]
    probabilities = trained.net.predict(some_data[0], verbose=0)
    accuracy = (probabilities.argmax(1) == some_data[1]).mean()
    assert [loss for loss, _ in results] == pytest.approx([loss_of(probabilities, some_data[1])] * 3, rel=1e-4)
    assert [accuracy for _, accuracy in results] == pytest.approx([accuracy] * 3, abs=1e-6) and 0 < accuracy < 1
    assert {type(value) for value in chain(*results)} == {float}
    assert all(np.array_equal(*pair) for pair in zip(before, weights_of(trained.net), strict=True))
    assert dropout_state(trained.net) == dropout, "nothing is dropped"


def test_a_saved_model_predicts_as_it_did(trained: SimpleNamespace, tmp_path: Path) -> None:
    trained.net.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert same(loaded, trained.net)
    data = pictures("test")
    np.testing.assert_array_equal(loaded.predict(data[0], verbose=0), trained.net.predict(data[0], verbose=0))
    assert cifar_keras.test(loaded, data) == pytest.approx(cifar_keras.test(trained.net, data), rel=1e-6)


def test_a_saved_model_is_loaded_without_a_warning(
    trained: SimpleNamespace, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trained.net.save(tmp_path / "model.keras")
    recwarn.clear()
    keras.saving.load_model(tmp_path / "model.keras")
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []


# ------------------------------------------------------------------------------------------- CIFAR-10 as Keras has it


def test_cifar10_is_taken_from_keras(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = [pictures("train"), pictures("test")]
    as_keras_has_them = tuple((images, labels.astype(np.uint8)[:, None]) for images, labels in splits)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: as_keras_has_them)
    assert cifar_keras.find_data() == cifar_keras.find_data("keras.datasets.cifar10") == "keras.datasets.cifar10"
    for (images, labels), expected in zip(cifar_keras.load_data(cifar_keras.find_data()), splits, strict=True):
        assert np.array_equal(images, expected[0]) and np.array_equal(labels, expected[1])
        assert labels.dtype == np.int64


def test_damaged_files_of_keras_are_named_in_the_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_data() -> Any:
        raise EOFError("data_batch_1: ran out of\ninput")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", load_data)
    assert cifar_keras.find_data() == "embedded"
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("data_batch_1: ran out of input") and "EMBEDDED" in second


# -------------------------------------------------------------------------------------------------------- the command

MODULES = """
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path("modules.txt").write_text("\\n".join(sys.modules)))
"""


@pytest.fixture(scope="module")
def command(module_terminals: Terminals) -> SimpleNamespace:
    """A run of `python examples/cifar_keras.py` in a process of its own, which notes what modules it has imported."""
    folder = module_terminals.folder
    (folder / "noting").mkdir()
    (folder / "noting" / "sitecustomize.py").write_text(MODULES)
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(*pictures(split), strict=True)):
            path = folder / "tiny" / split / NAMES[label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    options = ["--data", "tiny", "--epochs", "2", "--lr", "0.004", "--batch-size", "10", "--out", "runs/here"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=folder, env=module_terminals.environment | {"PYTHONPATH": str(folder / "noting")},
        capture_output=True, text=True,
    )  # fmt: skip
    return SimpleNamespace(status=done.returncode, text=done.stdout, errors=done.stderr, folder=folder)


def test_command_ends_well(command: SimpleNamespace) -> None:
    assert command.status == 0, command.errors
    first, *_, last = command.text.splitlines()
    assert first == f"20 training and 10 test images: {command.folder / 'tiny'}"
    assert last == "saved runs/here/model.keras"


def test_command_prints_an_aligned_line_per_epoch(command: SimpleNamespace) -> None:
    _, header, *rows, _ = command.text.splitlines()
    assert header.split("  ") == ["epoch", "train loss", "test loss", "accuracy", "seconds"]
    assert [int(row.split()[0]) for row in rows] == [1, 2]
    ends = [match.end() for match in re.finditer(r"\S+( \S+)*", header)]
    for row in rows:
        assert [match.end() for match in re.finditer(r"\S+", row)] == ends


def test_command_saves_the_model_that_it_reports(command: SimpleNamespace, trained: SimpleNamespace) -> None:
    assert [path.name for path in (command.folder / "runs" / "here").iterdir()] == ["model.keras"]
    net = keras.saving.load_model(command.folder / "runs" / "here" / "model.keras")
    loss, accuracy = cifar_keras.test(net, pictures("test"))
    _, _, *rows, _ = command.text.splitlines()
    _, _, test_loss, reported, _ = rows[-1].split()
    assert reported == f"{accuracy:.4f}"
    assert float(test_loss) == pytest.approx(loss, abs=2e-4)
    assert [float(row.split()[1]) for row in rows] == pytest.approx([loss for _, loss in trained.told], abs=2e-4)
    for weight, expected in zip(weights_of(net), weights_of(trained.net), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)


def test_command_imports_no_other_framework_and_nothing_of_this_project(command: SimpleNamespace) -> None:
    imported = {name.split(".")[0] for name in (command.folder / "modules.txt").read_text().splitlines()}
    assert {"keras", "tensorflow"} < imported
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {"federation", "examples", "cifar", "server", "client"} <= ours
    assert imported & (ours | {"flwr", "torch", "torchvision", "flax", "optax"}) == set()
