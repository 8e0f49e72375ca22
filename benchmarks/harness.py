"""Helpers for the benchmarks: run the project's commands, and other Flower apps on the same engine."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from federation.app import hide_tensorflow
from federation.launch.network import LaunchError, free_port, is_up
from federation.launch.process_group import ROOT, ProcessGroup, process_group, relay

Result = dict[str, Any]

FOLDER = ROOT / "runs" / "benchmarks"  # for logs and run folders
RESULT = "result "  # the beginning of a line in which an app prints its measurements as JSON


def federate(*options: str, clients: int = 0, terminals: int = 0) -> tuple[Result, list[str]]:
    """Run server.py with `options` and a number of clients; return its metrics.json and the clients' output.

    The clients are divided among so many `terminals`; by default, each has its own.
    """
    address = f"127.0.0.1:{free_port()}"
    where = ["--address", address, "--clients", str(clients)] if clients else []
    out = FOLDER / "ours"
    shutil.rmtree(out, ignore_errors=True)
    terminals = terminals or clients
    shares = [len(range(clients)[place::terminals]) for place in range(terminals)]
    joined = [["client.py", "--server", address, "--clients", str(share)] for share in shares]
    with programs(["server.py", "--out", str(out), *where, *options], *joined) as processes:
        outputs = wait_for(processes)
    return json.loads((out / "metrics.json").read_text("utf-8")), "".join(outputs[1:]).splitlines()


@contextmanager
def programs(*commands: list[str], **environment: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start Python programs of this project, which are stopped at the end of the context."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / program), *options],
            env=os.environ | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for program, *options in commands
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()


def wait_for(processes: list["subprocess.Popen[str]"]) -> list[str]:
    """Return the output of each process when all have ended. Raises LaunchError as soon as one fails."""
    outputs: dict[int, str] = {}
    while len(outputs) < len(processes):
        for place, process in enumerate(processes):
            if place not in outputs:
                with suppress(subprocess.TimeoutExpired):
                    outputs[place] = process.communicate(timeout=0.1)[0]
            if process.returncode:
                raise LaunchError((outputs[place].splitlines() or ["a program failed without a message"])[-1])
    return [outputs[place] for place in range(len(processes))]


def run_app(app: Path, config: dict[str, object], *, simulate: int = 0, supernodes: int = 0) -> tuple[Result, float]:
    """Run another Flower app like server.py runs its own, but with Flower's defaults for everything else.

    Returns the result that its ServerApp prints, and the seconds from the start of the SuperLink to that line.
    """
    started = time.perf_counter()
    with engine(app.name, bool(simulate), supernodes) as ours:
        for line in flwr_run(ours, app, config, simulate).stdout or ():
            ours.log.write(line)
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT)), time.perf_counter() - started
        raise LaunchError(f"{app.name}: {ours.last_error()}")


@contextmanager
def engine(name: str, simulation: bool, supernodes: int) -> Iterator[ProcessGroup]:
    """Start a SuperLink, called "ours" for `flwr run`, and SuperNodes, each in its own process group."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    host, port = "127.0.0.1", free_port()
    address = f"{host}:{port}"
    with ExitStack() as stack:
        environment = hide_tensorflow.environment()  # with it, as with the extra [keras], the app's PyTorch crashes
        ours = stack.enter_context(process_group(FOLDER / f"{name}.txt", environment, warm_starts=False))
        (ours.home / "config.toml").write_text(f'[superlink.ours]\naddress = "{address}"\ninsecure = true\n', "utf-8")
        superlink = start(
            ours, "flower-superlink", "--insecure", "--host", host, "--port", str(port),
            "--disable-runtime-dependency-installation", *(["--simulation"] if simulation else []),
        )  # fmt: skip
        while not is_up((host, port)):
            if superlink.poll() is not None:
                raise LaunchError(f"the SuperLink did not start: {ours.last_error()}")
            time.sleep(0.1)
        for number in range(supernodes):
            apart = stack.enter_context(process_group(FOLDER / f"{name}-{number}.txt", warm_starts=False))
            start(apart, "flower-supernode", "--insecure", "--superlink", address, "--port", str(free_port()))
        yield ours


def flwr_run(ours: ProcessGroup, app: Path, config: dict[str, object], simulate: int = 0) -> "subprocess.Popen[str]":
    """Submit an app to the SuperLink of `engine`, and stream what it prints."""
    settings = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    size = ["--federation-config", f"num-supernodes={simulate}"] if simulate else []
    return ours.start("flwr", "run", str(app), "ours", "--stream", "--run-config", settings, *size)


def start(ours: ProcessGroup, *command: str) -> "subprocess.Popen[str]":
    process = ours.start(*command)
    Thread(target=relay, args=(process, ours.log), daemon=True).start()
    return process
