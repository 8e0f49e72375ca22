"""A federation across terminals: a server and its clients as processes, to the end."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cifar
from federation.launch.network import free_port
from tests.conftest import Terminals, eventually


@pytest.fixture(scope="module")
def run(module_terminals: Terminals) -> SimpleNamespace:
    """One client waits for the server, the server for a second client; two rounds; all end by themselves."""
    address = f"127.0.0.1:{free_port()}"
    early = module_terminals.open("client.py", "--server", address)
    early.wait_for("waiting for a server")
    server = module_terminals.open("server.py", "--address", address, "--rounds", "2")
    server.wait_for("client 0 joined")
    late = module_terminals.open("client.py", "--server", address)
    statuses = server.wait(), early.wait(30), late.wait(30)
    folder = module_terminals.folder / "runs" / "federated"
    metrics = json.loads((folder / "metrics.json").read_text())
    return SimpleNamespace(
        statuses=statuses, server=server.text, early=early.text, late=late.text, folder=folder, metrics=metrics
    )


def test_everything_ends_by_itself(run: SimpleNamespace, module_terminals: Terminals) -> None:
    assert run.statuses == (0, 0, 0), run.server + run.early + run.late
    assert "the run has finished" in run.early and "the run has finished" in run.late
    assert module_terminals.processes() == []
    assert module_terminals.leftovers() == []


def test_server_shows_who_joins_and_a_line_per_round(run: SimpleNamespace) -> None:
    assert "waiting for 2 clients" in run.server
    assert re.search(r"client 0 joined from \S+/0: 5,000 samples of 10,000", run.server)
    assert re.search(r"client 1 joined from \S+/1: 5,000 samples of 10,000", run.server)
    header = next(line for line in run.server.splitlines() if line.startswith("round"))
    rows = [line for line in run.server.splitlines() if re.match(r" +\d+  ", line)]
    assert [int(row.split()[0]) for row in rows] == [0, 1, 2]
    assert {len(row) for row in rows} == {len(header)}


def test_no_warning_of_deprecation_and_no_traceback(run: SimpleNamespace) -> None:
    for text in (run.server, run.early, run.late):
        assert "deprecat" not in text.lower() and "Traceback" not in text


def test_no_data_and_no_network_is_said_loudly(run: SimpleNamespace) -> None:
    assert "EMBEDDED" in run.server
    assert run.metrics["dataset"] == {"name": "embedded", "train": 10_000, "test": 2_000}


def test_metrics(run: SimpleNamespace) -> None:
    assert run.metrics["task"] == "cifar" and run.metrics["seed"] == 0 and run.metrics["status"] == "finished"
    assert run.metrics["config"]["num-server-rounds"] == 2
    assert set(run.metrics["versions"]) >= {"python", "flwr", "torch"}
    assert [row["round"] for row in run.metrics["rounds"]] == [0, 1, 2]
    for row in run.metrics["rounds"][1:]:
        assert row["clients"] == 2 and row["dropped"] == 0
        assert 0 < row["client_seconds"] < row["seconds"] and row["waiting_seconds"] >= 0
        model = 62_006 * 4
        assert 4 * model < row["bytes_down"] < 4 * model + 100_000  # the model twice to both clients, and their rows
        assert 2 * model < row["bytes_up"] < 2 * model + 10_000


def test_clients_and_server_agree_on_every_global_model(run: SimpleNamespace) -> None:
    for row in run.metrics["rounds"][1:]:
        assert row["clients_accuracy"] == pytest.approx(row["server_accuracy"], abs=1e-9)
        assert row["clients_loss"] == pytest.approx(row["server_loss"], rel=1e-4)


def test_final_model_loads_and_is_the_one_reported(run: SimpleNamespace) -> None:
    net = cifar.Net()
    net.load_state_dict(torch.load(run.folder / "final_model.pt", weights_only=True))
    _, test_data = cifar.load_data("embedded")
    loss, accuracy = cifar.test(net, test_data)
    assert accuracy == run.metrics["rounds"][-1]["server_accuracy"]
    assert loss == pytest.approx(run.metrics["rounds"][-1]["server_loss"], rel=1e-5)


def test_the_weights_moved(run: SimpleNamespace) -> None:
    torch.manual_seed(0)
    before = cifar.Net().state_dict()
    after = torch.load(run.folder / "final_model.pt", weights_only=True)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert run.metrics["rounds"][-1]["server_loss"] < run.metrics["rounds"][0]["server_loss"]


def test_the_picture_is_a_picture(run: SimpleNamespace) -> None:
    with Image.open(run.folder / "curves.png") as picture:
        assert picture.size[0] >= 1000
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_nothing_unfinished_is_left_in_the_run_folder(run: SimpleNamespace) -> None:
    pictures = {"curves.png", "partitions.png"}
    results = {
        "final_model.pt",
        "best_model.pt",
        "metrics.json",
        "checkpoint-1.npz",
        "checkpoint-2.npz",
        "log.txt",
        ".lock",
    }
    assert {path.name for path in run.folder.iterdir()} == pictures | results


def test_simulation_ends_with_the_very_same_weights(run: SimpleNamespace, terminals: Terminals) -> None:
    status, text = terminals.run("server.py", "--simulate", "2", "--rounds", "2", "--out", "here", "--data", "embedded")
    assert status == 0, text
    metrics = json.loads((terminals.folder / "here" / "metrics.json").read_text())
    assert metrics["final_weights_sha256"] == run.metrics["final_weights_sha256"]
    assert [row["server_accuracy"] for row in metrics["rounds"]] == [
        r["server_accuracy"] for r in run.metrics["rounds"]
    ]
    eventually(lambda: terminals.processes() == [], 2)
    assert terminals.leftovers() == []
