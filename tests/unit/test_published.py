"""The reproductions of published figures train and measure as published, and continue where they stopped."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import mcmahan, mcmahan_2nn, mcmahan_cnn, pfl_cifar, pfl_task
from benchmarks.cells import load_cells
from benchmarks.harness import LaunchError
from cifar_data import embedded_data
from federation.app.config import validate
from federation.app.task import load_task

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., str]
NETWORKS = [
    (mcmahan_cnn, (1, 28, 28), 1_663_370),
    (mcmahan_2nn, (1, 28, 28), 199_210),
    (pfl_task, (3, 32, 32), 1_626_442),
]
IDS = ["cnn", "2nn", "pfl"]


def weights(net: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in net.state_dict().values()])


def new_net(module: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = module.Net()
    return net


def some_data(module: Any, samples: int) -> tuple[Tensor, Tensor]:
    if module is pfl_task:
        return embedded_data(samples, seed=3)
    (images, labels), _ = module.load_data("embedded")
    return images[:samples], labels[:samples]


# --------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize(("module", "shape", "parameters"), NETWORKS, ids=IDS)
def test_a_network_is_a_task_of_the_published_size(module: Any, shape: tuple[int, ...], parameters: int) -> None:
    task = load_task(module.__name__)
    net = task.Net()
    assert sum(weight.numel() for weight in net.parameters()) == parameters
    assert net(torch.zeros(4, *shape)).shape == (4, 10)


def test_pooling_before_the_activation_changes_nothing() -> None:
    net = new_net(mcmahan_cnn)
    images = mcmahan_cnn.scaled(some_data(mcmahan_cnn, 20)[0])

    def as_published(x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(net.conv1(x)), 2)
        x = F.max_pool2d(F.relu(net.conv2(x)), 2)
        return net.fc2(F.relu(net.fc1(x.flatten(1))))  # type: ignore[no-any-return]

    found = []
    for forward in (net, as_published):
        net.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        found.append((logits.detach(), *(weight.grad.clone() for weight in net.parameters())))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*found, strict=True))


def test_the_second_convolution_of_pfl_sees_no_padding_and_dropout_ends_with_training() -> None:
    net = new_net(pfl_task)
    images = torch.zeros(2, 3, 32, 32)
    assert net.conv2(net.conv1(images)).shape == (2, 64, 28, 28)
    images.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(net.train()(images), net.train()(images))
    assert torch.equal(net.eval()(images), net.eval()(images))


def test_weights_of_pfl_are_drawn_by_glorot_s_rule() -> None:
    for name, weight in new_net(pfl_task).named_parameters():
        if name.endswith("weight"):
            field = weight[0, 0].numel() if weight.ndim == 4 else 1
            bound = (6 / ((weight.shape[0] + weight.shape[1]) * field)) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound, name


def test_images_of_pfl_are_the_bytes_of_the_colour_planes() -> None:
    planes = torch.randint(256, (5, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = planes.reshape(5, 3, 32, 32).permute(0, 2, 3, 1)  # as cifar_data.py reads them
    assert torch.equal(pfl_task.reordered(images).reshape(5, -1), planes)
    (train, labels), (test, _) = pfl_task.load_data("embedded")
    assert train.shape == (10_000, 32, 32, 3) and len(labels) == 10_000 and len(test) == 2_000


def test_pixels_are_scaled() -> None:
    digits = torch.tensor([[0, 255]], dtype=torch.uint8).repeat(2, 28, 14)
    assert mcmahan_cnn.scaled(digits).shape == (2, 1, 28, 28) and mcmahan_cnn.scaled(digits).unique().tolist() == [0, 1]
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    image[0, 2, 5, 1] = 248
    scaled = pfl_task.scaled(image)
    assert scaled.shape == (1, 3, 32, 32)
    assert scaled[0, 1, 2, 5].item() == pytest.approx((248 - 120.69) / 63.86) and scaled.min() == scaled[0, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("module", [mcmahan_2nn, mcmahan_cnn], ids=["2nn", "cnn"])
def test_training_is_plain_sgd(module: Any) -> None:
    data = some_data(module, 25)  # batches of 10, 10 and 5
    net, by_hand = new_net(module), new_net(module)
    loss, losses = module.train(net, data, epochs=2, lr=0.05, batch_size=10, seed=7), 0.0
    for epoch in range(2):
        losses = 0.0
        for rows in torch.randperm(25, generator=torch.Generator().manual_seed(7 + epoch)).split(10):
            by_hand.zero_grad()
            mean = F.cross_entropy(by_hand(mcmahan_cnn.scaled(data[0][rows])), data[1][rows])
            mean.backward()
            with torch.no_grad():
                for weight in by_hand.parameters():
                    weight -= 0.05 * weight.grad
            losses += mean.item() * len(rows)
    assert torch.allclose(weights(net), weights(by_hand), rtol=1e-3, atol=1e-6)
    assert loss == pytest.approx(losses / 25, rel=1e-4)


def test_training_of_pfl_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    nets = [new_net(pfl_task) for _ in range(3)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        torch.rand(seed)  # whatever was drawn before
        pfl_task.train(net, some_data(pfl_task, 25), epochs=1, seed=seed)
    torch.manual_seed(99)
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = map(weights, nets)
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, weights(new_net(pfl_task)))


@pytest.mark.parametrize(("module", "shape", "_"), NETWORKS, ids=IDS)
def test_the_test_counts_what_is_right(module: Any, shape: tuple[int, ...], _: int) -> None:
    data = some_data(module, 120)
    net = new_net(module)
    loss, accuracy = module.test(net, data)
    net.eval()
    logits = net((pfl_task if module is pfl_task else mcmahan_cnn).scaled(data[0]))
    right = [row.argmax().item() == label.item() for row, label in zip(logits, data[1], strict=True)]
    assert accuracy == pytest.approx(np.mean(right)) and loss == pytest.approx(F.cross_entropy(logits, data[1]).item())


# ------------------------------------------------------------------------------------------------- rounds to a target


@pytest.mark.parametrize(
    ("accuracies", "rounds"),
    [
        ([0.1, 0.9, 0.95, 0.98], 2 + 2 / 3),
        ([0.1, 0.96, 0.90, 0.98], 2.5),  # the curve of the best so far does not fall
        ([0.1, 0.99, 0.2, 0.99], 87 / 89),
        ([0.1, 0.9, 0.97], 2.0),
        ([0.98, 0.1], 0.0),
        ([0.1, 0.9, 0.9699], None),
        ([], None),
    ],
)
def test_rounds_to_the_target(accuracies: list[float], rounds: float | None) -> None:
    assert mcmahan.rounds_to(0.97, accuracies) == (rounds if rounds is None else pytest.approx(rounds))


def test_every_row_can_start() -> None:
    args = argparse.Namespace(data="embedded", seed=0)
    for row in mcmahan.ROWS.values():
        config = validate(row.config(0.1, args))
        assert (config.num_clients, config.clients_asked, config.batch_size) == (100, 10, 10)
        assert load_task(config.task).Net and config.local_epochs == {"2nn": 1, "cnn": 5}[row.network]
        assert config.partitioner == "iid" or (config.partitioner, config.shards_per_client) == ("shards", 2)


def test_the_best_rate_of_the_search_is_continued_to_the_target(
    run_main: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    played: list[tuple[float, int]] = []

    def play(_: Path, config: dict[str, Any], **__: Any) -> dict[str, Any]:
        rate, rounds = config["learning-rate"], config["num-server-rounds"]
        played.append((rate, rounds))
        step = {0.0215: 0.004, 0.0464: 0.008, 0.1: 0.02, 0.215: 0.01, 0.464: 0.0}[rate]
        rows = [{"server_accuracy": 0.1 if number == 0 else 0.2 + step * number} for number in range(rounds + 1)]
        return {"rounds": rows, "status": "failed" if rate == 0.464 else "finished"}

    monkeypatch.setattr(mcmahan, "play_in", play)
    options = ["--data", "mnist.npz", "--row", "2NN, IID", "--out", str(tmp_path / "cells.json")]
    text = run_main(mcmahan.benchmark, *options)
    assert played == [(0.0215, 20), (0.0464, 20), (0.1, 20), (0.215, 20), (0.464, 20), (0.1, 40)]
    assert text.splitlines()[-1].startswith("| 2NN, IID | 97 % | 87 | 38.5 | 0.44 | 0.1 |")
    played.clear()
    assert run_main(mcmahan.benchmark, *options).splitlines()[-1] == text.splitlines()[-1] and not played
    with Image.open(tmp_path / "cells.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6) or []}
    assert tuple(bytes.fromhex(mcmahan.COLOURS["IID"][1:])) in colours


def test_a_row_that_does_not_reach_its_target_says_how_far_it_is() -> None:
    cell = {"accuracies": [0.1, 0.9, 0.96, 0.95], "cpu_seconds": 6.0, "status": "finished"}
    assert mcmahan.result(mcmahan.ROWS["2NN, IID"], cell) == ("> 3 (96.00 %)", "-")


@pytest.mark.slow
def test_a_row_continues_where_it_was_interrupted(run_main: Run, tmp_path: Path) -> None:
    options = ["--data", "embedded", "--row", "2NN, IID", "--rates", "0.1", "--search"]
    for name, rounds in (("whole", "2"), ("parts", "1"), ("parts", "2")):
        run_main(mcmahan.benchmark, *options, rounds, "--rounds", rounds, "--out", str(tmp_path / f"{name}.json"))
    whole, parts = (load_cells(tmp_path / f"{name}.json") for name in ("whole", "parts"))
    (one,), (other,) = whole.values(), parts.values()
    assert one["accuracies"] == other["accuracies"] and len(one["accuracies"]) == 3
    ends = [json.loads(path.read_text())["final_weights_sha256"] for path in sorted(tmp_path.glob("*/*/metrics.json"))]
    assert len(ends) == 2 and ends[0] == ends[1]


# ------------------------------------------------------------------------------------------------- pfl-research


@pytest.mark.slow
def test_our_side_of_pfl_continues_and_tests_its_models(
    run_main: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = embedded_data(400, seed=1), embedded_data(80, seed=2)
    monkeypatch.setattr(pfl_task, "load_data", lambda root=None: data)
    monkeypatch.setattr(pfl_cifar, "CONFIG", pfl_cifar.CONFIG | {"clients-per-round": 3})
    options = ["--data", "embedded", "--users", "20", "--sides", "ours", "--rounds"]
    for name, every, rounds in (("whole", 2, "2"), ("parts", 1, "1"), ("parts", 1, "2")):
        monkeypatch.setattr(pfl_cifar, "EVERY", every)
        table = run_main(pfl_cifar.benchmark, *options, rounds, "--out", str(tmp_path / f"{name}.json"))
    whole, parts = (load_cells(tmp_path / f"{name}.json")["ours"] for name in ("whole", "parts"))
    assert [*whole["accuracies"]] == ["2"] and [*parts["accuracies"]] == ["1", "2"]
    assert whole["accuracies"]["2"] == parts["accuracies"]["2"]
    nets = [pfl_task.Net(), pfl_task.Net()]
    for net, name in zip(nets, ("whole", "parts"), strict=True):
        net.load_state_dict(torch.load(tmp_path / name / "ours" / "final_model.pt"))
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert parts["accuracies"]["2"] == pfl_task.test(nets[1], data[1])[1]
    assert table.splitlines()[-1].startswith(f"| this project | 2 | {100 * parts['accuracies']['2']:.2f} |")


def test_both_curves_are_drawn(tmp_path: Path) -> None:
    cells = {side: {"accuracies": {"10": 0.3, "20": level}} for side, level in (("ours", 0.4), ("theirs", 0.5))}
    pfl_cifar.draw(tmp_path / "curves.png", cells)
    with Image.open(tmp_path / "curves.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6) or []}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in pfl_cifar.COLOURS.values()} <= colours


def test_their_side_of_pfl_shows_the_rounds_that_were_tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"round": number, "server_accuracy": 0.3 if number == 10 else None} for number in range(13)]
    monkeypatch.setattr(pfl_cifar, "run_peer", lambda *_: (rows, 61.0))
    cells: dict[str, Any] = {}
    pfl_cifar.theirs(cells, argparse.Namespace(out=tmp_path / "cells.json"), 12)
    assert cells["theirs"] == {"accuracies": {"10": 0.3}, "rounds": 12, "cpu_seconds": 61.0}
    cells["clock"] = {"theirs": [4.0, 3.0, 5.0]}
    assert (
        pfl_cifar.table(cells).splitlines()[-1] == "| pfl-research | 12 | 30.00 | 30.00 | 5.08 | 4.00 (3.00 to 5.00) |"
    )


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []

    def side(name: str) -> Callable[..., None]:
        return lambda cells, _, until: (turns.append((name, until)), cells.update({name: {"rounds": until}}))[0]

    for name in ("ours", "theirs"):
        monkeypatch.setattr(pfl_cifar, name, side(name))
    pfl_cifar.study({"theirs": {"rounds": 150}}, argparse.Namespace(rounds=250, sides=["ours", "theirs"]))
    assert turns == [("ours", 100), ("ours", 200), ("theirs", 200), ("ours", 250), ("theirs", 250)]


def test_a_python_without_pfl_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('No module named pfl')\n")
    (tmp_path / "python").chmod(0o700)
    args = argparse.Namespace(pfl_python=str(tmp_path / "python"), data="embedded", users=1000)
    with pytest.raises(LaunchError, match=r"^pfl-research: No module named pfl \(all is in .*log.txt\)$"):
        pfl_cifar.run_peer(tmp_path / "theirs", args, 10)
