"""benchmarks/niid_task.py is a task as cifar.py is, and trains as the published benchmark does."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar
from benchmarks import niid_bench, niid_task
from cifar_data import embedded_data
from federation.app.config import choices
from federation.app.strategy import STRATEGIES
from federation.app.task import load_task


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(samples: int) -> Tensor:
    return torch.randint(256, (samples, 32, 32, 3), dtype=torch.uint8, generator=generator(0))


def new_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cifar.Net()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in net.state_dict().values()])


@pytest.fixture
def some_data() -> cifar.Data:
    return embedded_data(70, seed=3)  # a batch of 64, and one of 6


# ------------------------------------------------------------------------------------------------------ augmentation


def crops(images: Tensor) -> Iterator[Tensor]:
    """Yield the 81 crops of images that reflect four pixels at each edge, and their mirror images."""
    padded = F.pad(images.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1).byte()
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 32, left : left + 32]
            yield crop
            yield crop.flip(2)


def test_every_image_is_one_of_its_crops() -> None:
    images = noise(150)
    augmented = niid_task.augmented(images, generator(1))
    assert augmented.shape == images.shape and augmented.dtype == torch.uint8
    matches = torch.stack([(crop == augmented).flatten(1).all(1) for crop in crops(images)])
    assert matches.shape == (162, 150)
    assert (matches.sum(0) == 1).all(), "by its own shift, and of its own pixels"
    assert torch.equal(images, noise(150)), "the data set itself stays as it is"


def test_all_shifts_and_flips_are_equally_frequent() -> None:
    across = torch.arange(32, dtype=torch.uint8)
    image = torch.stack([across[:, None].expand(32, 32), across.expand(32, 32), torch.zeros(32, 32).byte()], dim=2)
    augmented = niid_task.augmented(image.expand(16_200, 32, 32, 3), generator(2)).int()
    (row, column, _), (_, neighbour, _) = augmented[:, 16, 16].T, augmented[:, 16, 17].T
    flipped = column > neighbour
    top, left = row - 16, column - torch.where(flipped, 15, 16)
    assert set(top.tolist()) == set(left.tolist()) == set(range(-4, 5))
    counts = torch.bincount((top + 4) * 18 + (left + 4) * 2 + flipped, minlength=162)
    assert counts.min() > 40 and counts.max() < 160  # 100 each, and six standard deviations


def test_augmentation_is_seeded() -> None:
    images = noise(20)
    one, same, other = (niid_task.augmented(images, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    random = generator(5)
    assert not torch.equal(niid_task.augmented(images, random), niid_task.augmented(images, random))


def test_pixels_are_scaled_to_0_and_1() -> None:
    images = noise(3)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    scaled = niid_task.scaled(images)
    assert scaled.shape == (3, 3, 32, 32) and scaled.dtype == torch.float32
    assert scaled.min() == 0 and scaled.max() == 1
    assert torch.equal((scaled * 255).round().byte(), images.permute(0, 3, 1, 2))


# --------------------------------------------------------------------------------------------------- train and test


def test_training_moves_all_weights_by_the_seed(some_data: cifar.Data) -> None:
    nets = [new_net() for _ in range(3)]
    losses = [niid_task.train(net, some_data, epochs=2, seed=s) for net, s in zip(nets, (5, 5, 6), strict=True)]
    one, same, other = map(weights, nets)
    assert torch.equal(one, same) and losses[0] == losses[1]
    assert not torch.equal(one, other) and losses[0] != losses[2]
    before = new_net().state_dict()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in nets[0].state_dict().items())


def test_training_does_not_depend_on_the_global_random_state(some_data: cifar.Data) -> None:
    one, other = new_net(), new_net()
    niid_task.train(one, some_data, epochs=1, seed=5)
    torch.rand(7)
    state = torch.get_rng_state()
    niid_task.train(other, some_data, epochs=1, seed=5)
    assert torch.equal(weights(one), weights(other)) and torch.equal(torch.get_rng_state(), state)


def test_calls_of_one_epoch_continue_one_another(some_data: cifar.Data) -> None:
    """Without momentum, which is the optimizer's and ends with a call, they are one call of as many epochs."""
    at_once, one_by_one = new_net(), new_net()
    whole = niid_task.train(at_once, some_data, epochs=3, seed=7, momentum=0)
    parts = [niid_task.train(one_by_one, some_data, epochs=1, seed=7 + epoch, momentum=0) for epoch in range(3)]
    assert torch.equal(weights(at_once), weights(one_by_one))
    assert whole == parts[-1] and len(set(parts)) == 3


def test_training_is_the_plain_loop_with_the_published_settings(
    some_data: cifar.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(niid_task, "augmented", lambda images, random: images)
    net, plain = new_net(), new_net()
    loss = niid_task.train(net, some_data, epochs=2, seed=5)
    images, labels = some_data
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
    for epoch in range(2):
        losses = []
        for rows in torch.randperm(70, generator=generator(5 + epoch)).split(64):
            each = F.cross_entropy(plain(images[rows].permute(0, 3, 1, 2) / 255), labels[rows], reduction="none")
            optimizer.zero_grad()
            each.mean().backward()
            optimizer.step()
            losses += each.tolist()
    assert loss == pytest.approx(sum(losses) / 70, rel=1e-5)
    assert torch.allclose(weights(net), weights(plain), rtol=1e-4, atol=1e-6)


def test_training_sees_every_image_augmented_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = embedded_data(50, seed=3), []
    original = niid_task.augmented
    monkeypatch.setattr(niid_task, "augmented", lambda *given: seen.append(original(*given)) or seen[-1])
    niid_task.train(new_net(), data, epochs=2, batch_size=20, seed=5)
    assert [len(images) for images in seen] == [50] * 2
    for epoch, images in enumerate(seen):
        sources = data[0][torch.randperm(50, generator=generator(5 + epoch))]
        match = torch.stack([(crop == images).flatten(1).all(1) for crop in crops(sources)])
        assert (match.sum(0) == 1).all(), "each image once, in the order of the seed"
        assert match.any(1).sum() > 25, "many shifts, and not one for all"


@pytest.mark.parametrize("samples", [1, 499, 500, 1203])
def test_testing_is_the_plain_evaluation(samples: int) -> None:
    net, (images, labels) = new_net().train(), embedded_data(samples, seed=2)
    loss, accuracy = niid_task.test(net, (images, labels))
    with torch.no_grad():
        logits = net(images.permute(0, 3, 1, 2) / 255)
    assert loss == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item() / samples, rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).sum().item() / samples, rel=1e-6)
    assert type(loss) is type(accuracy) is float and not net.training


def test_testing_leaves_the_weights_alone() -> None:
    net = new_net()
    assert niid_task.test(net, embedded_data(50, seed=2)) == niid_task.test(net, embedded_data(50, seed=2))
    assert torch.equal(weights(net), weights(new_net()))


# -------------------------------------------------------------------------------------------------- as a task, a table


def test_it_is_a_task_with_the_network_and_the_data_of_cifar() -> None:
    task = load_task("benchmarks.niid_task")
    assert task.Net is cifar.Net and task.load_data is cifar.load_data and task.find_data is cifar.find_data
    assert task.train is niid_task.train is not cifar.train
    assert task.test is niid_task.test is not cifar.test


def test_the_table_has_the_best_round_of_each_run_that_has_begun(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, seed=3, partitioner="dirichlet", strategy=None)
    assert niid_bench.chosen(args) == [("dirichlet", name) for name in ("fedavg", "fedprox", "scaffold")]
    out = niid_bench.folder("dirichlet", "scaffold", args)
    assert out == tmp_path / "dirichlet-scaffold-3"
    out.mkdir()
    accuracies = [0.1, 0.55556, 0.7, 0.7, 0.65]
    rounds = [{"round": number, "server_accuracy": accuracy} for number, accuracy in enumerate(accuracies)]
    (out / "metrics.json").write_text(json.dumps({"rounds": rounds}))
    assert niid_bench.table(args).splitlines()[2:] == ["| dirichlet | scaffold | 4 | 70.00 | 2 | 68.08 |"]


@pytest.mark.parametrize("case", niid_bench.RUNS)
def test_each_run_is_of_this_project(case: tuple[str, str]) -> None:
    partitioner, strategy = case
    assert partitioner in choices("partitioner") and strategy in STRATEGIES
