"""Every message is handled by a process of its own, whatever becomes of the process that it is forked from."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, RecordDict

import server
from federation.app.console import FOLDER
from federation.launch import warm
from federation.launch.network import free_port
from tests.conftest import Terminal, Terminals, eventually
from tests.in_memory import InMemoryGrid
from tests.processes import assert_all_gone, metrics_of, named

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not warm.SUPPORTED, reason="nothing is forked here")]
TASK = """
import json, os, sys, time
from pathlib import Path
BEFORE = "torch" in sys.modules
import numpy as np
import torch
from threadpoolctl import threadpool_info

FOLDER = Path(os.environ["FEDERATION_FOLDER"])
DRAWN = float(np.random.rand())  # before anybody has seeded that
seen = []

def Net():
    return torch.nn.Linear(4, 2)

def load_data(root):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    y = (x.sum(1) > 0).long()
    return (x, y), (x, y)

def note(what):
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
    line = {"what": what, "pid": os.getpid(), "forked": "fork_server.py" in parent, "imported": BEFORE,
            "seen": [len(seen), hasattr(torch, "seen"), os.environ.get("SEEN")],
            "threads": [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())], "drawn": DRAWN}
    with (FOLDER / "notes.txt").open("a") as notes:
        print(json.dumps(line), file=notes)
    seen.append(1)
    torch.seen = os.environ["SEEN"] = "yes"

def train(net, data, *, epochs, batch_size, seed, lr=0.1):
    if len(data[1]) > 16:  # more than the server tries before it opens
        note("train")
    if (FOLDER / "notes.txt").exists() and (FOLDER / "notes.txt").read_text().count("train") == 2:
        while not (FOLDER / "go").exists():
            time.sleep(0.05)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(epochs):
        loss = torch.nn.functional.cross_entropy(net(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()

def test(net, data):
    if len(data[1]) > 16:
        note("test")
    logits = net(data[0])
    loss = torch.nn.functional.cross_entropy(logits, data[1])
    return loss.item(), (logits.argmax(1) == data[1]).float().mean().item()
"""


def kill_fork_server(client: Terminal) -> None:
    """Kill the process that this client's are forked from, and wait until there is another one."""
    children = psutil.Process(client.process.pid).children()
    (victim,) = named(children, "fork_server.py")
    victim.kill()
    psutil.wait_procs([victim], 10)


def undisturbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the SHA-256 of the same run in this process."""
    monkeypatch.setitem(os.environ, FOLDER, str(folder))
    monkeypatch.syspath_prepend(str(folder))
    config = {"task": "forgetful", "num-clients": 1, "out": str(folder / "undisturbed")}
    server.main(InMemoryGrid(config, {1: {}}), Context(1, 0, {}, RecordDict(), config))
    sys.modules.pop("forgetful")
    return str(metrics_of(folder / "undisturbed")["final_weights_sha256"])


@pytest.mark.usefixtures("in_a_run")
def test_messages_know_nothing_of_each_other_and_outlive_the_process_they_are_forked_from(
    terminals: Terminals, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = terminals.folder, f"127.0.0.1:{free_port()}"
    (folder / "forgetful.py").write_text(TASK)
    notes = folder / "notes.txt"
    command = ("server.py", "--address", address, "--task", "forgetful", "--clients", "1")
    running = terminals.open(*command, OMP_NUM_THREADS="2")  # so that what it notes is told from what the client does
    client = terminals.open("client.py", "--server", address, "--threads", "1")
    client.wait_for("round 1: tested", 200)
    eventually(lambda: notes.read_text().count("train") == 2, 60)
    kill_fork_server(client)  # while its child trains
    (folder / "go").touch()
    client.wait_for("round 2: tested", 200)
    kill_fork_server(client)  # while it has no child, or one that is about to end
    assert running.wait() == client.wait(30) == 0, running.text + client.text

    noted: list[dict[str, Any]] = [json.loads(line) for line in notes.read_text().splitlines()]
    of_client = [note for note in noted if set(note["threads"]) == {1} and note["forked"]]
    assert [note["what"] for note in of_client] == ["train", "test"] * 3
    assert len({note["pid"] for note in of_client}) == len({note["drawn"] for note in of_client}) == 6
    assert all(note["seen"] == [0, False, None] for note in of_client)
    assert of_client[1]["imported"], "the first message has shown which framework the task uses"
    ended = metrics_of(folder)
    assert [row["dropped"] for row in ended["rounds"][1:]] == [0, 0, 0]
    assert ended["final_weights_sha256"] == undisturbed(folder, monkeypatch)
    assert_all_gone(terminals)
