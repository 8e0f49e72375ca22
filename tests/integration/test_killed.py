"""A server that is killed, whatever of it and whenever, goes on with the same clients, to the very same weights."""

from typing import Any

import psutil
import pytest

from federation.launch.network import free_port
from tests.conftest import Terminal, Terminals
from tests.processes import SETTINGS, as_text, assert_all_gone, metrics_of, named, undisturbed
from tests.tasks import TINY

pytestmark = pytest.mark.slow


def kill(terminals: Terminals, terminal: Terminal, part: str) -> None:
    """Kill a part of the server, or the launcher itself, and wait until nothing of it is left."""
    victims: list[Any] = named(terminals.processes(), part) if part else [terminal.process]
    assert victims
    for victim in victims:
        victim.kill()
    assert terminal.wait(120) == (1 if part else -9), terminal.text
    assert "Traceback" not in terminal.text
    psutil.wait_procs(named(terminals.processes(), "flower-superlink"), 5)


@pytest.mark.usefixtures("one_thread", "in_a_run")
def test_a_server_that_is_killed_goes_on(terminals: Terminals, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the launcher, then SuperLink, then the ServerApp; with SCAFFOLD: server and clients keep a state."""
    kills = [("client 1 joined", ""), ("\n    1  ", "flower-superlink"), ("\n    2  ", "flwr-serverapp")]
    (terminals.folder / "tiny.py").write_text(TINY)
    config = SETTINGS | {"strategy": "scaffold"}
    address = f"127.0.0.1:{free_port()}"
    start = ("server.py", "--address", address)
    clients = [terminals.open("client.py", "--server", address, "--threads", "1") for _ in range(2)]

    running = terminals.open(*start, "--task", "tiny", "--run-config", as_text(config))
    for moment, part in kills:
        running.wait_for(moment, 300)
        kill(terminals, running, part)
        running = terminals.open(*start, "--resume")
    assert running.wait(400) == 0, running.text
    assert [client.wait(30) for client in clients] == [0, 0], [client.text for client in clients]

    ended = metrics_of(terminals.folder)
    assert [row["round"] for row in ended["rounds"]] == [0, 1, 2, 3]
    assert [row["clients"] for row in ended["rounds"]] == [None, 2, 2, 2]
    assert ended["final_weights_sha256"] == undisturbed(terminals.folder, config, monkeypatch)
    for client in clients:
        assert client.text.count("lost the server") == len(kills) and "Traceback" not in client.text
    assert_all_gone(terminals)
