"""What the benchmarks share: they run the project's own commands, and other Flower apps on the same engine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from federation import launch

Result = dict[str, Any]

RESULT = "result "  # a line that begins so holds, as JSON, what an app has measured


def federate(*options: str, clients: int = 0) -> tuple[Result, list[str]]:
    """Run server.py with `options` and so many client.py; return its metrics.json and the lines of the clients."""
    address = f"127.0.0.1:{launch.free_port()}"
    where = ["--address", address, "--clients", str(clients)] if clients else []
    with tempfile.TemporaryDirectory() as out:
        server, client = ["server.py", "--out", out, *where, *options], ["client.py", "--server", address]
        with programs(server, *[client] * clients) as processes:
            outputs = wait_for(processes)
        metrics = json.loads(Path(out, "metrics.json").read_text("utf-8"))
    return metrics, "".join(outputs[1:]).splitlines()


@contextmanager
def programs(*commands: list[str], **environment: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start Python programs of this project; they have ended when the context does."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(launch.ROOT / program), *options],
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
    """Return what each process has printed, once all have ended. Raises LaunchError as soon as one has failed."""
    outputs: dict[int, str] = {}
    while len(outputs) < len(processes):
        for place, process in enumerate(processes):
            if place not in outputs:
                with suppress(subprocess.TimeoutExpired):
                    outputs[place] = process.communicate(timeout=0.1)[0]
            if process.returncode:
                raise launch.LaunchError((outputs[place].splitlines() or ["a program failed, and printed nothing"])[-1])
    return [outputs[place] for place in range(len(processes))]


def run_app(app: Path, config: dict[str, object], *, simulate: int = 0, supernodes: int = 0) -> tuple[Result, float]:
    """Run another Flower app as server.py runs its own, but with all else as Flower has it.

    Returns the result that its ServerApp prints, and the seconds from the start of the SuperLink to that line.
    """
    started = time.perf_counter()
    address = f"127.0.0.1:{launch.free_port()}"
    with ExitStack() as stack:
        ours = stack.enter_context(launch.session())
        start_superlink(ours, address, ["--simulation"] if simulate else [])
        for _ in range(supernodes):
            start_supernode(stack.enter_context(launch.session()), address)
        (ours.home / "config.toml").write_text(f'[superlink.ours]\naddress = "{address}"\ninsecure = true\n', "utf-8")
        settings = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        size = ["--federation-config", f"num-supernodes={simulate}"] if simulate else []
        run = ours.start("flwr", "run", str(app), "ours", "--stream", "--run-config", settings, *size)
        for line in run.stdout or ():
            ours.log.write(line)
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT)), time.perf_counter() - started
        raise launch.LaunchError(f"{app.name}: {ours.last_error()}")


def start_superlink(ours: launch.Session, address: str, options: list[str]) -> None:
    host, port = launch.address(address)
    superlink = ours.start(
        "flower-superlink", "--insecure", "--host", host, "--port", str(port),
        "--disable-runtime-dependency-installation", *options,
    )  # fmt: skip
    Thread(target=launch.relay, args=(superlink, ours.log), daemon=True).start()
    while not launch.is_up(host, port):
        if superlink.poll() is not None:
            raise launch.LaunchError(f"the SuperLink did not start: {ours.last_error()}")
        time.sleep(0.1)


def start_supernode(ours: launch.Session, address: str) -> None:
    port = str(launch.free_port())
    supernode = ours.start("flower-supernode", "--insecure", "--superlink", address, "--port", port)
    Thread(target=launch.relay, args=(supernode, ours.log), daemon=True).start()
