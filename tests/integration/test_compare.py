"""The comparison: what is read off where, a gap that adds up, and a command that loses nothing."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from federation.app import cores, weights
from federation.app.config import RunConfig, validate
from federation.compare import compare as command
from federation.launch import host
from federation.launch.command_line import run_script
from federation.launch.network import LaunchError
from federation.tools import compare, comparison
from federation.tools.compare import Lab, trainings
from federation.tools.comparison import Cells, Point, summary, tables
from tests.conftest import ROOT, Terminals

QUICK_NAMES = list(trainings("dirichlet"))[:5]


def cells(shift: float = 0.0) -> Cells:
    """Return made-up results: the federated run on IID partitions spent 200 visits, 20 steps and 50 seconds."""
    ends = {
        "centralized": [Point(100, 50, 10, 0.5), Point(200, 100, 20, 0.6 + shift)],
        "centralized, as many steps": [Point(40, 20, 4, 0.3)],
        "centralized, as long": [Point(200, 100, 19, 0.6), Point(500, 250, 49, 0.7), Point(600, 300, 59, 0.72)],
        "federated, IID": [Point(100, 10, 25, 0.3), Point(200, 20, 50, 0.4)],
        "federated, non-IID": [Point(100, 15, 40, 0.25), Point(203, 30, 60, 0.35)],
        "local only, IID": [Point(200, 20, 40, 0.33)],
        "local only, non-IID": [Point(200, 30, 70, 0.2)],
        "optimizer restart": [Point(200, 100, 20, 0.58)],
        "smaller shards": [Point(200, 100, 20, 0.57)],
        "partial participation": [Point(200, 30, 70, 0.34)],
    }
    made: Cells = {name: {"points": points} for name, points in ends.items()}
    for name, alone in (("local only, IID", [0.3, 0.36]), ("local only, non-IID", [0.1, 0.3])):
        made[name]["clients"] = alone
    for name in ("federated, IID", "federated, non-IID", "partial participation"):
        made[name] |= {"bytes_down": 3_000_000, "bytes_up": 2_000_000}
    return made


def test_accuracies_are_read_off_where_the_budget_is_used_up() -> None:
    table = summary([cells()])["table"]
    read = {row: [table[row][axis][0] for axis in ("visits", "steps", "seconds")] for row in table}
    assert read == {
        "centralized": [0.6, 0.3, 0.7],
        "federated, IID": [0.4, 0.4, 0.4],
        "federated, non-IID": [0.35, 0.25, 0.25],  # its largest client makes more steps, and all wait for it
        "local only, IID": [0.33, 0.33, 0.33],
        "local only, non-IID": [0.2, None, None],  # it was never tested within these budgets
    }


def test_the_gap_adds_up() -> None:
    gap = summary([cells(), cells(0.02)])["gap"]
    costs = {
        "optimizer restart": [-2, -4], "smaller shards": [-1, -1], "averaging": [-17, -17], "skew": [-5, -5],
        "partial participation": [-1, -1],
    }  # fmt: skip
    assert {name: points for name, points in gap.items() if name in costs} == {
        name: pytest.approx(points) for name, points in costs.items()
    }
    assert gap["all together"] == pytest.approx([sum(of_seed) for of_seed in zip(*costs.values(), strict=True)])


def test_a_quick_comparison_has_fewer_rows_and_no_gap(tmp_path: Path) -> None:
    made = {name: cell for name, cell in cells().items() if name in QUICK_NAMES}
    results = summary([made])
    assert list(results["table"]) == ["centralized", "local only, non-IID", "federated, IID", "federated, non-IID"]
    read = [results["table"]["centralized"][axis][0] for axis in ("visits", "steps", "seconds")]
    assert read == [0.6, 0.3, None], "no centralized training took as long as the federated one"
    assert results["gap"] == {} and "points of accuracy" not in tables(results)
    comparison.draw(tmp_path / "compare.png", [made], results, "a title", 100)
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_tables_show_mean_and_deviation_over_the_seeds() -> None:
    lines = tables(summary([cells(), cells(0.02)])).splitlines()
    (centralized,) = (line for line in lines if line.startswith("centralized "))
    numbers = "0.6100 ± 0.0141   0.3000 ± 0.0000   0.7000 ± 0.0000        20.0       0.0     0.0"
    assert centralized == f"{'centralized':24}   {numbers}"
    (federated,) = (line for line in lines if line.startswith("federated, IID"))
    assert federated.split()[-3:] == ["50.0", "3.0", "2.0"]
    (alone,) = (line for line in lines if line.startswith("local only, non-IID:"))
    assert alone == "local only, non-IID: 0.2000 ± 0.1155 over clients and seeds, 0.1000 to 0.3000"
    assert f"{'optimizer restart':24}      -3.00 ± 1.41" in lines


def test_one_seed_has_no_deviation() -> None:
    assert "±" not in tables(summary([cells()])).replace("local only, IID: 0.3300 ± 0.0424", "").replace(
        "local only, non-IID: 0.2000 ± 0.1414", ""
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_is_drawn(tmp_path: Path, seeds: int) -> None:
    of_seeds = [cells(0.01 * seed) for seed in range(seeds)]
    comparison.draw(tmp_path / "compare.png", of_seeds, summary(of_seeds), "a title", 100)
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.size == (1800, 576)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "it is not blank"


def test_further_strategies_are_rows_of_the_table_and_lines_of_the_picture(tmp_path: Path) -> None:
    name = "federated, non-IID, fedprox proximal_mu=0.1"
    of_seeds = [cells(shift) | {name: cells()["federated, non-IID"]} for shift in (0.0, 0.1)]
    results = summary(of_seeds)
    assert results["table"][name] == results["table"]["federated, non-IID"]
    lines = tables(results).splitlines()
    (plain,), (own,) = ([line for line in lines if line.startswith(f"{row}  ")] for row in ("federated, non-IID", name))
    assert plain.removeprefix("federated, non-IID").split() == own.removeprefix(name).split() and len(plain) == len(own)
    drawn = []
    for number, seeds in enumerate((of_seeds, [cells(0.0), cells(0.1)])):
        comparison.draw(tmp_path / f"{number}.png", seeds, summary(seeds), "a title", 100)
        drawn.append(np.asarray(Image.open(tmp_path / f"{number}.png").convert("RGB")))
    green = [(picture == (0, 158, 115)).all(axis=2).sum() for picture in drawn]
    assert green[0] > 100 and green[1] == 0


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path, config = tmp_path / "compare.json", validate({})
    assert comparison.load(path, config) == {}
    comparison.save(path, config, {"0": cells()}, summary=summary([cells()]))
    assert comparison.load(path, config) == {"0": cells()}
    assert comparison.load(path, config.changed(seed=5, out="elsewhere")) == {"0": cells()}


@pytest.mark.parametrize("key, value", [("learning-rate", 0.5), ("num-server-rounds", 7), ("alpha", 0.1)])
def test_cells_of_other_settings_are_refused(tmp_path: Path, key: str, value: float) -> None:
    path = tmp_path / "compare.json"
    comparison.save(path, validate({}), {"0": cells()})
    with pytest.raises(ValueError, match=f"compare.json compares with {key}=.*, not {value}; choose another --out"):
        comparison.load(path, validate({key: value}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"config": {}}', '{"config": {}, "cells": {"0": {"a": {"points": 3}}}}']
)
def test_damaged_results_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "compare.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"compare.json is damaged .* remove it, or choose another --out"):
        comparison.load(path, validate({}))


# ------------------------------------------------------------------------------------------------- the trainings


@pytest.fixture(scope="module")
def lab() -> Lab:
    ours = Lab(validate({"data": "embedded", "num-clients": 3, "num-server-rounds": 2, "batch-size": 100}))
    ours.train_data = ours.train_data[0][:900], ours.train_data[1][:900]
    ours.test_data = ours.test_data[0][:100], ours.test_data[1][:100]
    ours.samples = 900
    return ours


@pytest.fixture
def trained(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Note the samples, epochs and seed of every training, instead of training."""
    calls: list[tuple[int, int, int]] = []

    def train(net: Any, data: Any, *, epochs: int, batch_size: int, seed: int, after_epoch: Any = None) -> None:
        calls.append((len(data[1]), epochs, seed))
        for epoch in range(epochs) if after_epoch else ():
            after_epoch(epoch + 1, 0.0)

    monkeypatch.setattr(lab.task, "train", train)
    return calls


def spent(cell: Any) -> list[tuple[int, int]]:
    return [(point.visits, point.steps) for point in cell["points"]]


def test_every_central_training_spends_its_budget(lab: Lab, trained: list[tuple[int, int, int]]) -> None:
    assert spent(compare.centralized(lab, 7, {})) == [(900, 9), (1800, 18)]
    assert spent(compare.as_many_steps(lab, 7, {})) == [(600, 6)]  # two rounds of 300 samples
    assert spent(compare.restarted(lab, 7, {})) == [(900, 9), (1800, 18)]
    assert spent(compare.in_turns(lab, 7, {})) == [(900, 9), (1800, 18)]
    whole, fewer, *rest = trained
    assert (whole, fewer) == ((900, 2, 7), (600, 1, 7))
    assert rest[:2] == [(900, 1, 7), (900, 1, 8)], "as one client counts its epochs"
    assert rest[2:] == [(300, 1, 7 + k * 1_000_003 + epoch) for epoch in (0, 1) for k in (0, 1, 2)]


def test_as_long_means_as_many_epochs_as_fit(lab: Lab, trained: list[tuple[int, int, int]]) -> None:
    done = {
        "centralized": {"points": [Point(0, 0, 10.0, 0)]},  # two epochs
        "federated, IID": {"points": [Point(0, 0, 29.0, 0)]},
    }
    compare.as_long(lab, 7, done)
    assert trained == [(900, 5, 7)]


def test_clients_alone_train_on_their_own_and_are_tested_on_all(lab: Lab, trained: list[tuple[int, int, int]]) -> None:
    cell = compare.local_only("size-skewed")(lab, 7, {})
    assert trained == [(150, 2, 7), (300, 2, 7 + 1_000_003), (450, 2, 7 + 2_000_006)]
    assert spent(cell) == [(1800, 10)]  # the largest makes 5 steps per epoch
    assert cell["points"][0].accuracy == pytest.approx(np.mean(cell["clients"]))
    assert len(cell["clients"]) == 3


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_federated_runs_are_counted_by_what_clients_report(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fraction: float
) -> None:
    played: list[tuple[RunConfig, int]] = []

    def host_run(address: tuple[str, int], config: RunConfig, nodes: dict[str, Any]) -> int:
        played.append((config, nodes["num-supernodes"]))
        numbers = {"seconds": 2.0, "server_accuracy": 0.5, "bytes_down": 10, "bytes_up": 5}
        rounds = [{"round": i, "samples": [250, 101], **numbers} for i in range(config.num_server_rounds + 1)]
        (Path(config.out) / "metrics.json").write_text(json.dumps({"rounds": rounds}))
        return 0

    monkeypatch.setattr(host, "host_run", host_run)
    monkeypatch.setattr(lab, "config", lab.config.changed(out=str(tmp_path)))
    cell = compare.federated("shards", fraction)(lab, 7, {})
    rounds = 2 if fraction == 1 else 4
    assert [(p.visits, p.steps, p.seconds) for p in cell["points"]] == [
        (351 * i, 3 * i, 2.0 * i) for i in range(1, rounds + 1)
    ]
    assert (cell["bytes_down"], cell["bytes_up"]) == (10 * rounds, 5 * rounds)
    ((config, nodes),) = played
    assert (config.partitioner, config.fraction_train, config.seed) == ("shards", fraction, 7)
    assert config.num_clients == 3 and nodes == min(3, cores.cores())


def test_further_strategies_run_on_the_same_partitions(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[RunConfig] = []

    def host_run(address: tuple[str, int], config: RunConfig, nodes: dict[str, Any]) -> int:
        played.append(config)
        return 1

    monkeypatch.setattr(host, "host_run", host_run)
    further = compare.read_strategies(lab.config, "fedprox, fedadam  eta=0.1 tau=0.01,scaffold")
    made = compare.with_strategies("shards", further)
    names = ["fedprox", "fedadam eta=0.1 tau=0.01", "scaffold"]
    assert list(made) == [f"federated, non-IID, {name}" for name in names]
    for training in (*made.values(), compare.federated("shards")):
        with pytest.raises(LaunchError):
            training(lab, 7, {})
    assert [config.strategy for config in played] == ["fedprox", "fedadam", "scaffold", "fedavg"]
    assert [config.strategy_arguments for config in played] == ["", "eta=0.1 tau=0.01", "", ""]
    settings = [{**config.values(), "strategy": "", "strategy-arguments": "", "out": ""} for config in played]
    assert settings == settings[:1] * 4 and settings[0]["partitioner"] == "shards"
    assert len({config.out for config in played}) == 4


def test_a_framework_without_hooks_is_refused_before_any_training(
    lab: Lab, trained: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "Lab", lambda config: lab)
    monkeypatch.setattr(weights, "framework", lambda net: SimpleNamespace(model="model of another framework"))
    config = lab.config.changed(out=str(tmp_path), partitioner="shards")
    further = compare.read_strategies(config, "scaffold")
    with pytest.raises(ValueError, match="strategy=scaffold changes gradients by hooks, which a model of another"):
        compare.run(config, {"centralized": compare.centralized}, range(1), further)
    assert trained == [] and list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "options, named",
    [
        (["--seeds", "0"], "--seeds 0: 1 or more is needed"),
        (["--rounds", "0"], "num-server-rounds=0 is out of range"),
        (["--run-config", "alpha=-1"], "alpha=-1 is out of range"),
        (["--run-config", "nonsense"], "is not of the form key=value"),
        (["--clients", "many"], "'many' is not a valid integer"),
        (["--strategies", "fedprox, fedbest"], "strategy='fedbest' is none of: fedavg, "),
        (["--strategies", "fedprox nu=1"], "fedprox takes no nu; what can be set: proximal_mu"),
        (["--strategies", "krum", "--clients", "4"], "strategy=krum needs 5 clients in a round, and there are 4"),
    ],
)
def test_wrong_options_are_misuse(failed: Any, options: list[str], named: str) -> None:
    status, errors = failed(lambda: run_script(command), "compare.py", *options)
    assert status == 2
    assert named in errors.splitlines()[-1]


@pytest.mark.parametrize(
    "options, named",
    [
        (["--task", "no_such_task"], "task 'no_such_task' cannot be imported"),
        (["--data", "/no/such/folder"], "data folder /no/such/folder does not exist"),
        (["--quick", "--clients", "2001"], "2000 samples cannot be split among 2001 clients"),
        (
            ["--quick", "--run-config", "partitioner='pathological'"],
            "partitioner=pathological cannot split 10000 samples",
        ),
    ],
)
def test_what_cannot_be_compared_fails_in_one_line(failed: Any, options: list[str], named: str) -> None:
    with redirect_stdout(io.StringIO()):
        status, errors = failed(lambda: run_script(command), "compare.py", *options)
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"compare.py: {named}")


@pytest.mark.usefixtures("one_thread")
def test_every_training_has_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []
    for variable in cores.THREADS:
        monkeypatch.setenv(variable, "1")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setattr(compare, "run", lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    cores.share_cores.cache_clear()
    config = validate({"data": "embedded", "out": str(tmp_path)})
    assert compare.compare(config, seeds=1, quick=True) == 0 and seen == [1]
    cores.share_cores.cache_clear()


@pytest.mark.slow
def test_interrupted_it_keeps_what_is_done_and_goes_on(terminals: Terminals, tmp_path: Path) -> None:
    first = terminals.open("-m", "federation.compare", "--quick", PYTHONPATH=str(ROOT))
    first.wait_for("[2/5]")
    first.interrupt()
    assert first.wait() == 130
    assert first.text.splitlines()[-1] == "compare.py: stopped"
    saved = json.loads((tmp_path / "runs" / "compare-quick" / "compare.json").read_text())["cells"]["0"]
    assert list(saved) == QUICK_NAMES[:2]
    assert terminals.processes() == []

    further = ["--strategies", "scaffold"]
    second = terminals.open("-m", "federation.compare", "--quick", *further, PYTHONPATH=str(ROOT))
    assert second.wait(500) == 0, second.text
    output = second.text
    results = json.loads((tmp_path / "runs" / "compare-quick" / "compare.json").read_text())
    assert list(results["cells"]["0"]) == [*QUICK_NAMES, "federated, non-IID, scaffold"]
    table = results["summary"]["table"]
    assert table["federated, non-IID, scaffold"]["visits"] != table["federated, non-IID"]["visits"]
    assert {name: results["cells"]["0"][name] for name in saved} == saved, "they were not run again"
    accuracy = results["summary"]["table"]["federated, IID"]["visits"][0]
    played = json.loads((tmp_path / "runs" / "compare-quick" / "federated-iid-1-0" / "metrics.json").read_text())
    assert accuracy == played["rounds"][-1]["server_accuracy"]
    assert f"federated, IID{'':16}{accuracy:>18.4f}" in output
    assert (tmp_path / "runs" / "compare-quick" / "compare.png").stat().st_size > 10_000

    status, again = terminals.run("-m", "federation.compare", "--quick", *further, PYTHONPATH=str(ROOT))
    assert (status, again) == (0, output), "nothing was left to do"
    assert terminals.processes() == [] and terminals.leftovers() == []
