"""Commands that a fork server runs: each as if it had been started in the usual way, and none knows of another."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from federation.launch import fork_server, warm
from tests.conftest import ROOT, eventually

pytestmark = pytest.mark.skipif(not warm.SUPPORTED, reason="nothing is forked here")

SERVER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import atexit, socket
from federation.launch import fork_server
atexit.register(fork_server.leave_at_once)
sys.path[0] = sys.argv[3]
from commands import COMMANDS
fork_server.run_commands(COMMANDS, socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
"""
COMMANDS = """
import atexit, json, os, sys, threading, time
calls = []

def late():
    time.sleep(0.1)
    print("the thread has ended")

def report():
    threading.Thread(target=late).start()
    atexit.register(print, "at exit")
    import torch
    calls.append(1)
    torch.calls = getattr(torch, "calls", 0) + 1
    facts = {"argv": sys.argv, "folder": os.getcwd(), "environ": dict(os.environ), "pid": os.getpid(),
             "calls": len(calls), "torch": torch.calls, "imported in": torch.pid, "group": os.getpgrp()}
    print(json.dumps(facts))
    print("error", file=sys.stderr)
    return int(os.environ.get("STATUS", 0))

def wait():
    print("waiting", flush=True)
    time.sleep(60)

def crash():
    os.abort()

def linger():
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise KeyboardInterrupt

COMMANDS = {"report": report, "wait": wait, "crash": crash, "linger": linger}
"""


class Warm:
    """A fork server whose commands are those above, and the scripts that lead to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, folder / "fork"
        (folder / "commands.py").write_text(COMMANDS)
        (folder / "torch.py").write_text("import os; pid, seed = os.getpid(), lambda: None")
        (folder / "server.py").write_text(SERVER)
        self.listener = warm.listen(self.address)
        for name in ("report", "wait", "crash", "linger", "unknown"):
            original = folder / "original" / name
            original.parent.mkdir(exist_ok=True)
            original.write_text("#!/bin/sh\necho started in the usual way $@")
            original.chmod(0o700)
            warm.write_script(folder / name, self.address, str(original))
        self.start()

    def start(self) -> None:
        number = str(self.listener.fileno())
        command = [sys.executable, "-P", str(self.folder / "server.py"), number, str(self.address), str(self.folder)]
        self.server = subprocess.Popen(command, pass_fds=[self.listener.fileno()], stdout=subprocess.PIPE, text=True)

    def open(self, name: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.folder / name, *arguments], cwd=self.folder / "original", env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def child(self) -> psutil.Process:
        """Return the child that has been forked, once there is one."""
        eventually(lambda: psutil.Process(self.server.pid).children(), 10)
        return psutil.Process(self.server.pid).children()[0]


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Warm]:
    warm_start = Warm(tmp_path)
    yield warm_start
    warm_start.server.kill()
    warm_start.server.communicate()
    warm_start.listener.close()


def test_a_command_that_is_interrupted_does_not_wait_for_its_threads(ours: Warm) -> None:
    process = ours.open("linger")
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_command_runs_as_if_it_had_been_started_in_the_usual_way(ours: Warm) -> None:
    process = ours.open("report", "--option", "two words", "é\udcff", STATUS="7", ONLY="here")
    output, errors = process.communicate(timeout=20)
    first, *rest = output.splitlines()
    facts = json.loads(first)
    assert rest == ["the thread has ended", "at exit"]
    assert process.returncode == 7 and errors == "error\n"
    assert facts["argv"] == [str(ours.folder / "original" / "report"), "--option", "two words", "é\udcff"]
    assert facts["folder"] == str(ours.folder / "original")
    assert facts["environ"].items() >= {"STATUS": "7", "ONLY": "here"}.items()
    assert facts["group"] == facts["pid"] != ours.server.pid


def test_nothing_of_one_child_is_seen_by_the_next_but_what_it_had_imported(ours: Warm) -> None:
    reports = [json.loads(ours.open("report").communicate(timeout=20)[0].splitlines()[0]) for _ in range(3)]
    assert len({report["pid"] for report in reports}) == 3
    assert [(report["calls"], report["torch"]) for report in reports] == [(1, 1)] * 3
    assert [report["imported in"] for report in reports] == [reports[0]["pid"], ours.server.pid, ours.server.pid]


def noting(folder: Path) -> str:
    """Return lines of a module with which it notes in a file that it has been imported."""
    note = f"print(__name__, file=open({str(folder / 'noted')!r}, 'a'))"
    return f"import os; pid, seed = os.getpid(), lambda: None; {note}\n"


@pytest.mark.parametrize("kind", ["import", "expect"])
def test_a_framework_can_be_imported_before_a_command_needs_it_but_nothing_else(ours: Warm, kind: str) -> None:
    for name in ("stranger", "torch"):
        (ours.folder / f"{name}.py").write_text(noting(ours.folder))
    fork_server.request_imports(str(ours.address), ["stranger", "torch"], kind)
    eventually((ours.folder / "noted").exists, 20)
    report = json.loads(ours.open("report").communicate(timeout=20)[0].splitlines()[0])
    assert report["imported in"] == ours.server.pid
    assert (ours.folder / "noted").read_text() == "torch\n"


def test_a_request_does_not_wait_for_all_modules_that_are_expected(ours: Warm) -> None:
    go = ours.folder / "go"
    waiting = f"import time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    (ours.folder / "jax.py").write_text(noting(ours.folder) + waiting)
    fork_server.request_imports(str(ours.address), ["jax", "torch"], "expect")
    eventually((ours.folder / "noted").exists, 20)
    early = ours.open("report")
    eventually(lambda: waits_for_an_answer(early.pid), 20)
    go.touch()
    report = json.loads(early.communicate(timeout=20)[0].splitlines()[0])
    assert report["imported in"] != ours.server.pid, "it had to import that itself"


def waits_for_an_answer(pid: int) -> bool:
    """Tell whether a process has a connection to a fork server."""
    return any(connection.status for connection in psutil.Process(pid).net_connections("unix"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\nimport torch.nn as nn\nfrom torch import Tensor", ["torch", "torch.nn", "torch"]),
        ("import numpy as np", []),
        ("def f():\n    import torch", []),
        ("import keras", ["keras"]),
        ("from flax import nnx\nfrom . import torch", ["flax"]),
        ("not Python", []),
    ],
)
def test_the_frameworks_of_a_task_are_read_from_its_file(tmp_path: Path, source: str, expected: list[str]) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "task.py").write_text(source)
    assert warm.frameworks_of("package.task", [tmp_path / "elsewhere", tmp_path]) == expected
    hidden = warm.frameworks_of("package.task", [tmp_path], with_tensorflow=False)
    assert hidden == ([] if "keras" in source else expected)
    assert warm.frameworks_of("nowhere", [tmp_path]) == []


def test_a_command_ends_with_its_stand_in_and_the_stand_in_with_it(ours: Warm) -> None:
    for end, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        process = ours.open("wait")
        assert process.stdout and process.stdout.readline() == "waiting\n"
        child = ours.child()
        process.send_signal(end)
        process.communicate(timeout=20)
        assert process.returncode == status
        eventually(lambda child=child: not child.is_running(), 10)


def test_a_fork_server_that_is_killed_ends_no_command_and_the_next_one_takes_what_has_waited(ours: Warm) -> None:
    running = ours.open("wait")
    assert running.stdout and running.stdout.readline() == "waiting\n"
    child = ours.child()
    ours.server.kill()
    ours.server.wait()
    waiting = ours.open("report")
    assert child.is_running() and running.poll() is None
    ours.start()
    assert json.loads(waiting.communicate(timeout=20)[0].splitlines()[0])["calls"] == 1
    child.terminate()
    assert running.wait(20) == 1, "its stand-in has noticed"


def test_a_command_that_nobody_has_begun_with_starts_in_the_usual_way(ours: Warm) -> None:
    ours.server.send_signal(signal.SIGSTOP)
    taken = ours.open("report", "1")
    ours.server.kill()
    ours.server.wait()
    ours.listener.close()
    refused = ours.open("report", "2")
    assert [process.communicate(timeout=20)[0] for process in (taken, refused)] == [
        "started in the usual way 1\n", "started in the usual way 2\n"
    ]  # fmt: skip


def test_a_command_that_the_fork_server_does_not_know_starts_in_the_usual_way(ours: Warm) -> None:
    assert ours.open("unknown", "1").communicate(timeout=20)[0] == "started in the usual way 1\n"


def test_after_a_crash_nothing_is_forked_any_more_and_the_log_says_why(ours: Warm) -> None:
    assert ours.open("crash").wait(20) == 128 + signal.SIGABRT
    output, _ = ours.server.communicate(timeout=20)
    assert output == "a forked child died of SIGABRT: no more are forked\n"
    assert ours.server.returncode != -signal.SIGKILL
