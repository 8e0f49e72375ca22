"""The processes of one server or client: Flower's, which must not outlive it (see guard.py), and what they say."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import IO, Any

from federation.app.console import CONSOLE, CONTROL, MARK, PREFIX
from federation.app.layout import PACKAGE
from federation.launch import guard, warm
from federation.launch.command import interruptible
from federation.launch.fork_server import request_imports
from federation.launch.log import Log, Progress, say
from federation.launch.network import LaunchError

SIGN_OFF = 5  # seconds; it takes less than one, but where the machine is busy
ROOT = PACKAGE.parent


class ProcessGroup:
    """The processes of one server or client, their private FLWR_HOME and their log."""

    def __init__(self, home: Path, log: Log, environment: dict[str, str], warm_starts: bool) -> None:
        self.home, self.warm_starts = home, warm_starts
        self.lock, self.warm = Lock(), False  # whether there is to be a fork server
        self.keeper: Thread | None = None  # who sees to that
        self.processes: list[subprocess.Popen[str]] = []
        self.log = log
        self.log.write("" if warm_starts else "Flower's commands start in the usual way: nothing is forked here\n")
        defaults = {
            "JAX_COMPILATION_CACHE_DIR": str(home / "jax"),  # or the process of each message would compile again
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        self.environment = defaults | os.environ | environment | {
            MARK: home.name,
            "PATH": os.pathsep.join([str(home / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",  # the default of a pipe on Windows is another one
            "FLWR_HOME": str(home),
            "RAY_TMPDIR": str(home),
            "RAY_prestart_worker_first_driver": "0",  # they would lack the environment that Flower asks for, and idle
            "RAY_worker_niceness": "0",  # the default of 15 lets any other work on the machine stop a simulation
            "FLWR_TELEMETRY_ENABLED": "0",
            "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1,localhost,::1"])),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # the default of 1 s delays every message
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # or to look for GPUs while modules are imported would spoil the fork
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # the default of TensorFlow, and JAX, is to take a whole GPU: that
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # leaves nothing to a second client, or the server
        }  # fmt: skip

    def start(self, *command: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
        """Start a command whose output goes to the log, but for the lines that are for people."""
        self.warm_up()
        process = self.popen(*command, cwd=cwd)
        self.processes.append(process)
        return process

    def popen(self, *command: str, **options: Any) -> "subprocess.Popen[str]":
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(
            find_program(command, self.environment), env=self.environment, encoding="utf-8", errors="replace",
            start_new_session=True, **(streams | options),
        )  # fmt: skip

    def warm_up(self) -> None:
        """Have Flower's commands forked by a fork server, which is replaced if it is killed."""
        if self.warm or not self.warm_starts:
            return
        self.warm, address = True, self.home / "fork"
        listener = warm.listen(address)
        warm.write_scripts(self.home / "bin", address)

        def keep() -> None:
            with listener:  # once it is closed, the commands start in the usual way
                while server := self.start_fork_server(listener, address):
                    relay(server, self.log)
                    if server.wait() != -signal.SIGKILL:
                        return

        self.keeper = Thread(target=keep, daemon=True)
        self.keeper.start()

    def open_console(self) -> Path | None:
        """Make a named pipe for a ServerApp's lines and name it to processes started from now on. Windows has none."""
        if not hasattr(os, "mkfifo"):
            return None
        os.mkfifo(console := self.home / "console", 0o600)
        self.environment[CONSOLE] = str(console)
        return console

    def expect(self, modules: list[str], at_once: bool = False) -> None:
        """Have the fork server, if there is one, import modules of frameworks before a child needs them."""
        if self.warm and modules:
            request_imports(str(self.home / "fork"), modules, "import" if at_once else "expect")

    def start_fork_server(self, listener: socket.socket, address: Path) -> "subprocess.Popen[str] | None":
        with self.lock:  # so that none is started once all have been killed
            command = warm.fork_server(listener, address)
            return self.popen(*command, pass_fds=[listener.fileno()]) if self.warm else None

    def stop(self) -> None:
        """End all processes. Only a SuperNode is given time to sign off, so that no server waits for it."""
        with self.lock:
            self.warm = False
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            if "flower-supernode" in str(process.args):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SIGN_OFF)
        guard.kill_all(MARK, self.home.name)
        if self.keeper:
            self.keeper.join(5)
        self.log.flush()

    def last_error(self) -> str:
        """Return what the log says last."""
        return self.log.last_error()


def find_program(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return a command with the path of its program, for which Windows would look where this process's PATH says."""
    return [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]]


def open_private(log: Path) -> IO[str]:
    """Open a log that only its owner reads. Raises LaunchError where it is a link: it may lead to any file."""

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)

    try:
        return open(log, "w+", encoding="utf-8", buffering=1, opener=opener)
    except OSError as error:
        why = "it is a symbolic link" if log.is_symlink() else error.strerror
        raise LaunchError(f"cannot open the log {log}: {why}; remove it") from None


@contextmanager
def process_group(
    log: Path, environment: dict[str, str] | None = None, warm_starts: bool = True
) -> Iterator[ProcessGroup]:
    """Open a ProcessGroup; when it closes, every process of it is dead and its FLWR_HOME is gone."""
    opened = open_private(log)
    short = len(tempfile.gettempdir()) < 20 or os.name == "nt"  # Ray puts sockets in it: their paths may have 107 bytes
    home = Path(tempfile.mkdtemp(prefix="federation-", dir=None if short else "/tmp"))
    guardian = subprocess.Popen(
        [sys.executable, "-P", guard.__file__, MARK, str(home)], stdin=subprocess.PIPE, start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != MARK},  # no other guard's business
    )  # fmt: skip
    ours = ProcessGroup(home, Log(opened), environment or {}, warm_starts and warm.SUPPORTED)
    try:
        ours.warm_up()
        yield ours
    finally:
        ours.stop()
        guardian.communicate()


def relay(process: "subprocess.Popen[str]", log: Log, console: Path | None = None) -> int | None:
    """Show what a process says to people, until it ends (None) or its app tells how the run ended (0 or 1).

    With `console`, that is what its app writes to this named pipe.
    """
    lines = _logged(process, log) if console is None else _from_console(process, log, console)
    with closing(Progress()) as progress:
        for line in interruptible(lines):
            if line.startswith(PREFIX):
                progress.clear()
                say(line.removeprefix(PREFIX))
            elif line.startswith(CONTROL):
                event = json.loads(line.removeprefix(CONTROL))
                if "end" in event:
                    return int(event["end"])
                done, total = event["progress"]
                progress.show(done, total, event["doing"])
    return None


def _logged(process: "subprocess.Popen[str]", log: Log, without: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the lines that a process prints, and write them to the log, `without` those that begin so."""
    for line in process.stdout or ():
        if not line.startswith(without):
            log.write(line)
        yield line


def _from_console(process: "subprocess.Popen[str]", log: Log, console: Path) -> Iterator[str]:
    """Yield the lines that come through a named pipe, while a process runs whose output goes to the log.

    The log of a run that has failed is complete: Flower delivers the last lines of its app some time after the failure.
    """
    descriptor = os.open(console, os.O_RDWR)  # not to find its end as long as no app has opened it

    def drain() -> None:
        for _ in _logged(process, log, without=(PREFIX, CONTROL)):
            pass
        os.write(descriptor, b"\n")

    drained = Thread(target=drain, daemon=True)
    drained.start()
    with open(descriptor, encoding="utf-8", errors="replace", closefd=False) as stream:
        for line in iter(stream.readline, "\n"):
            log.write(line)
            if line.startswith(CONTROL) and json.loads(line.removeprefix(CONTROL)).get("end"):
                drained.join(SIGN_OFF)
            yield line
