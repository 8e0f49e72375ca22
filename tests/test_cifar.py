"""The centralized script: its network, training, testing, data sources, cache, errors and command line."""

import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import cifar
from tests.conftest import ROOT, Terminals, eventually

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # more are no faster here, and far slower where others use the cores


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache folder of its own, and no network."""
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setattr(cifar, "HOME", tmp_path / "cache" / "cifar10")
    return tmp_path / "cache" / "cifar10"


@pytest.fixture(scope="module")
def some_data() -> cifar.Data:
    return cifar.embedded_data(101, seed=3)  # so that the last batch of 32 has five


def new_net(seed: int = 0) -> cifar.Net:
    torch.manual_seed(seed)
    return cifar.Net()


def same(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models have the same weights, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    return all(mine[name].numpy().tobytes() == theirs[name].numpy().tobytes() for name in mine)


# ----------------------------------------------------------------------------------------------------- the network


def test_net_is_the_one_of_the_blitz() -> None:
    net = cifar.Net()
    assert sum(parameter.numel() for parameter in net.parameters()) == 62_006
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == {
        "conv1.weight": (6, 3, 5, 5), "conv1.bias": (6,), "conv2.weight": (16, 6, 5, 5), "conv2.bias": (16,),
        "fc1.weight": (120, 400), "fc1.bias": (120,), "fc2.weight": (84, 120), "fc2.bias": (84,),
        "fc3.weight": (10, 84), "fc3.bias": (10,),
    }  # fmt: skip
    assert net(torch.zeros(7, 3, 32, 32)).shape == (7, 10)


def test_net_computes_what_the_blitz_computes() -> None:
    net, x = new_net(), torch.randn(3, 3, 32, 32)
    layers = nn.Sequential(
        net.conv1, nn.ReLU(), nn.MaxPool2d(2), net.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3,
    )  # fmt: skip
    torch.testing.assert_close(net(x), layers(x))


def test_images_are_scaled_to_mean_and_deviation_one_half() -> None:
    images = torch.arange(2 * 32 * 32 * 3).remainder(256).to(torch.uint8).view(2, 32, 32, 3)
    images[0, 5, 6] = torch.tensor([0, 51, 255])
    x = cifar.normalise(images)
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.float32
    assert x[0, :, 5, 6].tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)
    assert x.min() == -1 and x.max() == 1
    torch.testing.assert_close(x, (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)


def test_normalising_leaves_the_images_as_they_are() -> None:
    images = torch.full((1, 32, 32, 3), 7, dtype=torch.uint8)
    cifar.normalise(images)
    assert (images == 7).all()


# ---------------------------------------------------------------------------------------------------------- train


def test_same_seed_same_weights(some_data: cifar.Data) -> None:
    nets = [new_net(), new_net(), new_net()]
    losses = [cifar.train(net, some_data, epochs=2, seed=seed) for net, seed in zip(nets, (5, 5, 6), strict=True)]
    assert same(nets[0], nets[1]) and losses[0] == losses[1]
    assert not same(nets[0], nets[2]) and losses[0] != losses[2]


def test_training_does_not_depend_on_the_global_random_state(some_data: cifar.Data) -> None:
    one, other = new_net(), new_net()
    cifar.train(one, some_data, epochs=1, seed=5)
    torch.manual_seed(99)
    cifar.train(other, some_data, epochs=1, seed=5)
    assert same(one, other)


def test_calls_of_one_epoch_add_up_to_a_call_of_several(some_data: cifar.Data) -> None:
    at_once, one_by_one = new_net(), new_net()
    whole = cifar.train(at_once, some_data, epochs=3, seed=7, momentum=0)
    parts = [cifar.train(one_by_one, some_data, epochs=1, seed=7 + epoch, momentum=0) for epoch in range(3)]
    assert same(at_once, one_by_one)
    assert whole == parts[-1]


def test_momentum_is_what_calls_of_one_epoch_lose(some_data: cifar.Data) -> None:
    at_once, one_by_one = new_net(), new_net()
    cifar.train(at_once, some_data, epochs=2, seed=7)
    for epoch in range(2):
        cifar.train(one_by_one, some_data, epochs=1, seed=7 + epoch)
    assert not same(at_once, one_by_one)


def test_training_is_sgd_as_pytorch_documents_it(some_data: cifar.Data) -> None:
    net, expected = new_net(), new_net()
    cifar.train(net, some_data, epochs=1, lr=0.02, batch_size=40, momentum=0.8, weight_decay=0.01, seed=5)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.02, momentum=0.8, weight_decay=0.01)
    images, labels = some_data
    for rows in torch.randperm(101, generator=torch.Generator().manual_seed(5)).split(40):
        optimizer.zero_grad()
        F.cross_entropy(expected(cifar.normalise(images[rows])), labels[rows]).backward()
        optimizer.step()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_trains_in_place_and_learns(some_data: cifar.Data) -> None:
    net = new_net()
    before = cifar.test(net, some_data)
    assert isinstance(cifar.train(net, some_data, epochs=5, lr=0.02), float)
    assert not same(net, new_net())
    assert cifar.test(net, some_data)[0] < before[0]


def test_loss_is_the_mean_over_samples_even_if_the_last_batch_is_smaller(some_data: cifar.Data) -> None:
    images, labels = some_data
    loss = cifar.train(new_net(), some_data, epochs=1, lr=0.0, seed=5)  # so that it is that of one fixed model
    assert loss == pytest.approx(F.cross_entropy(new_net()(cifar.normalise(images)), labels).item(), rel=1e-5)
    batches = torch.randperm(101, generator=torch.Generator().manual_seed(5)).split(32)
    each = [F.cross_entropy(new_net()(cifar.normalise(images[rows])), labels[rows]).item() for rows in batches]
    assert abs(loss - sum(each) / len(each)) > 1e-4, "the mean of the batches' means is another one"


def test_after_each_epoch_its_number_and_loss_are_told(some_data: cifar.Data) -> None:
    told: list[tuple[int, float]] = []
    loss = cifar.train(new_net(), some_data, epochs=3, after_epoch=lambda *facts: told.append(facts))
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert told[-1][1] == loss < told[0][1]


class Recorder(nn.Module):
    """A model that notes which images it is shown: each has its own number in its first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))
        self.seen: list[list[int]] = []
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
        self.modes.add(self.training)
        return self.bias.expand(len(x), -1)


NUMBERED = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 32, 32, 3), torch.arange(200) % 10


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    net = Recorder()
    cifar.train(net, NUMBERED, epochs=2, batch_size=32, seed=5)
    assert [len(batch) for batch in net.seen] == 2 * [32, 32, 32, 32, 32, 32, 8]
    first, second = [*chain(*net.seen[:7])], [*chain(*net.seen[7:])]
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second and list(range(200)) not in (first, second)
    other = Recorder()
    cifar.train(other, NUMBERED, epochs=1, batch_size=32, seed=6)
    assert [*chain(*other.seen)] == second, "epoch 2 of seed 5 is epoch 1 of seed 6"


def test_trains_in_training_mode_even_after_a_test() -> None:
    net = Recorder()
    cifar.train(net, NUMBERED, epochs=2, after_epoch=lambda *_: net.eval() and None)
    assert net.modes == {True}


# ----------------------------------------------------------------------------------------------------------- test


def moody_net() -> nn.Module:
    """Return a model that answers differently in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Dropout(0.5), nn.Linear(3072, 10))


def test_tests_in_evaluation_mode(some_data: cifar.Data) -> None:
    net = moody_net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first, second = cifar.test(net, some_data), cifar.test(net, some_data)
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    logits = net.eval()(cifar.normalise(some_data[0]))
    assert first[0] == pytest.approx(F.cross_entropy(logits, some_data[1]).item(), rel=1e-5)
    assert first[1] == (logits.argmax(1) == some_data[1]).double().mean().item()


def test_tests_every_sample_once_in_order() -> None:
    net = Recorder()
    cifar.test(net, NUMBERED, batch_size=64)
    assert [*chain(*net.seen)] == list(range(200)) and net.modes == {False}


def test_result_does_not_depend_on_the_batch_size(some_data: cifar.Data) -> None:
    results = [cifar.test(new_net(), some_data, batch_size=size) for size in (1, 7, 100, 101, 5000)]
    assert len({accuracy for _, accuracy in results}) == 1
    assert [loss for loss, _ in results] == pytest.approx([results[0][0]] * 5, rel=1e-5)


def test_results_of_parts_weighted_by_samples_are_that_of_the_whole(some_data: cifar.Data) -> None:
    x, y = some_data
    parts = [cifar.test(new_net(), (x[rows], y[rows])) for rows in (slice(0, 70), slice(70, 101))]
    loss, accuracy = np.average(parts, axis=0, weights=[70, 31])
    assert cifar.test(new_net(), some_data) == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy, abs=1e-12))


# --------------------------------------------------------------------------------------------------------- devices


def test_picks_the_fastest_device_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"cuda": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: here["mps"])
    assert cifar.pick_device("auto") == cifar.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"device {name} is not available here; use one of: cpu$"):
            cifar.pick_device(name)
    here["mps"] = True
    assert cifar.pick_device("auto") == torch.device("mps")
    here["cuda"] = True
    assert cifar.pick_device("auto") == torch.device("cuda")
    assert cifar.pick_device("cpu") == torch.device("cpu")


# --------------------------------------------------------------------------------------------------- embedded data


def test_embedded_data_have_the_shape_of_cifar() -> None:
    for (images, labels), samples in zip(cifar.load_data("embedded"), (10_000, 2_000), strict=True):
        assert images.shape == (samples, 32, 32, 3) and images.dtype == torch.uint8
        assert labels.shape == (samples,) and labels.dtype == torch.int64
        counts = labels.bincount()
        assert len(counts) == 10 and counts.min() > samples / 10 * 0.8


def test_embedded_data_are_the_same_every_time() -> None:
    one, other, third = (cifar.embedded_data(50, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not torch.equal(one[0], third[0])


def test_without_data_and_network_the_embedded_set_is_used_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar.find_data() == "embedded"
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "EMBEDDED" in warning and "--data DIR" in warning


@pytest.fixture(scope="module")
def command(module_terminals: Terminals) -> SimpleNamespace:
    """A run of `python cifar.py` with all defaults but the data."""
    status, text = module_terminals.run("cifar.py", "--data", "embedded", **ONE_THREAD)
    return SimpleNamespace(status=status, text=text, folder=module_terminals.folder / "runs" / "centralized")


def test_command_ends_well(command: SimpleNamespace, module_terminals: Terminals) -> None:
    assert command.status == 0, command.text
    assert module_terminals.processes() == []
    assert command.text.splitlines()[0] == "10,000 training and 2,000 test images: embedded; device: cpu"


def test_command_prints_an_aligned_line_per_epoch(command: SimpleNamespace) -> None:
    _, header, *rows, last = command.text.splitlines()
    assert header.split("  ") == ["epoch", "train loss", "test loss", "accuracy", "seconds"]
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3, 4, 5]
    ends = [match.end() for match in re.finditer(r"\S+( \S+)*", header)]
    for row in rows:
        assert [match.end() for match in re.finditer(r"\S+", row)] == ends
    assert last == "saved runs/centralized/model.pt"


def test_command_learns(command: SimpleNamespace) -> None:
    epochs = [[float(cell) for cell in row.split()] for row in command.text.splitlines()[2:-1]]
    _, train_loss, test_loss, accuracy, seconds = zip(*epochs, strict=True)
    assert accuracy[-1] > 0.9 and accuracy[-1] > accuracy[0]
    assert train_loss[-1] < train_loss[0] and test_loss[-1] < test_loss[0]
    assert list(seconds) == sorted(seconds)


def test_command_saves_the_model_that_it_reports(command: SimpleNamespace) -> None:
    assert [path.name for path in command.folder.iterdir()] == ["model.pt"]
    net = cifar.Net()
    net.load_state_dict(torch.load(command.folder / "model.pt", weights_only=True))
    loss, accuracy = cifar.test(net, cifar.embedded_data(2_000, seed=2))
    _, _, test_loss, reported, _ = command.text.splitlines()[-2].split()
    assert reported == f"{accuracy:.4f}"
    assert float(test_loss) == pytest.approx(loss, abs=2e-4)


# ---------------------------------------------------------------------------------------------------- image folders

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


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
    assert cifar.find_data(str(folder)) == str(folder)
    (x_train, y_train), (x_test, y_test) = cifar.load_data(str(folder))
    assert y_train.tolist() == [label for label in range(10) for _ in range(2)] and y_train.dtype == torch.int64
    assert y_test.tolist() == list(range(10))
    assert x_train.shape == (20, 32, 32, 3) and x_train.dtype == x_test.dtype == torch.uint8
    for images, labels, split in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        for image, label in zip(images, labels.tolist(), strict=True):
            assert (image == torch.tensor(colour(split, label))).all(), "other sizes are scaled"


def test_pixels_of_the_right_size_are_taken_as_they_are(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "test" / "cat" / "a.png")
    _, (images, labels) = cifar.load_data(str(folder))
    assert labels.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert np.array_equal(images[3].numpy(), pixels)


def test_a_scaled_image_keeps_its_left_and_its_right(folder: Path) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 64:] = 200
    Image.fromarray(wide).save(folder / "test" / "cat" / "a.png")
    _, (images, _) = cifar.load_data(str(folder))
    assert (images[3, :, :14] == 0).all() and (images[3, :, 18:] == 200).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "rgb", "expected"),
    [
        ("L", "png", (90, 90, 90), (90, 90, 90)),
        ("L", "jpg", (90, 90, 90), (90, 90, 90)),
        ("RGBA", "png", (10, 20, 30), (10, 20, 30)),
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
    _, (images, _) = cifar.load_data(str(folder))
    assert (images[8] == torch.tensor(expected)).all()


def test_a_folder_in_the_usual_place_is_used(folder: Path, home: Path) -> None:
    home.parent.mkdir()
    folder.rename(home)
    assert cifar.find_data() == str(home)
    assert len(cifar.load_data()[0][1]) == 20


def test_a_relative_folder_and_one_below_home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cifar.find_data("my images") == cifar.find_data("~/my images") == str(folder)


# -------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that notes each split that is decoded from now on."""
    splits: list[str] = []
    decode = cifar.decode

    def noted(root: Path, split: str) -> np.ndarray:
        splits.append(split)
        return decode(root, split)

    monkeypatch.setattr(cifar, "decode", noted)
    return splits


def test_a_second_load_reads_decoded_images(folder: Path, home: Path, decoded: list[str]) -> None:
    first, second = cifar.load_data(str(folder)), cifar.load_data(str(folder))
    assert decoded == ["train", "test"]
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    files = sorted((home.parent / "cifar10-decoded").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["test", "train"]
    assert all(file.stat().st_size < 3073 * 20 + 200 for file in files)


def test_what_is_done_to_loaded_images_stays_out_of_the_cache(folder: Path) -> None:
    cifar.load_data(str(folder))
    (images, _), _ = cifar.load_data(str(folder))
    before = images.clone()
    images.zero_()
    (again, _), _ = cifar.load_data(str(folder))
    assert torch.equal(again, before)


def test_an_edited_image_is_decoded_anew(folder: Path, decoded: list[str]) -> None:
    cifar.load_data(str(folder))
    image = folder / "train" / "bird" / "a.png"
    written = image.stat().st_mtime_ns
    save(image, rgb=(9, 9, 9))
    os.utime(image, ns=(written + 1, written + 1))
    (images, _), _ = cifar.load_data(str(folder))
    assert (images[4] == 9).all()
    assert decoded == ["train", "test", "train"]


def test_an_added_and_a_removed_image_are_noticed(folder: Path) -> None:
    cifar.load_data(str(folder))
    save(folder / "test" / "frog" / "new.png")
    _, (images, labels) = cifar.load_data(str(folder))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9] and (images[7] == torch.tensor([1, 2, 3])).all()
    (folder / "test" / "frog" / "c.png").unlink()
    _, (images, labels) = cifar.load_data(str(folder))
    assert labels.tolist() == list(range(10)) and (images[6] == torch.tensor([1, 2, 3])).all()


def test_two_data_sets_do_not_share_a_cache(folder: Path, tmp_path: Path) -> None:
    cifar.load_data(str(folder))
    folder.rename(tmp_path / "first")
    for label, name in enumerate(NAMES):
        save(folder / "train" / name / "a.png", rgb=(label, 0, 0))
        save(folder / "test" / name / "a.png", rgb=(0, label, 0))
    (images, labels), _ = cifar.load_data(str(folder))
    assert labels.tolist() == list(range(10)) and images[:, 0, 0, 0].tolist() == list(range(10))


def test_a_cache_that_cannot_be_written_is_only_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cifar, "HOME", tmp_path / "file" / "cifar10")
    (_, labels), _ = cifar.load_data(str(folder))
    assert len(labels) == 20
    assert "WARNING: decoded images are not kept for the next start" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 3, 50, 128, 1000, -1])
def test_a_truncated_cache_is_decoded_anew(folder: Path, home: Path, decoded: list[str], kept: int) -> None:
    expected = cifar.load_data(str(folder))
    for file in (home.parent / "cifar10-decoded").iterdir():
        file.write_bytes(file.read_bytes()[:kept])
    for one, other in zip(chain(*cifar.load_data(str(folder))), chain(*expected), strict=True):
        assert torch.equal(one, other)
    assert decoded == ["train", "test"] * 2
    cifar.load_data(str(folder))
    assert decoded == ["train", "test"] * 2, "the cache is whole again"


@pytest.mark.parametrize("content", [b"\x00" * 5000, b"no numpy file", pickle.dumps({"a": 1})])
def test_garbage_in_the_cache_is_decoded_anew(folder: Path, home: Path, decoded: list[str], content: bytes) -> None:
    cifar.load_data(str(folder))
    for file in (home.parent / "cifar10-decoded").iterdir():
        file.write_bytes(content)
    assert len(cifar.load_data(str(folder))[0][1]) == 20
    assert decoded == ["train", "test"] * 2


LOAD = """
import hashlib, pathlib, sys, time
import torchvision.datasets, cifar
root, ready, go = map(pathlib.Path, sys.argv[1:])
ready.touch()
while not go.exists():
    time.sleep(0.001)
data = cifar.load_data(str(root))
print(hashlib.sha256(b"".join(part.numpy().tobytes() for split in data for part in split)).hexdigest())
"""


def test_two_processes_that_load_first_at_once_read_the_same(folder: Path, terminals: Terminals) -> None:
    signs = [terminals.folder / f"ready{number}" for number in (1, 2)]
    go = terminals.folder / "go"
    both = [
        terminals.open("-c", LOAD, str(folder), str(sign), str(go), PYTHONPATH=str(ROOT), **ONE_THREAD)
        for sign in signs
    ]
    eventually(lambda: all(sign.exists() for sign in signs), 120)
    go.touch()
    assert [process.wait() for process in both] == [0, 0], both[0].text + both[1].text
    assert both[0].text == both[1].text and len(both[0].text) == 65
    cache = terminals.folder / "home" / "cache" / "cifar10-decoded"
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["test", "train"]


# ---------------------------------------------------------------------------------------------- CIFAR-10 as it comes


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Return a folder with tiny files of the names and the format of CIFAR-10's own."""
    inner = tmp_path / "original" / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        batch = {"data": random.integers(0, 256, (4, 3072), np.uint8), "labels": random.integers(0, 10, 4).tolist()}
        (inner / name).write_bytes(pickle.dumps(batch))
    (inner / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    return inner.parent


def test_damaged_original_files_are_an_error_that_names_their_folder(original: Path) -> None:
    with pytest.raises(ValueError, match=f"no usable data in {re.escape(str(original))}: .*corrupted"):
        cifar.load_data(str(original))


def test_an_unfinished_original_folder_is_an_error(original: Path) -> None:
    (original / "cifar-10-batches-py" / "data_batch_5").unlink()
    with pytest.raises(ValueError, match="no usable data in"):
        cifar.load_data(str(original))


def test_original_files(original: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]) -> None:
    from torchvision.datasets import CIFAR10

    inner = original / "cifar-10-batches-py"  # torchvision knows what the files must be: these ones, for once
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    assert CIFAR10.base_folder == inner.name
    (x_train, y_train), (x_test, y_test) = cifar.load_data(str(original))
    batches = [pickle.loads((inner / f"data_batch_{number}").read_bytes()) for number in range(1, 6)]
    assert y_train.tolist() == [*chain(*(batch["labels"] for batch in batches))]
    expected = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(x_train.numpy(), expected)
    assert len(x_test) == len(y_test) == 4
    cifar.load_data(str(original))
    assert decoded == ["train", "test"]


# ------------------------------------------------------------------------------------------------- errors of the data


def refused(root: Path, *named: str) -> None:
    """Check that a data folder that was named is refused in one line that names it, and not replaced."""
    with pytest.raises(ValueError) as error:
        cifar.load_data(str(root))
    assert all(text in str(error.value) for text in (str(root), *named)), error.value
    assert "\n" not in str(error.value)


def test_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    assert "EMBEDDED" not in capsys.readouterr().err


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no train/ and test/", "cannot be downloaded")
    assert "EMBEDDED" not in capsys.readouterr().err


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file")


def test_no_test_folder(folder: Path) -> None:
    (folder / "test").rename(folder / "elsewhere")
    refused(folder, "no folder test/")


def test_a_train_folder_without_classes(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    (folder / "train").mkdir()
    refused(folder)


def test_a_class_without_images(folder: Path) -> None:
    (folder / "train" / "deer" / "a.png").unlink()
    (folder / "train" / "deer" / "b.png").unlink()
    refused(folder, "deer")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("kept", [0, 30, 0.7])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_truncated_image_is_named(folder: Path, split: str, kept: float, suffix: str) -> None:
    image = folder / split / "dog" / f"broken.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    whole = image.read_bytes()
    image.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    refused(folder, str(image), "damaged")


def test_an_image_with_a_damaged_part_is_named(folder: Path) -> None:
    image = folder / "train" / "dog" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(image)
    content = image.read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    image.write_bytes(content[:second] + b"\x14\x1f\x98." + content[second + 4 :])  # no name that a chunk could have
    refused(folder, str(image), "damaged")


def test_text_that_calls_itself_an_image_is_named(folder: Path) -> None:
    (folder / "train" / "dog" / "a.png").write_text("no image")
    refused(folder, str(folder / "train" / "dog" / "a.png"))


@pytest.mark.parametrize("classes", [1, 9, 11])
def test_a_wrong_number_of_classes(tmp_path: Path, classes: int) -> None:
    for split in ("train", "test"):
        for label in range(classes):
            save(tmp_path / "images" / split / f"class{label:02}" / "a.png")
    refused(tmp_path / "images", f"{classes} classes", "class00", "10 are needed")


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_that_differ_between_train_and_test(folder: Path, split: str) -> None:
    (folder / split / "truck").rename(folder / split / "zebra")
    refused(folder, "same in train/ and test/")


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_that_differ_since_the_images_were_decoded(folder: Path, split: str) -> None:
    cifar.load_data(str(folder))
    (folder / split / "truck").rename(folder / split / "zebra")
    refused(folder, "same in train/ and test/")


# ------------------------------------------------------------------------------------------------- the command's errors


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Return a function that runs the command in this process, which must fail; it returns status and errors."""
    monkeypatch.chdir(tmp_path)

    def cli(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cifar.py", *arguments])
        with pytest.raises(SystemExit) as end:
            cifar.main()
        said = end.value.code + "\n" if isinstance(end.value.code, str) else ""
        return 1 if said else int(end.value.code or 0), capsys.readouterr().err + said

    return cli


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"), ("--epochs", "-1"), ("--epochs", "many"), ("--epochs", "2.5"),
        ("--batch-size", "0"), ("--batch-size", "x"), ("--batch-size", "99999999999999999999"),
        ("--lr", "0"), ("--lr", "-0.1"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "fast"),
        ("--seed", "-1"), ("--seed", "1.5"), ("--seed", "99999999999999999999"), ("--device", "gpu"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(cli: Any, option: str, value: str) -> None:
    status, errors = cli("--data", "embedded", option, value)
    assert status == 2
    assert option in errors.splitlines()[-1] and value in errors.splitlines()[-1]


def test_a_device_that_is_not_there(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, errors = cli("--data", "embedded", "--device", "cuda")
    assert status == 2
    assert errors.splitlines()[-1].startswith("cifar.py: error: device cuda is not available here; use one of:")


def test_missing_data(cli: Any, tmp_path: Path) -> None:
    status, errors = cli("--data", "nowhere")
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"cifar.py: data folder {tmp_path / 'nowhere'} does not exist")


def test_an_output_folder_that_cannot_be_made(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, errors = cli("--data", "embedded", "--out", str(tmp_path / "file" / "run"))
    assert (status, errors.count("\n")) == (1, 1)
    assert str(tmp_path / "file") in errors


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_an_output_folder_that_cannot_be_written_is_refused_before_training(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "train", lambda *_, **__: pytest.fail("it started to train"))
    status, errors = cli("--data", "embedded", "--out", "/proc")
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith("cifar.py: ") and "/proc" in errors


def interrupted(*_: Any, **__: Any) -> float:
    raise KeyboardInterrupt


def test_stopped_before_an_epoch_is_finished_it_promises_no_model(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "train", interrupted)
    status, errors = cli("--data", "embedded")
    assert status != 0 and errors.startswith("cifar.py: stopped")
    assert "last finished epoch" not in errors


def test_stopped_while_training_it_keeps_the_last_finished_epoch(terminals: Terminals) -> None:
    terminal = terminals.open("cifar.py", "--data", "embedded", "--epochs", "1000", "--out", "here", **ONE_THREAD)
    model = terminals.folder / "here" / "model.pt"
    eventually(model.exists, 120)
    terminal.interrupt()
    assert terminal.wait(20) not in (0, -signal.SIGINT)
    *_, row, last = terminal.text.splitlines()
    assert last == "cifar.py: stopped" and "Traceback" not in terminal.text
    assert [path.name for path in model.parent.iterdir()] == ["model.pt"]
    net = cifar.Net()
    net.load_state_dict(torch.load(model, weights_only=True))
    assert f"{cifar.test(net, cifar.embedded_data(2_000, seed=2))[1]:.4f}" == row.split()[3]
    assert terminals.processes() == []


# ---------------------------------------------------------------------------------------------------- the real CIFAR-10

PEAK = """
import re, sys
sys.argv = ["cifar.py", "--epochs", "1", "--data", sys.argv[1]]
import cifar
cifar.main()
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
SECONDS = """
import sys, time
import cifar
started = time.perf_counter()
(x_train, y_train), (x_test, y_test) = cifar.load_data(sys.argv[1])
print("seconds", time.perf_counter() - started, len(x_train), len(y_train), len(x_test), len(y_test))
"""


@pytest.mark.data
def test_memory_and_second_start_on_the_whole_of_cifar10(terminals: Terminals) -> None:
    root = os.environ["CIFAR10_DIR"]
    status, text = terminals.run("-c", PEAK, root, PYTHONPATH=str(ROOT), **ONE_THREAD)
    assert status == 0, text
    assert int(text.split()[-1]) * 1024 < 1.2e9
    status, text = terminals.run("-c", SECONDS, root, PYTHONPATH=str(ROOT))
    assert status == 0, text
    _, seconds, *sizes = text.split()
    assert sizes == ["50000", "50000", "10000", "10000"]
    assert float(seconds) < 1
