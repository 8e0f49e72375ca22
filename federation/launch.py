"""Starting and stopping Flower's processes: the SuperLink, a SuperNode, a run.

Everything that is started carries a mark in its environment. A guard process waits for its parent to end, however it
ends, and then kills whatever carries the mark: nothing of ours survives Ctrl-C or `kill -9`.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

import filelock
import psutil
from tqdm import tqdm

from federation.config import Config
from federation.console import CONTROL, FOLDER, MARK, PREFIX
from federation.task import load_task, sources

LOST_AFTER = 10  # seconds without an answer, after which a client takes its server for gone
ROOT = Path(__file__).resolve().parents[1]
THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "PJRT_NPROC")  # PyTorch, Keras, JAX


class LaunchError(Exception):
    """A failure that one line explains; it ends the program with status 1."""


def run_command(command: Callable[[], int]) -> None:
    """Run a program and exit with its status, with 1 and one line if it fails, with 130 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ[FOLDER] = str(Path.cwd())
    name = Path(sys.argv[0]).name
    try:
        sys.exit(command())
    except (LaunchError, ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)


def writable(folder: str) -> str:
    """Make `folder` and return its absolute path. Raises LaunchError where nothing can be written."""
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise LaunchError(f"cannot write to the run folder {path}: {error.strerror}; choose another --out") from None
    return str(path)


# ------------------------------------------------------------------------------------------------------ sessions


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
        [sys.executable, "-m", "federation.launch", str(home)],
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


# ------------------------------------------------------------------------------------------------------- addresses


def address(text: str) -> tuple[str, int]:
    """Split HOST:PORT, where HOST is a name, an IPv4 address or an IPv6 address in brackets."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if (
        not re.fullmatch(r"[\w.:%-]+" if bracketed else r"[\w.-]+", host)
        or not port.isdecimal()
        or not 0 < int(port) < 65536
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    return host, int(port)


def shown(address: tuple[str, int]) -> str:
    """Return an address in the form HOST:PORT."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port() -> int:
    """Return a port that nothing on this machine listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check_free(address: tuple[str, int]) -> None:
    """Raise LaunchError if the server cannot listen there."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise LaunchError(f"cannot listen on {shown(address)}: {error.strerror}; choose another --address") from None


def reachable(address: tuple[str, int]) -> tuple[str, int]:
    """Return the address by which this machine reaches a server of its own that listens at `address`."""
    host, port = address
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def is_up(host: str, port: int) -> bool:
    """Tell whether a SuperLink answers there."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{shown((host, port))}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError, http.client.HTTPException):
        return False


# ----------------------------------------------------------------------------------------------------- the server


def host_run(address: tuple[str, int], run_config: Config, simulated_clients: int = 0) -> int:
    """Run the app in this folder on a SuperLink of its own and return the exit status: 0, or 1 if it failed.

    With `simulated_clients`, Flower's Simulation Engine plays that many clients, each on one core.
    """
    host, port = ("127.0.0.1", free_port()) if simulated_clients else address
    with session(Path(str(run_config["out"])) / "log.txt") as ours:
        superlink = ours.start(
            "flower-superlink", "--insecure", "--host", host, "--port", str(port),
            "--disable-runtime-dependency-installation", *(["--simulation"] if simulated_clients else []),
        )  # fmt: skip
        Thread(target=relay, args=(superlink, ours.log), daemon=True).start()
        while not is_up(*reachable((host, port))):
            if superlink.poll() is not None:
                raise LaunchError(f"the SuperLink did not start: {ours.last_error()}")
            time.sleep(0.1)
        status = relay(submit(ours, reachable((host, port)), run_config, simulated_clients), ours.log)
        if status is None:
            raise LaunchError(f"the run broke off: {ours.last_error()}")
        return status


def submit(
    ours: Session, address: tuple[str, int], run_config: Config, simulated_clients: int
) -> "subprocess.Popen[str]":
    """Start the run and return a process that lasts as long as it does, and prints what its ServerApp prints."""
    (ours.home / "config.toml").write_text(
        f'[superlink.ours]\naddress = "{shown(address)}"\ninsecure = true\n', "utf-8"
    )
    overrides = ours.home / "run-config.toml"
    overrides.write_text(
        "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in run_config.items()), "utf-8"
    )
    app = bundle(ours.home / "app", str(run_config["task"]))
    command = ["flwr", "run", str(app), "ours", "--stream", "--run-config", str(overrides)]
    if simulated_clients:
        command += [
            "--federation-config", f"num-supernodes={simulated_clients} client-resources-num-cpus=1 "
            f"init-args-num-cpus={min(cores(), simulated_clients)} init-args-log-to-driver=false",
        ]  # fmt: skip
    return ours.start(*command)


def bundle(folder: Path, task: str) -> Path:
    """Gather in `folder` what clients need: client, server, and the task with what it imports from beside it.

    Of the whole project, Flower would ship every script, and look through all environments in it first.
    """
    ours = [ROOT / name for name in ("pyproject.toml", "client.py", "server.py")] + [*ROOT.glob("federation/*.py")]
    for name, path in (sources(load_task(task)) | {str(path.relative_to(ROOT)): path for path in ours}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return folder


# ----------------------------------------------------------------------------------------------------- the client


def join_run(server: tuple[str, int], wait: float, node_config: Config, threads: int | None) -> int:
    """Run a SuperNode until its run has ended and return the exit status.

    Waits up to `wait` seconds for the server, at the start and whenever it goes away. Raises LaunchError after that.
    """
    environment = dict.fromkeys(THREADS, str(threads)) if threads else {}
    with place_on_host() as (name, log), session(log, **environment) as ours:
        while True:
            wait_for_server(server, wait)
            supernode = start_supernode(ours, server, node_config | {"name": name, "key": f"{name} {uuid.getnode():x}"})
            Thread(target=watch, args=(ours, supernode, server), daemon=True).start()
            status = relay(supernode, ours.log)
            if status is not None:
                with suppress(subprocess.TimeoutExpired):
                    supernode.wait(5 * status)  # lets it deliver the reason of a failure
                return status
            if "SuperNode ID" not in Path(log).read_text("utf-8"):
                raise LaunchError(f"the server at {shown(server)} turned this client away: {ours.last_error()}")
            print(f"lost the server at {shown(server)}", flush=True)


def start_supernode(ours: Session, server: tuple[str, int], node_config: Config) -> "subprocess.Popen[str]":
    ours.log.seek(0)
    ours.log.truncate()
    settings = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in node_config.items())
    return ours.start(
        "flower-supernode", "--insecure", "--superlink", shown(server),
        "--port", str(free_port()), "--node-config", settings,
    )  # fmt: skip


def watch(ours: Session, supernode: "subprocess.Popen[str]", server: tuple[str, int]) -> None:
    """End a SuperNode whose server has gone for some time: left to itself, it would wait for ever and say nothing."""
    answered = time.monotonic()
    while supernode.poll() is None and time.monotonic() - answered < LOST_AFTER:
        if is_up(*server):
            answered = time.monotonic()
        time.sleep(2)
    ours.stop()


def wait_for_server(server: tuple[str, int], wait: float) -> None:
    """Return once a server answers. Raises LaunchError after `wait` seconds."""
    deadline = time.monotonic() + wait
    if not is_up(*server):
        print(f"waiting for a server at {shown(server)} (up to {wait:g} s)", flush=True)
    while not is_up(*server):
        if time.monotonic() > deadline:
            raise LaunchError(f"no server at {shown(server)} within {wait:g} s; is it running, and is --server right?")
        time.sleep(0.5)


@contextmanager
def place_on_host() -> Iterator[tuple[str, Path]]:
    """Hold the lowest free place among the clients on this host: a name, the same after a restart, and a log file."""
    folder = Path(tempfile.gettempdir()) / f"federation-clients-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder.mkdir(exist_ok=True)
    place = 0
    while True:
        try:
            with filelock.FileLock(folder / f"{place}.lock", timeout=0):
                yield f"{socket.gethostname()}/{place}", folder / f"{place}.log"
                return
        except filelock.Timeout:
            place += 1


def share_cores() -> None:
    """Give this process its share of the cores, before a framework is imported: one of C clients here gets 1/C.

    Frameworks take all cores by default, and clients that share a host then slow each other down several times.
    """
    if THREADS[0] not in os.environ:
        commands = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
        clients = sum("flower-supernode" in command for command in commands)
        os.environ[THREADS[0]] = str(max(1, cores() // max(1, clients)))
    for variable in THREADS:
        os.environ.setdefault(variable, os.environ[THREADS[0]])


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
