"""The studies of strategies attack as they say, go on where they stopped, and show what their runs have found."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from PIL import Image

import cifar
import client
import server
from benchmarks import attacks, flipped_cifar, heterogeneity, in_process, small_cifar
from benchmarks.cells import save_cells
from cifar_data import embedded_data
from federation.app.config import parse, validate
from federation.app.strategy import STRATEGIES, arguments, make_strategy
from federation.app.task import load_task
from tests.conftest import ROOT
from tests.in_memory import InMemoryGrid, in_a_run
from tests.tasks import TINY

Weights = dict[str, NDArray[Any]]
PAGE = (ROOT / "docs" / "strategies.md").read_text("utf-8")
ONE_CELL = ["--data", "embedded", "--seeds", "1", "--rounds", "1", "--partition", "IID", "--strategy", "fedavg"]
STUDIES = [(heterogeneity.main, ["--setting", "10 of 10 clients"]), (attacks.main, ["--attack", "scale"])]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_small_task_has_every_fifth_image_and_is_cifar_otherwise() -> None:
    task = load_task("benchmarks.small_cifar")
    assert (task.Net, task.train, task.test) == (cifar.Net, cifar.train, cifar.test)
    for small, whole in zip(task.load_data("embedded"), cifar.load_data("embedded"), strict=True):
        assert all(torch.equal(part, of_all[::5]) for part, of_all in zip(small, whole, strict=True))


@pytest.mark.parametrize("setting", heterogeneity.SETTINGS.values(), ids=heterogeneity.SETTINGS)
def test_every_run_on_different_data_can_start(setting: dict[str, Any]) -> None:
    for strategy, parameters in (*heterogeneity.STRATEGIES.items(), *heterogeneity.SEARCH):
        make_strategy(validate(heterogeneity.COMMON | setting | heterogeneity.given(strategy, parameters, seed=0)), {})


def test_every_attacked_run_can_start_and_bulyan_needs_its_eleventh_client() -> None:
    for strategy, (parameters, clients) in attacks.STRATEGIES.items():
        own = heterogeneity.given(strategy, parameters, seed=0) | {"num-clients": clients}
        make_strategy(validate(attacks.COMMON | own), {})
    with pytest.raises(ValueError, match=r"strategy=bulyan .* needs 11 clients in a round, and there are 10"):
        make_strategy(validate(attacks.COMMON | own | {"num-clients": 10}), {})


@pytest.mark.parametrize(("main", "options"), STUDIES, ids=["heterogeneity", "attacks"])
def test_a_study_shows_what_its_runs_found_and_runs_nothing_twice(
    run_main: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    main: Callable[[], None],
    options: Any,
) -> None:
    out = ["--out", str(tmp_path / "cells.json")]
    first = run_main(main, *ONE_CELL, *options, *out)
    ((_, cell),) = json.loads((tmp_path / "cells.json").read_text()).items()
    assert cell["status"] == "finished" and len(cell["accuracies"]) == 2
    shown = np.mean(cell["accuracies"]) if main is heterogeneity.main else cell["accuracies"][-1]
    table = first[first.index("| |") :]
    assert table.splitlines()[-1] == f"| fedavg | {100 * shown:.1f} |"
    for module in (heterogeneity, attacks):
        monkeypatch.setattr(module, "play", lambda *_: pytest.fail("it was run again"))
    assert run_main(main, *ONE_CELL, *options, *out) == table


# --------------------------------------------------------------------------------------------------------- the attacks


def sent_in_a_round(app: ClientApp, out: Path) -> list[Weights]:
    """Return the model that each of three clients sends, and last the one that they were sent."""
    config = {"task": "tiny_attacked", "num-clients": 3, "out": str(out), "learning-rate": 1.0}
    config |= {"num-server-rounds": 1, "fraction-evaluate": 0.0, "server-evaluation": False}
    sent: dict[int, Weights] = {}

    def note(reply: Message) -> None:
        if "arrays" in reply.content.array_records:
            arrays = reply.content.array_records["arrays"]
            sent[reply.metadata.src_node_id] = {name: array.numpy() for name, array in arrays.items()}

    nodes = {node: {"partition-id": node, "num-partitions": 3} for node in range(3)}
    grid = InMemoryGrid(config, nodes, tamper=note, app=app)
    with in_a_run():
        server.main(grid, Context(1, 0, {}, RecordDict(), config))
    (start, *_) = grid.models("train")
    return [*(sent[node] for node in nodes), {name: array.numpy() for name, array in start.items()}]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Weights]]:
    """Return what is sent without an attack. Beside the tiny task is one that trains on wrong labels."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "tiny_attacked.py").write_text(TINY)
    (folder / "tiny_flipped.py").write_text(flipped := TINY.replace("data[1][rows])", "9 - data[1][rows])"))
    assert flipped != TINY
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(attacks, "FLIPPED", "tiny_flipped")
        yield sent_in_a_round(client.app, folder)


def same(one: Weights, other: Weights) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("attack", attacks.ATTACKS)
def test_two_clients_send_what_the_attack_says(honest: list[Weights], tmp_path: Path, attack: str) -> None:
    *sent, start = sent_in_a_round(attacks.attacked_app(attack), tmp_path)
    assert same(start, honest[3]) and same(sent[2], honest[2]), "the third one is honest"
    for bad in attacks.BAD:
        trained = honest[bad]
        if attack == "none":
            assert same(sent[bad], trained)
        elif attack == "noise":
            noise = np.concatenate([(sent[bad][name] - start[name]).ravel() for name in start])
            assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        elif attack == "labels":
            assert not same(sent[bad], trained) and not same(sent[bad], start)
        else:
            factor = {"sign": -1, "scale": 10}[attack]
            for name, x in start.items():
                assert np.allclose(sent[bad][name], x + factor * (trained[name] - x), atol=1e-5), name
    assert not same(sent[0], sent[1])


def test_wrong_labels_are_all_that_is_wrong() -> None:
    images, labels = embedded_data(64, seed=0)
    nets = []
    for train, given in ((flipped_cifar.train, labels), (small_cifar.train, 9 - labels)):
        torch.manual_seed(0)
        nets.append(cifar.Net())
        train(nets[-1], (images, given), epochs=1, lr=0.1, batch_size=32, seed=5)
    one, other = (net.state_dict() for net in nets)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_failed_run_keeps_the_rounds_that_it_finished() -> None:
    config = {"task": "benchmarks.small_cifar", "data": "embedded", "num-clients": 2, "num-server-rounds": 2}
    config |= {"retries": 0, "learning-rate": 1e6, "fraction-evaluate": 0.0}
    metrics = in_process.play(config)
    assert metrics["status"] == "failed" and 1 <= len(metrics["rounds"]) <= 2


def test_the_attacks_are_drawn(run_main: Callable[..., str], tmp_path: Path) -> None:
    names = [f"{part}, {attack}, {strategy}, {seed}" for part in attacks.PARTITIONS for attack in attacks.ATTACKS
             for strategy in attacks.STRATEGIES for seed in range(2)]  # fmt: skip
    cells = {name: {"accuracies": [0.1, 0.2 + 0.02 * int(name[-1])], "status": "finished"} for name in names}
    save_cells(tmp_path / "cells.json", cells)
    table = run_main(attacks.main, "--seeds", "2", "--out", str(tmp_path / "cells.json"))
    assert table.count("| 21.0 ± 1.4") == len(attacks.PARTITIONS) * len(attacks.ATTACKS) * len(attacks.STRATEGIES)
    with Image.open(tmp_path / "cells.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6) or []}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in attacks.COLOURS} <= colours


# ------------------------------------------------------------------------------------------------------------ the page


def test_all_parameters_are_documented_with_their_defaults_and_limits() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`.*? \| (\S+) \| (\S+) to ([^ ;]+).*\|$", PAGE, re.M)
    found = {(name, key): tuple(map(float, numbers)) for name, key, *numbers in rows}
    declared = {}
    for name, row in STRATEGIES.items():
        given = arguments(validate({"strategy": name, "num-clients": 100}))
        declared |= {(name, key): (given[key], *limits) for key, limits in row.limits.items()}
    assert found == declared and len(rows) == len(found)
    assert re.findall(r"^\| `(\w+)` \| [^`0-9]", PAGE, re.M)[1 : len(STRATEGIES) + 1] == [*STRATEGIES]


def test_the_class_of_the_page_goes_on_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (text,) = re.findall(r"`--run-config \"(strategy='my_strategy.*?)\"`", PAGE)
    (tmp_path / "tiny_own.py").write_text(TINY)
    (tmp_path / "my_strategy.py").write_text(code)
    forgetful = text.replace("my_strategy", "my_forgetful_strategy")
    (tmp_path / "my_forgetful_strategy.py").write_text(code.replace("state =", "other ="))
    monkeypatch.syspath_prepend(tmp_path)

    def ends(settings: str, *rounds: int) -> str:
        """Run up to each of these rounds, in turn, and return the digest of the last model."""
        out = tmp_path / f"{settings[:14]}-{rounds}"
        for number in rounds:
            config = {"task": "tiny_own", "num-server-rounds": number, "out": str(out), "learning-rate": 1.0}
            config |= parse(settings) | {"resume": number != rounds[0], "fraction-evaluate": 0.0}
            grid = InMemoryGrid(config, {1: {"partition-id": 0, "num-partitions": 1}})
            with in_a_run():
                server.main(grid, Context(1, 0, {}, RecordDict(), config))
        return str(json.loads((out / "metrics.json").read_text())["final_weights_sha256"])

    whole = ends(text, 3)
    assert ends(text, 2, 3) == whole != ends(forgetful, 2, 3)
