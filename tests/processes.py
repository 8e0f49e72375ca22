"""What tests of processes share: looking at a run and its processes, and the same run undisturbed."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, RecordDict

import server
from federation.app.config import Settings
from federation.app.console import FOLDER
from tests.conftest import Terminal, Terminals, eventually
from tests.in_memory import InMemoryGrid

SETTINGS: Settings = {"num-server-rounds": 3, "seed": 3, "partitioner": "size-skewed"}


def metrics_of(folder: Path) -> dict[str, Any]:
    """Return what a run has reported: in a run folder, or in the usual one below `folder`."""
    usual = folder / "runs" / "federated"
    return json.loads(((usual if usual.is_dir() else folder) / "metrics.json").read_text())


def named(processes: list[psutil.Process], text: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [process] if text in " ".join(process.cmdline()) else []
    return found


def assert_all_gone(terminals: Terminals) -> None:
    eventually(lambda: terminals.processes() == [] and terminals.leftovers() == [], 2)


def undisturbed(folder: Path, config: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the SHA-256 of the final weights of the same run in one process, in which nobody is killed."""
    monkeypatch.setitem(os.environ, FOLDER, str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    config = config | {"task": "tiny", "out": str(folder / "undisturbed")}
    server.main(InMemoryGrid(config, {1: {}, 2: {}}), Context(1, 0, {}, RecordDict(), config))
    return str(metrics_of(folder / "undisturbed")["final_weights_sha256"])


def as_text(config: Settings) -> str:
    return " ".join(f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}" for key, value in config.items())


def client(terminals: Terminals, port: int, tls: Path | None = None, host: str = "127.0.0.1") -> Terminal:
    options = ("--tls", str(tls)) if tls else ()
    return terminals.open("client.py", "--server", f"{host}:{port}", "--threads", "1", *options)
