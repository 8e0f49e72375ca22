"""How the commands end by a signal, whoever has started them and how."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import sys
from federation.launch.command import interruptible, run_command

def command():
    try:
        BEGIN
        for line in interruptible(sys.stdin):
            print(line, end="", flush=True)
        return 0
    finally:
        open("cleaned", "w").close()

run_command(command)
"""


# Has Python told of a signal without a system call that is interrupted, as by one that comes just before the call.
JUST_BEFORE_A_READ = "import _thread, threading; threading.Timer(0.5, _thread.interrupt_main).start()"


def start(
    folder: Path,
    ignored: signal.Signals | None = None,
    terminal: int | None = None,
    begin: str = 'print("working", flush=True)',
) -> "subprocess.Popen[str]":
    """Start a command that repeats what it reads, with a signal ignored, as a shell or nohup does, or in a terminal."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.PIPE if terminal is None else terminal

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if nohup runs the tests
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)
        if terminal is not None:
            os.close(os.open(os.ttyname(terminal), os.O_RDWR))  # it controls the session from now on

    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("BEGIN", begin)], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, preexec_fn=prepare,
    )  # fmt: skip


@pytest.mark.parametrize("ignored", [signal.SIGINT, None], ids=["in the background", "in the foreground"])
def test_ctrl_c_ends_a_command_wherever_the_shell_has_started_it(tmp_path: Path, ignored: signal.Signals) -> None:
    process = start(tmp_path, ignored)
    assert process.stdout and process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "-c: stopped\n")


def test_a_signal_that_comes_just_before_a_read_is_not_left_until_the_next_line(tmp_path: Path) -> None:
    process = start(tmp_path, begin=JUST_BEFORE_A_READ)
    assert process.wait(30) == 130
    assert (tmp_path / "cleaned").exists()


def test_a_closed_terminal_ends_a_command_in_order(tmp_path: Path) -> None:
    near, far = pty.openpty()
    process = start(tmp_path, terminal=far)
    os.close(far)
    with os.fdopen(near, "rb") as screen:
        assert screen.readline() == b"working\r\n"  # all of it: closed while it prints, the command would fail instead
    assert process.wait(30) == 130
    assert (tmp_path / "cleaned").exists()


def test_nohup_is_respected(tmp_path: Path) -> None:
    process = start(tmp_path, signal.SIGHUP)
    assert process.stdout and process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate("still here\n", timeout=10) == ("still here\n", "")
    assert process.returncode == 0
