"""A saved model predicts by the script's own functions: each sample gets its class, or a line says why it cannot."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from federation.inference import confusion
from federation.inference.images import LINKS
from federation.inference.outputs import outputs, probabilities
from federation.inference.predict import SHOWN, predict
from federation.launch.command_line import run_script
from federation.predict import predict as command
from tests.tasks import TINY

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}  # sorted, they are the channels backwards
TASK = '''
"""The class of an image is its brightest channel. Images are scaled by test(), so the net alone is not enough."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.linear = nn.Linear(3, classes, bias=False)

    def forward(self, x):
        return self.linear(x.mean((1, 2)))

def load_data(root=None):
    return read(Path(root) / "train"), read(Path(root) / "test")

def read(folder):
    classes = sorted(path.name for path in folder.iterdir())
    files = sorted(folder.glob("*/*"))
    try:
        x = np.stack([np.asarray(Image.open(path).convert("RGB").resize((4, 4))) for path in files])
    except OSError as error:
        raise ValueError(f"damaged: {error}")
    return torch.from_numpy(x), torch.tensor([classes.index(path.parent.name) for path in files])

def train(net, data, *, epochs, lr=0.1, batch_size, seed):
    raise NotImplementedError

@torch.no_grad()
def test(net, data):
    logits = torch.cat([net(images.float() / 125) for images in data[0].split(2)])
    return F.cross_entropy(logits, data[1]).item(), (logits.argmax(1) == data[1]).double().mean().item()
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({"linear.weight": torch.eye(3).flip(0)}, tmp_path / "model.pt")
    return tmp_path


def write_task(folder: Path, name: str, old: str = "", new: str = "") -> str:
    assert old in TASK
    (folder / f"{name}.py").write_text(TASK.replace(old, new) if old else TASK)
    return name


def write_image(path: Path, colour: str, brightness: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((6, 5, 3), np.array(COLOURS[colour]) * brightness, np.uint8)
    Image.fromarray(pixels).save(path)


def write_run(folder: Path, task: str, data: Path | str, personal: str = "") -> None:
    """Write the part of metrics.json that is read, beside the model."""
    record = {
        "task": task, "dataset": {"name": str(data)}, "seed": 0, "config": {"personal": personal}, "rounds": [{}, {}],
        "partitions": {"train": [[2, 2, 2]]},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(record))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def classes(out: Path) -> dict[str, str]:
    return {row["file"]: row["class"] for row in table(out)}


def test_labelled_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(folder, "labelled")
    for colour in COLOURS:
        write_image(folder / "images" / colour / "b.png", colour)
        write_image(folder / "images" / colour / "a.png", colour, 0.5)
    write_image(folder / "images" / "blue" / "c.png", "red")
    assert predict(folder / "model.pt", "images", task, [], folder / "out") == 0
    found = table(folder / "out")
    assert [row["file"] for row in found] == [
        "blue/a.png", "blue/b.png", "blue/c.png", "green/a.png", "green/b.png", "red/a.png", "red/b.png",
    ]  # fmt: skip
    assert [row["class"] for row in found] == ["blue", "blue", "red", "green", "green", "red", "red"]
    assert [row["label"] for row in found] == ["blue"] * 3 + ["green"] * 2 + ["red"] * 2
    for row, brightness in zip(found, (0.5, 1, 1, 0.5, 1, 0.5, 1), strict=True):
        power = np.exp(int(250 * brightness) / 125)
        assert float(row["confidence"]) == pytest.approx(power / (power + 2), abs=1e-4)
    printed = capsys.readouterr().out
    assert "accuracy 0.8571 on 7 samples\nmost often confused: blue taken for red, 1 of 3\n" in printed
    assert Image.open(folder / "out" / "confusion.png").size > (300, 300)
    assert {path.name for path in (folder / "out").iterdir()} == {".lock", "predictions.csv", "confusion.png"}
    assert len(list((folder / "images").rglob("*.png"))) == 7, "the images themselves are still there"


def test_only_the_test_part_is_used(folder: Path) -> None:
    task = write_task(folder, "test_part")
    for colour in COLOURS:
        write_image(folder / "data" / "train" / colour / "0.png", "red")
        write_image(folder / "data" / "test" / colour / "1.png", colour)
    predict(folder / "model.pt", "data", task, [], folder / "out")
    assert classes(folder / "out") == {f"{colour}/1.png": colour for colour in COLOURS}


def test_unlabelled_images_have_the_class_names_of_the_run(folder: Path) -> None:
    data = folder / "data"
    write_run(folder, write_task(folder, "unlabelled"), data)
    for number, colour in enumerate([*COLOURS] * 3):
        write_image(data / "train" / colour / "0.png", colour)
        write_image(folder / "flat" / f"{number}.png", colour)
    predict(folder / "model.pt", "flat", "", [], folder / "out")
    assert classes(folder / "out") == {f"{number}.png": colour for number, colour in enumerate([*COLOURS] * 3)}
    assert not (folder / "out" / "confusion.png").exists() and "label" not in table(folder / "out")[0]


@pytest.mark.parametrize(("names", "expected"), [([], "1"), ([*COLOURS], "green")])
def test_one_image_without_a_run(names: list[str], expected: str, folder: Path) -> None:
    write_image(folder / "photo.png", "green")
    predict(folder / "model.pt", "photo.png", write_task(folder, "one_image"), names, folder / "out")
    assert classes(folder / "out") == {"photo.png": expected}


def test_images_of_some_of_the_classes(folder: Path) -> None:
    data = folder / "data"
    write_run(folder, write_task(folder, "some_classes"), data)
    for colour in COLOURS:
        write_image(data / "train" / colour / "0.png", colour)
    for number in range(3):
        write_image(folder / "images" / "red" / f"{number}.png", "red")
    predict(folder / "model.pt", "images", "", [], folder / "out")
    assert classes(folder / "out") == {f"red/{number}.png": "red" for number in range(3)}


def test_a_task_may_number_its_classes_in_another_order(folder: Path) -> None:
    task = write_task(folder, "channels", "sorted(path.name for path in folder.iterdir())", "['red', 'green', 'blue']")
    torch.save({"linear.weight": torch.eye(3)}, folder / "model.pt")
    for number, colour in enumerate(COLOURS):
        write_image(folder / "flat" / f"{number}.png", colour)
    predict(folder / "model.pt", "flat", task, sorted(COLOURS), folder / "out")
    assert classes(folder / "out") == {f"{number}.png": colour for number, colour in enumerate(COLOURS)}


def test_other_data_than_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "vectors.py").write_text(TINY)
    net = torch.nn.Linear(256, 10)
    torch.save(net.state_dict(), folder / "final_model.pt")
    write_run(folder, "vectors", "vectors", "bias")
    assert predict(folder / "final_model.pt", "", "", [], folder / "out") == 0
    import vectors  # type: ignore[import-not-found]

    accuracy = vectors.test(net, vectors.load_data()[1])[1]
    printed = capsys.readouterr().out
    assert f"accuracy {accuracy:.4f} on 28 samples" in printed
    assert "entries that match 'bias' stayed with the clients" in printed
    assert f"and {28 - SHOWN} more" in printed and len(table(folder / "out")) == 28


def damage_model(folder: Path) -> None:
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:300])


def remove_a_class(folder: Path) -> None:
    write_run(folder, "fault_too_few_classes", "gone")
    (folder / "images" / "red" / "0.png").rename(folder / "images" / "green" / "1.png")
    (folder / "images" / "red").rmdir()


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {  # what is done, the options, and what is said
    "no model": (lambda _: None, "--model nowhere.pt", "there is no model nowhere.pt"),
    "damaged model": (damage_model, "", "cannot read the model model.pt: "),
    "another model": (
        lambda folder: torch.save({"linear.weight": torch.eye(4)}, folder / "model.pt"), "",
        "the model model.pt is another one than Net() makes: linear.weight does not match: received",
    ),
    "no run": (lambda folder: (folder / "run").mkdir(), "--model run", "run has no final_model.*; name one file by"),
    "no data": (lambda _: None, "--data gone", "load_data('gone') failed: "),
    "no images": (lambda folder: (folder / "new").mkdir(), "--data new", "new has no images: it is empty"),
    "damaged image": (
        lambda folder: (folder / "images" / "red" / "0.png").write_bytes(b"no image"), "",
        "damaged: cannot identify image file 'images/red/0.png'",
    ),
    "another class": (
        lambda folder: write_image(folder / "images" / "yellow" / "0.png", "red"), "--classes red,green,blue",
        "images has images of yellow, but the model's classes are red, green, blue; see --classes",
    ),
    "too few classes": (
        remove_a_class, "",
        "the model tells 3 classes apart, but 2 are known: blue, green; name all of them by --classes",
    ),
    "images outside": (
        lambda folder: write_image(folder / "images" / "1.png", "red"), "",
        "images has images in folders by class, and others such as 1.png outside of them",
    ),
    "damaged record": (
        lambda folder: (folder / "metrics.json").write_text('{"task": "cifar"}'), "",
        "metrics.json is no record of a run: it lacks 'partitions'; move the model elsewhere and give --task",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_in_a_line(fault: str, folder: Path, failed: Callable[..., tuple[int, str]]) -> None:
    break_it, options, said = FAULTS[fault]
    task = write_task(folder, f"fault_{fault.replace(' ', '_')}")
    for colour in COLOURS:
        write_image(folder / "images" / colour / "0.png", colour)
    break_it(folder)
    usual = "--model", "model.pt", "--data", "images", "--task", task, "--out", "out"
    status, errors = failed(lambda: run_script(command), "predict", *usual, *options.split())
    assert status == 1 and len(errors.splitlines()) == 1, errors
    assert said in errors
    assert not (folder / "out" / LINKS).exists()


FILES = 'sorted(folder.glob("*/*"))'
SCRIPTS = {  # what a script may do that makes its predictions unknown, and what is said of that
    "shuffles": ("data[0].split(2)", "data[0][torch.randperm(len(data[1]))].split(2)", "does not compute its samples"),
    "misses": ("net(images.float() / 125)", "net.linear(images.float().mean((1, 2)))", "called the net itself for 0"),
    "lists": (FILES, 'sorted(folder.glob("*/*"), key=lambda path: path.parent.name)', "does not read images in the"),
    "mixes": (FILES, 'sorted(folder.glob("*/*"), key=lambda path: path.name)', "sorted by path"),
    "leaves_out": (FILES, FILES + "[:-1]", "has not read the 40 images"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_which_the_predictions_are_unknown_is_refused(name: str, folder: Path) -> None:
    old, new, why = SCRIPTS[name]
    task = write_task(folder, f"it_{name}", old, new)
    for number in range(40):
        write_image(folder / "images" / [*COLOURS][number % 3] / f"{number}.png", [*COLOURS][number * 7 % 10 % 3])
    with pytest.raises(ValueError, match=why):
        predict(folder / "model.pt", "images", task, [], folder / "out")
    assert not (folder / "out" / "predictions.csv").exists()


def a_task(call: Callable[[Any, Any], object]) -> Any:
    """Return a task of which test() makes this call of the net."""
    return SimpleNamespace(__name__="regression", test=lambda net, data: (call(net, data[0]), (0.0, {}))[1])


def test_values_that_are_no_scores_of_classes_are_refused() -> None:
    data = torch.ones(5, 3), torch.ones(5)
    with pytest.raises(ValueError, match=r"computes values of shape \(1,\) for a sample"):
        outputs(a_task(lambda net, x: net(x)), torch.nn.Linear(3, 1), data)
    with pytest.raises(ValueError, match=r"computes NaN or Inf of shape \(2,\) for a sample"):
        outputs(a_task(lambda net, x: net(x * torch.inf)), torch.nn.Linear(3, 2, bias=False), data)


def test_a_dictionary_of_arrays_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Net\(\) is a dictionary of arrays"):
        outputs(a_task(lambda net, x: x), {"weights": np.ones(3)}, (np.ones(3), np.ones(3)))


def test_probabilities_are_left_as_they_are() -> None:
    logits = np.array([[0.0, 1.0, 2.0], [900.0, 0.0, -900.0]])
    once = probabilities(logits)
    assert np.allclose(once[0], np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()) and once[1].tolist() == [1, 0, 0]
    assert probabilities(once) is once
    assert np.allclose(probabilities(np.log(once[:1])), once[:1])


def test_the_picture_shows_each_number_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    counts = confusion.confusion(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]
    figure = confusion.Figure
    monkeypatch.setattr(confusion, "Figure", lambda **options: drawn.append(figure(**options)) or drawn[-1])
    confusion.draw(counts, ["a", "b", "c"], "title", tmp_path / "confusion.png")
    axes = drawn[0].axes[0]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "1"), ((1, 0), "1"), ((1, 1), "1"), ((0, 2), "2"),
    }  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.5, 0.5, 0], [0, 1, 0], [1, 0, 0]]
    assert confusion.worst(counts, ["a", "b", "c"]) == "c taken for a, 2 of 2"
    assert confusion.worst(np.eye(2, dtype=np.int64), ["a", "b"]) == ""


def keras_net() -> tuple[Any, Callable[[Any, Any], Any]]:
    """Return a net of that framework with three classes, and what computes its logits as a NumPy array."""
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)  # other weights can have the same accuracy by chance, which the check has to accept
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    return net, lambda net, x: net.predict(x, verbose=0)


def flax_net() -> tuple[Any, Callable[[Any, Any], Any]]:
    nnx = pytest.importorskip("flax.nnx")
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0)), lambda net, x: np.asarray(net(x))


@pytest.mark.slow
@pytest.mark.parametrize("make", [keras_net, flax_net])
def test_other_frameworks_predict_what_their_test_computes_or_nothing(make: Callable[[], Any]) -> None:
    net, compute = make()
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    y = np.arange(100) % 3

    def task(scale: float) -> Any:
        def test(net: Any, data: Any) -> tuple[float, float]:
            found = probabilities(compute(net, scale * data[0]))
            loss = -np.log(found[np.arange(len(data[1])), data[1]]).mean()
            return float(loss), float((found.argmax(1) == data[1]).mean())

        return SimpleNamespace(__name__="my_task", test=test)

    assert np.allclose(outputs(task(1), net, (x, y)), compute(net, x), atol=1e-5)
    with pytest.raises(ValueError, match=r"my_task.test\(\) computes something else than the net does"):
        outputs(task(-3), net, (x, y))
