"""The processes of one server or client: Flower's, which must not outlive it, and what they say.

Everything that is started carries a mark in its environment. A guard process waits for its parent to end, however it
ends, and then kills whatever carries the mark: nothing of ours survives Ctrl-C or `kill -9`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil
from tqdm import tqdm

from federation.console import CONTROL, MARK, PREFIX

ROOT = Path(__file__).resolve().parents[1]


class Session:
    """The processes of one server or client, their private FLWR_HOME and their log."""

    def __init__(self, home: Path, log: Path, **environment: str) -> None:
        self.home = home
        self.processes: list[subprocess.Popen[str]] = []
        self.log = log.open("w+", encoding="utf-8", buffering=1)
        self.environment = os.environ | environment | {
            MARK: home.name,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
            "FLWR_HOME": str(home),
            "RAY_TMPDIR": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1,localhost,::1"])),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # the default of 1 s delays every message
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # the default of TensorFlow, and JAX, is to take a whole GPU: that
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # leaves nothing to a second client, or the server
        }  # fmt: skip

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command whose output goes to the log, but for the lines that are for people."""
        process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Ask the processes to end, and after a second make them: a SuperNode signs off, so that no server waits."""
        deadline = time.monotonic() + 1
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
        kill_all(self.home.name)
        with suppress(OSError):
            self.log.flush()

    def last_error(self) -> str:
        """Return what the log says last, without the frames and colours that Flower puts around it."""
        self.log.seek(0)
        lines = [re.sub(r"\x1b\[\d*m", "", line).strip(" │\n") for line in self.log]
        lines = [line for line in lines if line and line[0] not in "╭╰"]
        errors = [line for line in lines if re.search(r"\w(Error|Exception)\b", line)]
        errors = errors or [line for line in lines if line.startswith("ERROR")]
        return f"{(errors or lines or ['it printed nothing'])[-1]} (all is in {self.log.name})"


@contextmanager
def session(log: Path, **environment: str) -> Iterator[Session]:
    """Open a Session; when it closes, every process of it is dead and its FLWR_HOME is gone."""
    short = len(tempfile.gettempdir()) < 20 or os.name == "nt"  # Ray puts sockets in it: their paths may have 107 bytes
    home = Path(tempfile.mkdtemp(prefix="federation-", dir=None if short else "/tmp"))
    guard = subprocess.Popen(
        [sys.executable, "-m", "federation.session", str(home)],
        cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != MARK},  # no other guard's business
    )  # fmt: skip
    ours = Session(home, log, **environment)
    try:
        yield ours
    finally:
        ours.stop()
        guard.communicate()


def guard(home: Path) -> None:
    """Wait until the parent closes our standard input or dies, then kill all processes of its session."""
    with suppress(OSError):
        sys.stdin.read()
    kill_all(home.name)
    shutil.rmtree(home, ignore_errors=True)


def kill_all(mark: str) -> None:
    """Kill all processes that carry the mark, and those that they start meanwhile."""
    while marked := [process for process in psutil.process_iter() if _mark(process) == mark]:
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=0.2)


def _mark(process: psutil.Process) -> str | None:
    try:
        return str(process.environ().get(MARK)) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):
        return None


def relay(process: "subprocess.Popen[str]", log: IO[str]) -> int | None:
    """Show what a process says to people, until it ends (None) or its app tells how the run ended (0 or 1)."""
    with tqdm(leave=False, disable=not sys.stderr.isatty(), bar_format="{desc} {bar} {n}/{total}") as bar:
        for line in process.stdout or ():
            with suppress(OSError):  # a full disk: the run itself will say so, better
                log.write(line)
            if line.startswith(PREFIX):
                bar.clear()
                print(line.removeprefix(PREFIX), end="", flush=True)
            elif line.startswith(CONTROL):
                event = json.loads(line.removeprefix(CONTROL))
                if "end" in event:
                    return int(event["end"])
                bar.n, bar.total = event["progress"]
                bar.set_description_str(event["doing"])
    return None


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
