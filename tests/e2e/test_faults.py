"""What can go wrong while a federation runs: processes killed and interrupted, clients that do not fit."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest

from federation.launch.network import free_port
from tests.conftest import Terminal, Terminals, eventually
from tests.processes import assert_all_gone, metrics_of, named
from tests.tasks import TINY_NUMPY, held_by

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tiny(terminals: Terminals) -> None:
    """Put a task beside the server that takes no time."""
    (terminals.folder / "tiny.py").write_text(TINY_NUMPY)


def start(terminals: Terminals, clients: int, *options: str) -> tuple[str, Terminal, list[Terminal]]:
    address = f"127.0.0.1:{free_port()}"
    server = terminals.open("server.py", "--address", address, "--task", "tiny", *options)
    return address, server, [terminals.open("client.py", "--server", address) for _ in range(clients)]


def test_interrupted_server_keeps_its_results_and_leaves_nothing(terminals: Terminals) -> None:
    _, server, clients = start(terminals, 2, "--rounds", "50")
    server.wait_for("\n    1  ")
    server.interrupt()
    assert server.wait(10) == 130 and "stopped" in server.text and "Traceback" not in server.text
    eventually(lambda: not named(terminals.processes(), "flower-superlink"), 2)
    assert not named(terminals.processes(), "flwr-serverapp")
    assert metrics_of(terminals.folder)["status"] == "failed" and len(metrics_of(terminals.folder)["rounds"]) >= 2
    for client, stop in zip(clients, (signal.SIGINT, signal.SIGTERM), strict=True):
        client.wait_for("lost the server", 60)
        client.process.send_signal(stop)
        assert client.wait(10) == 130 and "Traceback" not in client.text
    assert_all_gone(terminals)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_server_before_the_first_round(terminals: Terminals, stop: signal.Signals) -> None:
    _, server, _ = start(terminals, 0)
    server.wait_for("waiting for 2 clients")
    server.process.send_signal(stop)
    assert server.wait(10) == 130
    assert metrics_of(terminals.folder)["status"] == "failed"
    assert_all_gone(terminals)


def test_killed_launchers_leave_nothing(terminals: Terminals) -> None:
    _, server, clients = start(terminals, 2)
    server.wait_for("client 1 joined")
    for terminal in (server, *clients):
        terminal.process.kill()
    for terminal in (server, *clients):
        terminal.wait(10)
    assert_all_gone(terminals)


def test_killed_client_is_left_out_and_gets_its_partition_back(terminals: Terminals) -> None:
    address, server, clients = start(terminals, 2, "--rounds", "2")
    server.wait_for("client 1 joined")
    clients[1].process.kill()
    back = terminals.open("client.py", "--server", address)  # long before the server has noticed
    assert server.wait() == 0, server.text
    assert clients[0].wait(30) == 0 and back.wait(30) == 0
    assert ") is left out" in server.text
    joined = [line.split(":")[0] for line in server.text.splitlines() if " joined from " in line]
    assert len(joined) == 3 and joined[2] in joined[:2], server.text
    rounds = metrics_of(terminals.folder)["rounds"]
    assert [(row["clients"], row["dropped"]) for row in rounds[1:]] == [(1, 1), (2, 0)]
    assert_all_gone(terminals)


def test_a_client_that_is_interrupted_has_left_and_nobody_speaks_of_heartbeats(terminals: Terminals) -> None:
    hold = terminals.folder / "hold"
    (terminals.folder / "tiny.py").write_text(held_by(hold))
    address, server, _ = start(terminals, 0, "--rounds", "1")
    server.wait_for("waiting for 2 clients")  # it has tried the task before
    hold.touch()
    clients = [terminals.open("client.py", "--server", address) for _ in range(2)]
    server.wait_for("client 1 joined")
    eventually(lambda: len(named(terminals.processes(), "flwr-clientapp")) >= 2, 60)
    clients[1].interrupt()
    assert clients[1].wait(10) == 130
    hold.unlink()
    assert server.wait(60) == 0 and clients[0].wait(30) == 0
    assert ") is left out: it has left" in server.text and "heartbeat" not in server.text
    assert [(row["clients"], row["dropped"]) for row in metrics_of(terminals.folder)["rounds"][1:]] == [(1, 1)]
    assert_all_gone(terminals)


SITES = """
def load_data(root=None):  # other data of the same size for each root
    x = np.random.default_rng(int(root or 0)).standard_normal((90, 256), "f")
    import tiny_helper
    return (x[:62], x[:62, :10].argmax(1)), (x[62:], x[62:, :10].argmax(1))
"""


def test_clients_that_do_not_fit_are_turned_away(terminals: Terminals, tmp_path: Path) -> None:
    other = terminals.folder / "another version"
    other.mkdir()
    for folder, helper in (terminals.folder, "WIDTH = 1"), (other, "WIDTH = 2"):
        (folder / "tiny.py").write_text(TINY_NUMPY + SITES)
        (folder / "tiny_helper.py").write_text(helper)
    old = tmp_path / "old" / "flwr-1.40.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.40.0\n")
    address, server, _ = start(terminals, 0, "--rounds", "1")
    server.wait_for("waiting for 2 clients")
    to = ("client.py", "--server", address)
    fitting = terminals.open(*to, "--partition-id", "1", "--num-partitions", "2")
    server.wait_for("client 1 joined")
    unfit = {
        "runs Flower 1.40.0": terminals.open(*to, PYTHONPATH=str(old.parent)),
        "partition 1 is taken": terminals.open(*to, "--partition-id", "1", "--num-partitions", "2"),
        "counts 3 partitions": terminals.open(*to, "--partition-id", "2", "--num-partitions", "3"),
        "invalid literal for int() with base 10: 'no-such-folder'": terminals.open(*to, "--data", "no-such-folder"),
        "its tiny_helper.py differs from the server's": terminals.open(*to, PWD=str(other)),
        "it wants partition 0 of the server's data, but its data are not a copy": terminals.open(
            *to, "--partition-id", "0", "--num-partitions", "2", "--data", "7"
        ),
    }
    for reason, client in unfit.items():
        assert client.wait(120) == 1, client.text
        assert reason in client.text and "Traceback" not in client.text
        assert reason in server.text
    last = terminals.open(*to, "--data", "7")
    assert server.wait() == 0 and fitting.wait(30) == 0 and last.wait(30) == 0
    own = "of its own: as many training samples as the server, but different ones; if it should be a copy, copy"
    assert own in server.text and own in last.text, "both sides are told"
    assert "31 samples of 62, a copy of the server's data" in server.text
    assert metrics_of(terminals.folder)["rounds"][1]["samples"] == [31, 62]
    assert_all_gone(terminals)


def test_failing_task_fails_the_run_everywhere(terminals: Terminals) -> None:
    (terminals.folder / "faulty.py").write_text(
        "from tiny import Net, load_data, test, train as train_tiny\n"
        "def train(net, data, *, epochs, lr=0, batch_size, seed):\n"
        "    if len(data[1]) > 16:  # more than the server tries before it opens\n"
        "        raise RuntimeError('the fault of this task')\n"
        "    return train_tiny(net, data, epochs=epochs, batch_size=batch_size, seed=seed)\n"
    )
    address = f"127.0.0.1:{free_port()}"
    to = {"PYTHONPATH": str(terminals.folder)}
    options = ("--task", "faulty", "--rounds", "1", "--clients", "1", "--run-config", "retries=1")
    server = terminals.open("server.py", "--address", address, *options, **to)
    client = terminals.open("client.py", "--server", address, **to)
    assert server.wait() == 1 and client.wait(30) == 1
    for text in (server.text, client.text):
        assert "the fault of this task" in text and "Traceback" not in text
    assert "too few good models, even after 1 retries" in server.text
    assert metrics_of(terminals.folder)["status"] == "failed"
    assert_all_gone(terminals)


def test_other_data_in_each_process_of_a_simulation_are_an_error(terminals: Terminals) -> None:
    other = TINY_NUMPY.replace("default_rng(0)", "default_rng(__import__('os').getpid())")
    (terminals.folder / "tiny.py").write_text(other)
    status, text = terminals.run("server.py", "--task", "tiny", "--simulate", "2", "--rounds", "1")
    assert status == 1 and "Traceback" not in text
    assert "the run failed: a client of the simulation has other data than the server: as many training sam" in text
    assert "load_data() has to return the same in every process" in text
    assert_all_gone(terminals)


def of_ray(terminals: Terminals) -> list[psutil.Process]:
    """Return the processes of Ray that have written their title over their environment, so that it has no tag."""
    sessions = {session(process) for process in terminals.processes()} - {None}
    theirs = (process for process in psutil.process_iter(["cmdline"]) if session(process) in sessions)
    return [process for process in theirs if " ".join(process.info["cmdline"] or []).startswith("ray::")]


def session(process: psutil.Process) -> int | None:
    """Return the session of a process, None if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return None


def test_interrupted_simulation_leaves_nothing(terminals: Terminals) -> None:
    server = terminals.open("server.py", "--task", "tiny", "--simulate", "2", "--rounds", "50")
    server.wait_for("\n    1  ")
    untagged = of_ray(terminals)
    assert untagged
    server.interrupt()
    assert server.wait(10) == 130
    assert metrics_of(terminals.folder)["status"] == "failed"
    assert_all_gone(terminals)
    assert psutil.wait_procs(untagged, timeout=5)[1] == []


def test_killed_simulation_leaves_nothing(terminals: Terminals) -> None:
    server = terminals.open("server.py", "--task", "tiny", "--simulate", "2", "--rounds", "50")
    server.wait_for("client 1 joined")
    untagged = of_ray(terminals)
    assert untagged
    server.process.kill()
    server.wait(10)
    assert_all_gone(terminals)
    assert psutil.wait_procs(untagged, timeout=5)[1] == []


class SlowLink:
    """A line between client and server, over IPv6, on which everything takes `delay` seconds longer, both ways."""

    def __init__(self, port: int, delay: float) -> None:
        self.port, self.delay = port, delay
        self.listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        self.address = f"[::1]:{self.listener.getsockname()[1]}"
        Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                with contextlib.suppress(OSError):
                    far = socket.create_connection(("::1", self.port))
                    for ends in ((near, far), (far, near)):
                        Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError), source, target:
            while content := source.recv(2**20):
                time.sleep(self.delay)  # the very thing: no condition to wait for
                target.sendall(content)


def test_a_slow_link_is_no_dead_client_nor_is_one_over_ipv6(terminals: Terminals) -> None:
    port = free_port()
    one = ("--clients", "1", "--rounds", "1")
    server = terminals.open("server.py", "--address", f"[::1]:{port}", "--task", "tiny", *one)
    server.wait_for("waiting for 1 clients")
    client = terminals.open("client.py", "--server", SlowLink(port, 1.0).address)
    assert server.wait(400) == 0 and client.wait(60) == 0, client.text
    assert "lost the server" not in client.text and "left out" not in server.text
    _, played = metrics_of(terminals.folder)["rounds"]
    assert (played["clients"], played["dropped"]) == (1, 0)
    assert_all_gone(terminals)
