"""The example in JAX, as a script of its own: its network, training, testing, data sources and command."""

import re
import subprocess
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
from numpy.typing import NDArray
from torch import Tensor

from tests.conftest import ROOT, Terminals

for needed in ("jax", "flax.nnx", "optax", "pooch"):
    pytest.importorskip(needed, reason="needs pip install '.[jax]'")

import jax  # noqa: E402
import pooch  # noqa: E402
from flax import nnx  # noqa: E402

from examples import mnist_jax  # noqa: E402

SCRIPT = ROOT / "examples" / "mnist_jax.py"
Split = tuple[NDArray[Any], NDArray[Any]]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Keep what is compiled in a folder, for the command's own process, too; return the environment that says so."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache folder of its own, and no network."""

    def retrieve(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setattr(mnist_jax, "DATA_DIR", tmp_path / "cache" / "mnist")
    return tmp_path / "cache" / "mnist"


@pytest.fixture(scope="module")
def some_data() -> mnist_jax.Data:
    return mnist_jax.embedded_data(101, seed=3)  # so that the last batch of 32 has five


def weights_of(net: mnist_jax.Net) -> dict[str, NDArray[Any]]:
    return {".".join(path): np.asarray(weight[...]) for path, weight in nnx.to_flat_state(nnx.state(net))}


def same(one: mnist_jax.Net, other: mnist_jax.Net) -> bool:
    """Tell whether two models have the same weights, bit for bit."""
    mine, theirs = weights_of(one), weights_of(other)
    return all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


def plain(weights: dict[str, Tensor], images: NDArray[np.uint8]) -> Tensor:
    """Return the network's logits as PyTorch computes them."""
    x = torch.from_numpy(images)[:, None] / 255
    for name in ("conv1", "conv2"):
        kernel = weights[f"{name}.kernel"].permute(3, 2, 0, 1)
        x = F.relu(F.conv2d(F.pad(x, (1, 2, 1, 2)), kernel, weights[f"{name}.bias"], stride=2))
    x = x.permute(0, 2, 3, 1).flatten(1)
    x = F.relu(x @ weights["dense1.kernel"] + weights["dense1.bias"])
    return x @ weights["dense2.kernel"] + weights["dense2.bias"]


def tensors(net: mnist_jax.Net) -> dict[str, Tensor]:
    return {name: torch.tensor(weight) for name, weight in weights_of(net).items()}


def plain_loss(net: mnist_jax.Net, data: mnist_jax.Data) -> float:
    return F.cross_entropy(plain(tensors(net), data[0]), torch.from_numpy(data[1])).item()


# ----------------------------------------------------------------------------------------------------- the network


def test_net_has_two_convolutions_and_two_dense_layers() -> None:
    assert {name: weight.shape for name, weight in weights_of(mnist_jax.Net()).items()} == {
        "conv1.kernel": (5, 5, 1, 16), "conv1.bias": (16,), "conv2.kernel": (5, 5, 16, 32), "conv2.bias": (32,),
        "dense1.kernel": (1568, 64), "dense1.bias": (64,), "dense2.kernel": (64, 10), "dense2.bias": (10,),
    }  # fmt: skip
    assert {weight.dtype for weight in weights_of(mnist_jax.Net()).values()} == {np.dtype(np.float32)}


def test_net_depends_on_its_seed_alone() -> None:
    assert same(mnist_jax.Net(), mnist_jax.Net(seed=0)) and same(mnist_jax.Net(3), mnist_jax.Net(3))
    assert not same(mnist_jax.Net(3), mnist_jax.Net(4))


def test_net_computes_what_pytorch_computes(some_data: mnist_jax.Data) -> None:
    images = some_data[0][:3]
    logits = np.asarray(mnist_jax.Net(1)(images))
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(logits, plain(tensors(mnist_jax.Net(1)), images), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- train


def test_same_seed_same_weights(some_data: mnist_jax.Data) -> None:
    nets = [mnist_jax.Net() for _ in range(3)]
    losses = []
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        np.random.seed(len(losses))
        losses.append(mnist_jax.train(net, some_data, epochs=2, seed=seed))
    assert same(nets[0], nets[1]) and losses[0] == losses[1]
    assert not same(nets[0], nets[2]) and losses[0] != losses[2]


def test_calls_of_one_epoch_add_up_to_a_call_of_several(some_data: mnist_jax.Data) -> None:
    at_once, one_by_one = mnist_jax.Net(), mnist_jax.Net()
    whole = mnist_jax.train(at_once, some_data, epochs=3, seed=7, momentum=0.0)
    parts = [mnist_jax.train(one_by_one, some_data, epochs=1, seed=7 + epoch, momentum=0.0) for epoch in range(3)]
    assert same(at_once, one_by_one)
    assert whole == parts[-1]


def test_momentum_is_what_calls_of_one_epoch_lose(some_data: mnist_jax.Data) -> None:
    at_once, one_by_one = mnist_jax.Net(), mnist_jax.Net()
    mnist_jax.train(at_once, some_data, epochs=2, seed=7)
    for epoch in range(2):
        mnist_jax.train(one_by_one, some_data, epochs=1, seed=7 + epoch)
    assert not same(at_once, one_by_one)


def test_training_is_sgd_as_pytorch_computes_it(some_data: mnist_jax.Data) -> None:
    net, expected = mnist_jax.Net(), tensors(mnist_jax.Net())
    loss = mnist_jax.train(net, some_data, epochs=2, lr=0.02, momentum=0.8, seed=5)
    optimizer = torch.optim.SGD([weight.requires_grad_() for weight in expected.values()], lr=0.02, momentum=0.8)
    for epoch in range(2):
        total = 0.0
        order = np.random.default_rng(5 + epoch).permutation(101)
        for rows in np.split(order, [32, 64, 96]):
            optimizer.zero_grad()
            batch_loss = F.cross_entropy(plain(expected, some_data[0][rows]), torch.from_numpy(some_data[1][rows]))
            batch_loss.backward()
            optimizer.step()
            total += batch_loss.item() * len(rows)
    for name, weight in weights_of(net).items():
        np.testing.assert_allclose(weight, expected[name].detach(), rtol=1e-3, atol=1e-5)
    assert loss == pytest.approx(total / 101, rel=1e-4)


def test_trains_in_place_and_learns(some_data: mnist_jax.Data) -> None:
    net = mnist_jax.Net()
    before = plain_loss(net, some_data)
    assert isinstance(mnist_jax.train(net, some_data, epochs=5), float)
    assert plain_loss(net, some_data) < before - 0.1


def test_loss_is_the_mean_over_samples_even_if_the_last_batch_is_smaller(some_data: mnist_jax.Data) -> None:
    net = mnist_jax.Net()
    loss = mnist_jax.train(net, some_data, epochs=1, lr=0.0, seed=5)  # so that it is that of one fixed model
    assert same(net, mnist_jax.Net())
    assert loss == pytest.approx(plain_loss(net, some_data), rel=1e-5)
    batches = np.split(np.random.default_rng(5).permutation(101), [32, 64, 96])
    each = [plain_loss(net, (some_data[0][rows], some_data[1][rows])) for rows in batches]
    assert abs(loss - np.mean(each)) > 1e-4, "the mean of the batches' means is another one"


def test_after_each_epoch_its_number_and_loss_are_told(some_data: mnist_jax.Data) -> None:
    net = mnist_jax.Net()
    told: list[tuple[int, float]] = []
    seen: list[bytes] = []

    def after_epoch(epoch: int, loss: float) -> None:
        told.append((epoch, loss))
        seen.append(weights_of(net)["dense2.bias"].tobytes())

    loss = mnist_jax.train(net, some_data, epochs=3, after_epoch=after_epoch)
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert told[-1][1] == loss < told[0][1]
    assert len(set(seen)) == 3 and seen[-1] == weights_of(net)["dense2.bias"].tobytes(), "of the model as it is then"


NUMBERED = np.arange(200, dtype=np.uint8).repeat(28 * 28).reshape(200, 28, 28), np.arange(200) % 10


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that notes the rows of each batch; nothing is computed."""
    batches: list[list[int]] = []

    def note(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        batches.append(images[:, 0, 0].tolist())
        assert [row % 10 for row in batches[-1]] == labels.tolist()

    def train_step(graph: Any, weights: Any, velocity: Any, images: Any, labels: Any, *_: float) -> Any:
        note(images, labels)
        return weights, velocity, 0.0

    def test_step(graph: Any, weights: Any, images: Any, labels: Any) -> tuple[float, float]:
        note(images, labels)
        return 0.5 * len(labels), len(labels) // 4

    monkeypatch.setattr(mnist_jax, "train_step", train_step)
    monkeypatch.setattr(mnist_jax, "test_step", test_step)
    return batches


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own(shown: list[list[int]]) -> None:
    mnist_jax.train(mnist_jax.Net(), NUMBERED, epochs=2, batch_size=32, seed=5)
    assert [len(batch) for batch in shown] == 2 * [32, 32, 32, 32, 32, 32, 8]
    first, second = [*chain(*shown[:7])], [*chain(*shown[7:])]
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second and list(range(200)) not in (first, second)
    shown.clear()
    mnist_jax.train(mnist_jax.Net(), NUMBERED, epochs=1, batch_size=32, seed=6)
    assert [*chain(*shown)] == second, "epoch 2 of seed 5 is epoch 1 of seed 6"


def test_a_batch_may_be_larger_than_the_data(shown: list[list[int]]) -> None:
    mnist_jax.train(mnist_jax.Net(), NUMBERED, epochs=1, batch_size=1000)
    assert [len(batch) for batch in shown] == [200]


def test_tests_every_sample_once_in_order(shown: list[list[int]]) -> None:
    assert mnist_jax.test(mnist_jax.Net(), NUMBERED, batch_size=64) == (0.5, 50 / 200)
    assert [len(batch) for batch in shown] == [64, 64, 64, 8]
    assert [*chain(*shown)] == list(range(200))


def test_a_step_is_compiled_once_per_shape_and_not_per_epoch_or_call(some_data: mnist_jax.Data) -> None:
    mnist_jax.train_step.clear_cache()
    mnist_jax.test_step.clear_cache()
    net = mnist_jax.Net()
    mnist_jax.train(net, some_data, epochs=2)
    mnist_jax.train(net, some_data, epochs=1, lr=0.5, momentum=0.1, seed=9)
    mnist_jax.train(mnist_jax.Net(4), some_data, epochs=1)
    assert mnist_jax.train_step._cache_size() == 2, "batches of 32 and of 5"
    images, labels = some_data
    mnist_jax.train(net, (images[:64], labels[:64]), epochs=1)
    assert mnist_jax.train_step._cache_size() == 2, "however many samples there are"
    for tested in (net, net, mnist_jax.Net(4)):
        mnist_jax.test(tested, some_data)
    assert mnist_jax.test_step._cache_size() == 1


# ----------------------------------------------------------------------------------------------------------- test


def test_result_is_what_pytorch_computes_whatever_the_batch_size(some_data: mnist_jax.Data) -> None:
    net = mnist_jax.Net(2)
    mnist_jax.train(net, some_data, epochs=2)
    before = weights_of(net)
    results = [mnist_jax.test(net, some_data, batch_size=size) for size in (500, 101, 32)]
    accuracy = (plain(tensors(net), some_data[0]).argmax(1) == torch.from_numpy(some_data[1])).double().mean().item()
    assert [loss for loss, _ in results] == pytest.approx([plain_loss(net, some_data)] * 3, rel=1e-5)
    assert [accuracy for _, accuracy in results] == [accuracy] * 3 and 0 < accuracy < 1
    assert {type(value) for value in chain(*results)} == {float}
    assert all(before[name].tobytes() == weight.tobytes() for name, weight in weights_of(net).items())


# ---------------------------------------------------------------------------------------------------------- models


def test_a_saved_model_is_loaded_as_it_was(tmp_path: Path, some_data: mnist_jax.Data) -> None:
    net = mnist_jax.Net(3)
    mnist_jax.save(net, tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as saved:
        assert {name: saved[name].tobytes() for name in saved.files} == {
            name: weight.tobytes() for name, weight in weights_of(net).items()
        }
    for path in (tmp_path / "model.npz", str(tmp_path / "model.npz")):
        assert same(mnist_jax.load(path), net)
    assert mnist_jax.test(mnist_jax.load(path), some_data) == mnist_jax.test(net, some_data)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def fakes() -> dict[str, NDArray[Any]]:
    """Return tiny data of the names and the format of Keras's mnist.npz."""
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (20, 28, 28), np.uint8), "y_train": np.arange(20, dtype=np.uint8) % 10,
        "x_test": random.integers(0, 256, (10, 28, 28), np.uint8), "y_test": np.arange(10, dtype=np.uint8)[::-1],
    }  # fmt: skip


@pytest.fixture
def npz(tmp_path: Path, fakes: dict[str, NDArray[Any]]) -> Path:
    (tmp_path / "my data").mkdir()
    np.savez(tmp_path / "my data" / "mnist.npz", **fakes)
    return tmp_path / "my data" / "mnist.npz"


def check_fakes(data: tuple[Split, Split], fakes: dict[str, NDArray[Any]]) -> None:
    for (images, labels), split in zip(data, ("train", "test"), strict=True):
        assert images.dtype == np.uint8 and np.array_equal(images, fakes[f"x_{split}"])
        assert labels.dtype == np.int64 and np.array_equal(labels, fakes[f"y_{split}"])


def test_a_file_of_arrays(npz: Path, fakes: dict[str, NDArray[Any]]) -> None:
    other = npz.rename(npz.with_name("other.npz"))
    assert mnist_jax.find_data(str(other)) == str(other)
    check_fakes(mnist_jax.load_data(str(other)), fakes)


def test_a_folder_with_a_file_of_arrays(npz: Path, fakes: dict[str, NDArray[Any]]) -> None:
    assert mnist_jax.find_data(str(npz.parent)) == str(npz)
    check_fakes(mnist_jax.load_data(str(npz.parent)), fakes)


def test_files_in_the_usual_place_are_used(
    npz: Path, home: Path, fakes: dict[str, NDArray[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    home.parent.mkdir()
    npz.parent.rename(home)
    assert mnist_jax.find_data() == str(home / "mnist.npz")
    check_fakes(mnist_jax.load_data(), fakes)
    assert capsys.readouterr().err == ""


def test_a_relative_file_and_one_below_home(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mnist_jax.find_data("my data") == mnist_jax.find_data("~/my data/mnist.npz") == str(npz)


def test_with_a_network_the_file_is_downloaded_to_the_usual_place(
    npz: Path, home: Path, fakes: dict[str, NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        Path(path).mkdir(parents=True)
        npz.rename(Path(path) / fname)
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    check_fakes(mnist_jax.load_data(), fakes)
    assert asked == [(mnist_jax.URL, mnist_jax.SHA256)]
    assert mnist_jax.URL.startswith("https://") and re.fullmatch("[0-9a-f]{64}", mnist_jax.SHA256)
    check_fakes(mnist_jax.load_data(), fakes)
    assert len(asked) == 1, "once is enough"
    assert (home / "mnist.npz").is_file()


# --------------------------------------------------------------------------------------------------- errors of the data


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return a function that checks that data are refused in one line that names them, and not replaced."""
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: pytest.fail("it looked for others"))

    def refused(root: Path | None, *named: str) -> None:
        with pytest.raises(ValueError) as error:
            mnist_jax.load_data(root and str(root))
        assert all(text in str(error.value) for text in named), error.value
        assert len(str(error.value).splitlines()) == 1
        assert "EMBEDDED" not in capsys.readouterr().err

    return refused


@pytest.mark.parametrize(
    ("name", "file"), [("nowhere", "nowhere/mnist.npz"), ("nowhere.npz", "nowhere.npz"), (".", "mnist.npz")]
)
def test_missing_files(tmp_path: Path, refused: Any, name: str, file: str) -> None:
    refused(tmp_path / name, f"data file {tmp_path / file} does not exist")


def test_a_file_of_something_else(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file.txt").write_text("no data")
    refused(tmp_path / "file.txt", f"data file {tmp_path / 'file.txt' / 'mnist.npz'} does not exist")


@pytest.mark.parametrize("kept", [0, 3, 30, 0.5, -1])
def test_a_truncated_file_of_arrays(npz: Path, refused: Any, kept: float) -> None:
    whole = npz.read_bytes()
    npz.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    refused(npz, f"{npz} is damaged or not MNIST: ")


def test_a_damaged_file_in_the_usual_place_is_not_replaced_either(npz: Path, home: Path, refused: Any) -> None:
    home.mkdir(parents=True)
    (home / "mnist.npz").write_bytes(npz.read_bytes()[:-100])
    refused(None, f"{home / 'mnist.npz'} is damaged or not MNIST: ")


def test_bytes_that_have_flipped_in_a_file_of_arrays(npz: Path, refused: Any) -> None:
    content = bytearray(npz.read_bytes())
    content[len(content) // 4] ^= 1
    npz.write_bytes(content)
    refused(npz, f"{npz} is damaged or not MNIST: ")


NEEDED = "it needs n images of 28×28 bytes and n labels from 0 to 9"


class Bomb:
    """An object that shows that it has been unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("x", lambda x: x[..., None], NEEDED),
        ("x", lambda x: x[:, :27], NEEDED),
        ("x", lambda x: x.reshape(len(x), 784), NEEDED),
        ("x", lambda x: x[:-1], NEEDED),
        ("x", lambda x: x / np.float32(255), NEEDED),
        ("x", lambda x: x.astype(np.int64), NEEDED),
        ("x", lambda x: np.array([Bomb()] * len(x), object), "allow_pickle=False"),
        ("y", lambda y: y[:-1], NEEDED),
        ("y", lambda y: y + 1, NEEDED),
        ("y", lambda y: y.astype(np.int64) - 1, NEEDED),
        ("y", lambda y: y[:, None], NEEDED),
        ("y", lambda y: np.eye(10, dtype=np.uint8)[y], NEEDED),
        ("y", lambda y: np.array([Bomb()] * len(y), object), "allow_pickle=False"),
        ("y", lambda y: np.uint8(3), NEEDED),
    ],
)
def test_arrays_that_are_no_mnist(
    npz: Path, fakes: dict[str, NDArray[Any]], refused: Any, split: str, part: str, change: Any, said: str
) -> None:
    key = f"{part}_{split}"
    np.savez(npz, **fakes | {key: change(fakes[key])})
    refused(npz, f"{npz} is damaged or not MNIST: ", said)


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_an_array_that_is_missing(npz: Path, fakes: dict[str, NDArray[Any]], refused: Any, key: str) -> None:
    np.savez(npz, **{name: array for name, array in fakes.items() if name != key})
    refused(npz, str(npz), key)


def test_arrays_without_a_sample(npz: Path, fakes: dict[str, NDArray[Any]], refused: Any) -> None:
    np.savez(npz, **fakes | {"x_test": fakes["x_test"][:0], "y_test": fakes["y_test"][:0]})
    refused(npz, f"{npz} is damaged or not MNIST: ")


# -------------------------------------------------------------------------------------------------------- the command

MODULES = """
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path("modules.txt").write_text("\\n".join(sys.modules)))
"""


@pytest.fixture(scope="module")
def command(module_terminals: Terminals, compiled: dict[str, str]) -> SimpleNamespace:
    """A run of `python examples/mnist_jax.py` in a process of its own, which notes what modules it has imported."""
    folder = module_terminals.folder
    (folder / "noting").mkdir()
    (folder / "noting" / "sitecustomize.py").write_text(MODULES)
    (x_train, y_train), (x_test, y_test) = mnist_jax.embedded_data(64, seed=1), mnist_jax.embedded_data(40, seed=2)
    np.savez(folder / "tiny.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--data", "tiny.npz", "--epochs", "1", "--out", "runs/here"],
        cwd=folder, env=module_terminals.environment | compiled | {"PYTHONPATH": str(folder / "noting")},
        capture_output=True, text=True,
    )  # fmt: skip
    return SimpleNamespace(status=done.returncode, text=done.stdout, errors=done.stderr, folder=folder)


def test_command_ends_well(command: SimpleNamespace) -> None:
    assert command.status == 0, command.errors
    first, *_, last = command.text.splitlines()
    assert first.startswith(f"64 training and 40 test images: {command.folder / 'tiny.npz'}; on ")
    assert last == "saved runs/here/model.npz"


def test_command_prints_an_aligned_line_per_epoch(command: SimpleNamespace) -> None:
    _, header, row, _ = command.text.splitlines()
    assert header.split("  ") == ["epoch", "train loss", "test loss", "accuracy", "seconds"]
    ends = [match.end() for match in re.finditer(r"\S+( \S+)*", header)]
    assert [match.end() for match in re.finditer(r"\S+", row)] == ends
    assert row.split()[0] == "1"


def test_command_saves_the_model_that_it_reports(command: SimpleNamespace) -> None:
    assert [path.name for path in (command.folder / "runs" / "here").iterdir()] == ["model.npz"]
    net = mnist_jax.load(command.folder / "runs" / "here" / "model.npz")
    loss, accuracy = mnist_jax.test(net, mnist_jax.embedded_data(40, seed=2))
    _, train_loss, test_loss, reported, _ = command.text.splitlines()[2].split()
    assert reported == f"{accuracy:.4f}"
    assert float(test_loss) == pytest.approx(loss, abs=2e-4)
    expected = mnist_jax.Net(0)
    assert float(train_loss) == pytest.approx(
        mnist_jax.train(expected, mnist_jax.embedded_data(64, seed=1), epochs=1, seed=0), abs=2e-4
    )
    for name, weight in weights_of(net).items():
        np.testing.assert_allclose(weight, weights_of(expected)[name], rtol=1e-4, atol=1e-6)


def test_command_imports_no_other_framework_and_nothing_of_this_project(command: SimpleNamespace) -> None:
    imported = {name.split(".")[0] for name in (command.folder / "modules.txt").read_text().splitlines()}
    assert {"jax", "flax", "optax"} < imported
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {"federation", "examples", "cifar", "server", "client"} <= ours
    assert imported & (ours | {"flwr", "torch", "torchvision", "keras", "tensorflow"}) == set()
