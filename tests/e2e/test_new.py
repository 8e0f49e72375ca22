"""A script of others that trains when it is imported, adapted by `federate new`, on a client that has nothing of it."""

import json
import shutil
from pathlib import Path

import pytest

from federation.launch.network import free_port
from tests.conftest import ROOT, Terminals
from tests.processes import assert_all_gone, metrics_of
from tests.tasks import write_digits


@pytest.mark.slow
def test_an_adapted_script_reaches_a_client_in_an_empty_folder(terminals: Terminals, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    write_digits(here / "data")
    shutil.copy(ROOT / "tests" / "scripts_of_others" / "clothes.py", here)
    environment = {"PYTHONPATH": str(ROOT), "PWD": str(here)}
    command = "-m", "federation", "new", "my_task.py", "--from", "clothes.py"
    status, text = terminals.run(*command, **environment)
    assert (status, text) == (0, "wrote my_task.py\nnext: federate check my_task\n")
    address = f"127.0.0.1:{free_port()}"
    options = "--address", address, "--clients", "1", "--data", str(here / "data")
    server = terminals.open("-m", "federation", "server", "--task", "my_task", *options, **environment)
    line = "-m", "federation", "client", "--server", address, "--threads", "1"
    client = terminals.open(*line, **environment | {"PWD": str(there)})
    assert server.wait() == client.wait(30) == 0, server.text + client.text
    run = metrics_of(here)
    losses = [row["server_loss"] for row in run["rounds"]]
    assert losses == sorted(losses, reverse=True) and run["dataset"]["train"] == 600, json.dumps(run["rounds"])
    assert list(there.iterdir()) == []
    assert_all_gone(terminals)
