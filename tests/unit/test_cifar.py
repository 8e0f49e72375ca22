"""The centralized script: its network, training, testing, original data and command."""

import os
import pickle
import re
import signal
from collections.abc import Iterator
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
import cifar_data
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
    monkeypatch.setattr(cifar_data, "DATA_DIR", tmp_path / "cache" / "cifar10")
    return tmp_path / "cache" / "cifar10"


@pytest.fixture(scope="module")
def some_data() -> cifar.Data:
    return cifar_data.embedded_data(101, seed=3)  # so that the last batch of 32 has five


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


def test_picks_the_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: next(iter(found), None))
    assert cifar.pick_device("auto") == cifar.pick_device("cpu") == torch.device("cpu")
    found.append(torch.device("mps"))
    assert cifar.pick_device("auto") == torch.device("mps")
    assert cifar.pick_device("cpu") == torch.device("cpu")


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def command(module_terminals: Terminals) -> SimpleNamespace:
    """A run of `python cifar.py` with all defaults but the data, and as many epochs as it needs to learn them."""
    status, text = module_terminals.run("cifar.py", "--data", "embedded", "--epochs", "3", **ONE_THREAD)
    return SimpleNamespace(status=status, text=text, folder=module_terminals.folder / "runs" / "centralized")


def test_command_ends_well(command: SimpleNamespace, module_terminals: Terminals) -> None:
    assert command.status == 0, command.text
    assert module_terminals.processes() == []
    assert command.text.splitlines()[0] == "10,000 training and 2,000 test images: embedded; device: cpu"


def test_command_prints_an_aligned_line_per_epoch(command: SimpleNamespace) -> None:
    _, header, *rows, last = command.text.splitlines()
    assert header.split("  ") == ["epoch", "train loss", "test loss", "accuracy", "seconds"]
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3]
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
    loss, accuracy = cifar.test(net, cifar_data.embedded_data(2_000, seed=2))
    _, _, test_loss, reported, _ = command.text.splitlines()[-2].split()
    assert reported == f"{accuracy:.4f}"
    assert float(test_loss) == pytest.approx(loss, abs=2e-4)


def test_command_names_what_it_skips_in_a_folder_of_images(terminals: Terminals) -> None:
    for split in ("train", "test"):
        for number in range(10):
            folder = terminals.folder / "mine" / split / f"class {number}"
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / "a.png")
            (folder / "b.heic").write_bytes(b"of a format that is not read")
        (terminals.folder / "mine" / split / ".ipynb_checkpoints").mkdir()
    status, text = terminals.run("cifar.py", "--data", "mine", "--epochs", "1", **ONE_THREAD)
    warnings, rest = text.splitlines()[:2], text.splitlines()[2:]
    said = "WARNING: skipped 10 files in {}: torchvision cannot read .heic"
    assert status == 0 and warnings == [said.format(terminals.folder / "mine" / split) for split in ("train", "test")]
    assert rest[0] == f"10 training and 10 test images: {terminals.folder / 'mine'}; device: cpu"


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
    (inner / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    return inner.parent


def test_damaged_original_files_are_an_error_that_names_their_folder(original: Path) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(original))}/cifar-10-batches-py is damaged; remove it"):
        cifar.load_data(str(original))


def test_an_unfinished_original_folder_is_an_error(original: Path) -> None:
    (original / "cifar-10-batches-py" / "data_batch_5").unlink()
    with pytest.raises(ValueError, match="is damaged; remove it"):
        cifar.load_data(str(original))


def test_original_files(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(cifar_data, "decode", lambda *_: pytest.fail("they are decoded again"))
    (again, _), _ = cifar.load_data(str(original))
    assert torch.equal(again, x_train)


# ------------------------------------------------------------------------------------------------- the command's errors


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_a_device_that_is_not_there(failed: Any, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    status, errors = failed(cifar.main, "cifar.py", "--data", "embedded", "--device", device)
    assert status == 2
    assert re.search(f"^cifar.py: error: argument --device: .*{device}.* .*cpu", errors.splitlines()[-1])


def test_stopped_while_training_it_keeps_the_last_finished_epoch(terminals: Terminals) -> None:
    options = ("--data", "embedded", "--epochs", "1000", "--batch-size", "500", "--out", "here")
    terminal = terminals.open("cifar.py", *options, **ONE_THREAD)
    model = terminals.folder / "here" / "model.pt"
    eventually(model.exists, 120)
    terminal.interrupt()
    assert terminal.wait(20) not in (0, -signal.SIGINT)
    *_, row, last = terminal.text.splitlines()
    assert last == "cifar.py: stopped" and "Traceback" not in terminal.text
    assert [path.name for path in model.parent.iterdir()] == ["model.pt"]
    net = cifar.Net()
    net.load_state_dict(torch.load(model, weights_only=True))
    assert f"{cifar.test(net, cifar_data.embedded_data(2_000, seed=2))[1]:.4f}" == row.split()[3]
    assert terminals.processes() == []


# ---------------------------------------------------------------------------------------------------- the real CIFAR-10

PEAK = """
import re, sys
sys.argv = ["cifar.py", "--epochs", "1", "--data", sys.argv[1]]
import cifar
import cifar_data
cifar.main()
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
SECONDS = """
import sys, time
import cifar
import cifar_data
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
