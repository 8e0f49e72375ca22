"""The example in Keras, as a script of its own: network, training, testing, data sources, cache, errors and command."""

import ast
import hashlib
import os
import pickle
import re
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Callable
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

    def get_file(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    monkeypatch.setattr(cifar_keras, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(cifar_keras, "HOME", tmp_path / "cache" / "cifar10")
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
    """What can stand on the bench in place of a net, and notes what it is shown; its loss of epoch n is n / 10."""

    def __init__(self) -> None:
        self.layers = [layers.Flatten(), layers.Dropout(0.5, seed=99)]
        self.weight = keras.Variable(np.ones(2))
        self.optimizer = keras.optimizers.Adam()
        self.labels: list[list[int]] = []
        self.dropout: list[list[int]] = []
        self.fitted: list[dict[str, Any]] = []
        self.states: list[list[Any]] = []

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
    monkeypatch.setattr(cifar_keras, "bench", lambda: recorder)
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
    """A net that can be computed by hand."""
    dense = layers.Dense(10, activation="softmax")
    net = keras.Sequential([keras.Input((32, 32, 3)), layers.Rescaling(1 / 255), layers.Flatten(), dense])
    net.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return net


def test_training_is_adam_as_keras_documents_it(
    linear: keras.Model, some_data: cifar_keras.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_keras, "bench", lambda: linear)
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
    monkeypatch.setattr(cifar_keras, "bench", lambda: linear)
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


# --------------------------------------------------------------------------------------------------- embedded data


def test_embedded_data_have_the_shape_of_cifar() -> None:
    for (images, labels), samples in zip(cifar_keras.load_data("embedded"), (10_000, 2_000), strict=True):
        assert images.shape == (samples, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (samples,) and labels.dtype == np.int64
        counts = np.bincount(labels)
        assert len(counts) == 10 and counts.min() > samples / 10 * 0.8


def test_embedded_data_are_the_same_every_time() -> None:
    one, other, third = (cifar_keras.embedded_data(50, seed) for seed in (1, 1, 2))
    assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
    assert not np.array_equal(one[0], third[0])


def test_without_data_and_network_the_embedded_set_is_used_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar_keras.find_data() == "embedded"
    said, warning = capsys.readouterr()
    assert said == "" and all(line.startswith("WARNING: ") for line in warning.splitlines())
    assert "EMBEDDED" in warning and "--data DIR" in warning and str(cifar_keras.HOME) in warning


def test_the_embedded_set_that_was_named_is_used_silently(capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar_keras.find_data("embedded") == "embedded"
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------- image folders


def colour(split: str, label: int) -> tuple[int, int, int]:
    return 20 * label, 255 - 20 * label, 7 if split == "train" else 99


def save(
    path: Path, size: tuple[int, int] = (32, 32), rgb: tuple[int, int, int] = (1, 2, 3), mode: str = "RGB"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two training images and one test image per class, each of one colour."""
    root = tmp_path / "my images"
    for label, name in enumerate(NAMES):
        save(root / "train" / name / "a.png", rgb=colour("train", label))
        save(root / "train" / name / "b.png", size=(40, 20), rgb=colour("train", label))
        save(root / "test" / name / "c.png", rgb=colour("test", label))
    return root


def test_image_folder(folder: Path) -> None:
    assert cifar_keras.find_data(str(folder)) == str(folder)
    (x_train, y_train), (x_test, y_test) = cifar_keras.load_data(str(folder))
    assert y_train.tolist() == [label for label in range(10) for _ in range(2)] and y_train.dtype == np.int64
    assert y_test.tolist() == list(range(10))
    assert x_train.shape == (20, 32, 32, 3) and x_train.dtype == x_test.dtype == np.uint8
    for images, labels, split in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        for image, label in zip(images, labels.tolist(), strict=True):
            assert (image == colour(split, label)).all(), "other sizes are scaled"


def test_pixels_of_the_right_size_are_taken_as_they_are(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "test" / "cat" / "a.png")
    _, (images, labels) = cifar_keras.load_data(str(folder))
    assert labels.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert np.array_equal(images[3], pixels)


def test_a_scaled_image_keeps_its_left_and_its_right(folder: Path) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 64:] = 200
    Image.fromarray(wide).save(folder / "test" / "cat" / "a.png")
    _, (images, _) = cifar_keras.load_data(str(folder))
    assert (images[3, :, :14] == 0).all() and (images[3, :, 18:] == 200).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "rgb", "expected"),
    [
        ("L", "png", (90, 90, 90), (90, 90, 90)),
        ("L", "jpg", (90, 90, 90), (90, 90, 90)),
        ("RGBA", "PNG", (10, 20, 30), (10, 20, 30)),
        ("P", "png", (255, 0, 0), (255, 0, 0)),
        ("1", "png", (255, 255, 255), (255, 255, 255)),
        ("CMYK", "jpg", (255, 255, 255), (255, 255, 255)),
    ],
)
def test_other_kinds_of_images_become_rgb(
    folder: Path, mode: str, suffix: str, rgb: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    (folder / "test" / "ship" / "c.png").unlink()
    save(folder / "test" / "ship" / f"c.{suffix}", rgb=rgb, mode=mode)
    _, (images, _) = cifar_keras.load_data(str(folder))
    assert (images[8] == expected).all()


def test_files_that_are_no_images_are_left_alone(folder: Path) -> None:
    (folder / "train" / "notes.txt").write_text("mine")
    (folder / "train" / "cat" / "Thumbs.db").write_text("theirs")
    assert len(cifar_keras.load_data(str(folder))[0][1]) == 20


def test_a_folder_in_the_usual_place_is_used(folder: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.parent.mkdir()
    folder.rename(home)
    assert cifar_keras.find_data() == str(home)
    assert len(cifar_keras.load_data()[0][1]) == 20
    assert "WARNING" not in capsys.readouterr().err


def test_a_relative_folder_and_one_below_home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cifar_keras.find_data("my images") == cifar_keras.find_data("~/my images") == str(folder)


# -------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that notes the split of each image that is decoded from now on."""
    splits: list[str] = []
    decode = cifar_keras.decode
    monkeypatch.setattr(
        cifar_keras, "decode", lambda path: splits.append(path.parent.parent.name) or decode(path)
    )  # fmt: skip
    return splits


def cached(home: Path) -> list[Path]:
    return sorted((home.parent / "cifar10-keras").iterdir())


ALL = ["train"] * 20 + ["test"] * 10


def test_images_are_decoded_once(folder: Path, home: Path, decoded: list[str]) -> None:
    first = cifar_keras.load_data(str(folder))
    assert decoded == ALL
    second = cifar_keras.load_data(str(folder))
    assert decoded == ALL
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert np.array_equal(one, other) and one.dtype == other.dtype
    assert [path.name.split("-")[0] for path in cached(home)] == ["test", "train"], "nothing unfinished is left"
    assert [np.load(path).nbytes for path in cached(home)] == [10 * 3072, 20 * 3072]


@pytest.mark.parametrize(("side", "later"), [(32, 1), (31, 0), (31, 1)], ids=["time", "size", "both"])
def test_an_edited_image_is_decoded_anew_with_its_split(
    folder: Path, decoded: list[str], side: int, later: int
) -> None:
    image = folder / "train" / "bird" / "a.bmp"  # which is as large whatever its colour
    save(image.with_suffix(".png").rename(image))
    cifar_keras.load_data(str(folder))
    before = image.stat()
    save(image, size=(side, side), rgb=(9, 9, 9))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    assert (image.stat().st_size == before.st_size) == (side == 32)
    (images, _), _ = cifar_keras.load_data(str(folder))
    assert (images[4] == 9).all() and (images[5] == colour("train", 2)).all()
    assert decoded == ALL + ["train"] * 20


def test_an_added_and_a_removed_image_are_noticed(folder: Path) -> None:
    cifar_keras.load_data(str(folder))
    save(folder / "test" / "frog" / "new.png")
    _, (images, labels) = cifar_keras.load_data(str(folder))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9] and (images[7] == (1, 2, 3)).all()
    (folder / "test" / "frog" / "c.png").unlink()
    _, (images, labels) = cifar_keras.load_data(str(folder))
    assert labels.tolist() == list(range(10)) and (images[6] == (1, 2, 3)).all()


def test_two_data_sets_do_not_share_a_cache(folder: Path, tmp_path: Path) -> None:
    cifar_keras.load_data(str(folder))
    folder.rename(tmp_path / "first")
    for label, name in enumerate(NAMES):
        save(folder / "train" / name / "a.png", rgb=(label, 0, 0))
        save(folder / "test" / name / "a.png", rgb=(0, label, 0))
    (images, labels), _ = cifar_keras.load_data(str(folder))
    assert labels.tolist() == list(range(10)) and images[:, 0, 0, 0].tolist() == list(range(10))


def test_a_cache_that_cannot_be_written_is_only_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cifar_keras, "CACHE", tmp_path / "file")
    (images, labels), _ = cifar_keras.load_data(str(folder))
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert (images[19] == colour("train", 9)).all()
    assert "WARNING: decoded images are not kept for the next start" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 3, 50, 128, 1000, -1])
def test_a_truncated_cache_is_replaced(folder: Path, home: Path, decoded: list[str], kept: int) -> None:
    expected = cifar_keras.load_data(str(folder))
    whole = [path.read_bytes() for path in cached(home)]
    for file in cached(home):
        file.write_bytes(file.read_bytes()[:kept])
    for one, other in zip(chain(*cifar_keras.load_data(str(folder))), chain(*expected), strict=True):
        assert np.array_equal(one, other)
    assert decoded == ALL * 2
    assert [path.read_bytes() for path in cached(home)] == whole
    cifar_keras.load_data(str(folder))
    assert decoded == ALL * 2, "the cache is whole again"


@pytest.mark.parametrize("content", [b"\x00" * 5000, b"no numpy file", pickle.dumps({"a": 1})])
def test_garbage_in_the_cache_is_replaced(folder: Path, home: Path, decoded: list[str], content: bytes) -> None:
    cifar_keras.load_data(str(folder))
    for file in cached(home):
        file.write_bytes(content)
    (images, _), _ = cifar_keras.load_data(str(folder))
    assert (images[19] == colour("train", 9)).all()
    assert decoded == ALL * 2
    assert all(np.load(file).shape[1:] == (32, 32, 3) for file in cached(home))


# ---------------------------------------------------------------------------------------------- CIFAR-10 as it comes

BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Return a folder with tiny files of the names and the format of CIFAR-10's own."""
    inner = tmp_path / "original" / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in BATCHES:
        batch = {b"data": random.integers(0, 256, (4, 3072), np.uint8), b"labels": random.integers(0, 10, 4).tolist()}
        (inner / name).write_bytes(pickle.dumps(batch))
    (inner / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    return inner.parent


@pytest.fixture
def known(original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the digests that the script knows be those of these files, for once."""
    inner = original / "cifar-10-batches-py"
    digests = {name: hashlib.md5((inner / name).read_bytes()).hexdigest() for name in BATCHES}
    assert [*chain(*cifar_keras.MD5.values())] == BATCHES
    test = {"test_batch": digests.pop("test_batch")}
    monkeypatch.setattr(cifar_keras, "MD5", {"train": digests, "test": test})
    return original


def check_original(data: tuple[cifar_keras.Data, cifar_keras.Data], root: Path) -> None:
    batches = [pickle.loads((root / "cifar-10-batches-py" / name).read_bytes()) for name in BATCHES]
    (x_train, y_train), (x_test, y_test) = data
    assert y_train.tolist() == [*chain(*(batch[b"labels"] for batch in batches[:5]))]
    assert y_test.tolist() == batches[5][b"labels"]
    assert y_train.dtype == y_test.dtype == np.int64
    for images, own in ((x_train, batches[:5]), (x_test, batches[5:])):
        flat = np.concatenate([batch[b"data"] for batch in own])
        assert images.shape == (len(flat), 32, 32, 3) and images.dtype == np.uint8
        for channel in range(3):
            part = flat[:, 1024 * channel : 1024 * (channel + 1)]
            assert np.array_equal(images[..., channel].reshape(-1, 1024), part)


def test_original_files(known: Path) -> None:
    assert cifar_keras.find_data(str(known)) == str(known)
    check_original(cifar_keras.load_data(str(known)), known)


def test_original_files_in_the_usual_place_are_used(known: Path, home: Path) -> None:
    home.parent.mkdir()
    known.rename(home)
    assert cifar_keras.find_data() == str(home)
    check_original(cifar_keras.load_data(), home)


def archive(root: Path) -> Path:
    path = root.with_name("cifar-10.tar.gz")
    with tarfile.open(path, "w:gz") as files:
        files.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    return path


@pytest.mark.parametrize("named", [False, True])
def test_with_a_network_the_original_files_are_downloaded(
    known: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def get_file(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return str(archive(known))

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    (tmp_path / "empty").mkdir()
    root, place = (str(tmp_path / "empty"), tmp_path / "empty") if named else (None, home)
    assert cifar_keras.find_data(root) == str(place)
    check_original(cifar_keras.load_data(root), known)
    [((_, url), options)] = asked
    assert url == cifar_keras.URL and url.startswith("https://")
    assert options == {"file_hash": cifar_keras.SHA256, "cache_dir": home.parent, "cache_subdir": ""}
    assert re.fullmatch("[0-9a-f]{64}", cifar_keras.SHA256)


# --------------------------------------------------------------------------------------------------- errors of the data


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return a function that checks that data are refused in one line that names them, and not replaced."""

    def refused(root: Path | None, *named: str) -> None:
        with pytest.raises(ValueError) as error:
            cifar_keras.load_data(root and str(root))
        assert all(text in str(error.value) for text in (str(root or cifar_keras.HOME), *named)), error.value
        assert len(str(error.value).splitlines()) == 1
        assert "EMBEDDED" not in capsys.readouterr().err

    return refused


class Bomb:
    """An object that shows that it has been unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


def test_original_files_of_another_content_are_not_unpickled(original: Path, refused: Any) -> None:
    inner = original / "cifar-10-batches-py"
    for name in BATCHES:
        (inner / name).write_bytes(pickle.dumps(Bomb()))
    refused(original, f"{inner / 'data_batch_1'} is missing or damaged; remove {inner}, so that it is downloaded anew")


@pytest.mark.parametrize("name", BATCHES)
def test_each_original_file_is_checked(known: Path, refused: Any, name: str) -> None:
    file = known / "cifar-10-batches-py" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(known, f"{file} is missing or damaged; remove {file.parent}")


@pytest.mark.parametrize("name", ["data_batch_5", "test_batch"])
def test_an_original_file_that_is_missing_is_named(known: Path, refused: Any, name: str) -> None:
    file = known / "cifar-10-batches-py" / name
    file.unlink()
    refused(known, f"{file} is missing or damaged; remove {file.parent}")


def test_damaged_files_in_the_usual_place_are_not_replaced_either(original: Path, home: Path, refused: Any) -> None:
    home.parent.mkdir()
    original.rename(home)
    refused(None, "is missing or damaged; remove")


def test_a_missing_folder(tmp_path: Path, refused: Any) -> None:
    refused(tmp_path / "nowhere", "does not exist", "train/<class>/")


def test_an_empty_folder_without_a_network(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no train/ and test/", "cannot be downloaded", "no network")


def test_a_download_that_is_no_archive(
    tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "archive").write_bytes(b"no archive")
    monkeypatch.setattr(keras.utils, "get_file", lambda *_, **__: str(tmp_path / "archive"))
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "cannot be downloaded")
    assert cifar_keras.find_data() == "embedded"
    assert "EMBEDDED" in capsys.readouterr().err


def test_a_file_instead_of_a_folder(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file")


def test_no_test_folder(folder: Path, refused: Any) -> None:
    (folder / "test").rename(folder / "elsewhere")
    refused(folder, str(folder / "test"), "10 are needed")


def test_a_train_folder_without_classes(folder: Path, refused: Any) -> None:
    (folder / "train").rename(folder / "elsewhere")
    (folder / "train").mkdir()
    refused(folder, str(folder / "train"), "10 are needed")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images(folder: Path, refused: Any, split: str) -> None:
    for image in (folder / split / "deer").iterdir():
        image.unlink()
    refused(folder, f"{folder / split} has images of the 9 classes", "10 are needed")


@pytest.mark.parametrize("classes", [1, 9, 11])
def test_a_wrong_number_of_classes(tmp_path: Path, refused: Any, classes: int) -> None:
    for split in ("train", "test"):
        for label in range(classes):
            save(tmp_path / "images" / split / f"class{label:02}" / "a.png")
    refused(tmp_path / "images", f"{classes} classes class00", "10 are needed, the same in train/ and test/")


@pytest.mark.parametrize("decoded_before", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_that_differ_between_train_and_test(
    folder: Path, refused: Any, split: str, decoded_before: bool
) -> None:
    if decoded_before:
        cifar_keras.load_data(str(folder))
    (folder / split / "truck").rename(folder / split / "zebra")
    refused(folder, "the same in train/ and test/")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("kept", [0, 30, 0.7])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_truncated_image_is_named(folder: Path, refused: Any, split: str, kept: float, suffix: str) -> None:
    image = folder / split / "dog" / f"broken.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(image)
    whole = image.read_bytes()
    image.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    refused(folder, f"image {image} is damaged: ")


def test_an_image_with_a_damaged_part_is_named(folder: Path, refused: Any) -> None:
    image = folder / "train" / "dog" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(image)
    content = image.read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    image.write_bytes(content[:second] + b"\x14\x1f\x98." + content[second + 4 :])  # no name that a chunk could have
    refused(folder, f"image {image} is damaged: ")


def test_text_that_calls_itself_an_image_is_named(folder: Path, home: Path, refused: Any) -> None:
    image = folder / "test" / "dog" / "c.png"
    image.write_text("no image")
    refused(folder, f"image {image} is damaged: ")
    assert [path.name.split("-")[0] for path in cached(home)] == ["train"], "what is damaged is not kept"


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


def test_the_script_names_no_import_but_what_it_needs() -> None:
    nodes = [*ast.walk(ast.parse(SCRIPT.read_text()))]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"keras", "numpy", "tqdm"}


def test_without_keras_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(SystemExit, match=r"^cifar_keras.py: .*keras.*; .* pip install '\.\[keras\]'$"):
        runpy.run_path(str(SCRIPT))


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Return a function that runs the command in this process, which must fail; it returns status and errors."""
    monkeypatch.chdir(tmp_path)

    def cli(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cifar_keras.py", *arguments])
        with pytest.raises(SystemExit) as end:
            cifar_keras.main()
        said = end.value.code + "\n" if isinstance(end.value.code, str) else ""
        return 1 if said else int(end.value.code or 0), capsys.readouterr().err + said

    return cli


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"), ("--epochs", "-1"), ("--epochs", "many"), ("--epochs", "2.5"),
        ("--batch-size", "0"), ("--batch-size", "x"), ("--lr", "0"), ("--lr", "-0.1"), ("--lr", "nan"),
        ("--lr", "inf"), ("--lr", "fast"), ("--seed", "-1"), ("--seed", "1.5"), ("--seed", "99999999999999999999"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(cli: Any, monkeypatch: pytest.MonkeyPatch, option: str, value: str) -> None:
    monkeypatch.setattr(cifar_keras, "train", lambda *_, **__: pytest.fail("it started to train"))
    status, errors = cli("--data", "embedded", option, value)
    assert status == 2
    assert errors.splitlines()[-1].startswith("cifar_keras.py: error: ") and option in errors.splitlines()[-1]


def test_an_unknown_option_is_refused(cli: Any) -> None:
    status, errors = cli("--device", "cpu")
    assert status == 2 and "--device" in errors.splitlines()[-1]


def test_missing_data_end_the_command_in_one_line(cli: Any, tmp_path: Path) -> None:
    status, errors = cli("--data", "nowhere")
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"cifar_keras.py: data folder {tmp_path / 'nowhere'} does not exist")


def test_damaged_data_end_the_command_in_one_line(cli: Any, original: Path) -> None:
    status, errors = cli("--data", str(original))
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(
        f"cifar_keras.py: {original / 'cifar-10-batches-py' / 'data_batch_1'} is missing or damaged"
    )


def test_an_output_folder_that_cannot_be_made_ends_the_command_in_one_line(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, errors = cli("--data", "embedded", "--out", str(tmp_path / "file" / "run"))
    assert (status, errors.count("\n")) == (1, 1)
    assert str(tmp_path / "file") in errors


def test_options_are_what_it_trains_with(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[keras.Model, dict[str, Any]]] = []
    monkeypatch.setattr(cifar_keras, "train", lambda net, data, **options: given.append((net, options)))
    options = ["--epochs", "7", "--batch-size", "9", "--lr", "0.5", "--seed", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["cifar_keras.py", "--data", str(known), *options])
    cifar_keras.main()
    [(net, options)] = given
    assert same(net, new_net(3)) and not same(net, new_net(4))
    del options["after_epoch"]
    assert options == {"epochs": 7, "batch_size": 9, "lr": 0.5, "seed": 3}


def test_stopped_before_an_epoch_is_finished_it_promises_no_model(
    cli: Any, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar_keras, "train", interrupted)
    assert cli("--data", str(known)) == (1, "cifar_keras.py: stopped\n")
