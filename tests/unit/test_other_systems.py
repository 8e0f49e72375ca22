"""What Windows and macOS lack: every module can be imported there, and the commands are started without a fork."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from federation.launch import guard
from federation.launch.process_group import find_program
from tests.conftest import ROOT

LACKS = {  # by the name of the system in sys.platform
    "win32": {
        "os": ["fork", "getuid", "geteuid", "getsid", "mkfifo", "pidfd_open", "sched_getaffinity", "O_NOFOLLOW",
               "RTLD_DEEPBIND", "setsid", "killpg"],
        "signal": ["SIGBUS", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGPIPE", "SIGUSR1"],
        "socket": ["AF_UNIX", "send_fds", "recv_fds"],
        "sys": ["getdlopenflags", "setdlopenflags"],
        "modules": ["fcntl", "pty", "resource", "termios", "pwd", "grp"],
    },
    "darwin": {"os": ["pidfd_open", "sched_getaffinity", "RTLD_DEEPBIND"], "modules": []},
}  # fmt: skip
IMPORT_ALL = """
import importlib, json, pkgutil, signal, socket, sys, os
import flwr.app, flwr.clientapp, flwr.serverapp, flwr_datasets, httpx, uvicorn, starlette.routing, cryptography, psutil
import tqdm, torch, matplotlib.figure, typer, click, pydantic, filelock, threadpoolctl, asyncio, tempfile
platform, lacks = sys.argv[1], json.loads(sys.argv[2])
for module in lacks.pop("modules"):
    sys.modules[module] = None
for module, names in lacks.items():
    for name in names:
        vars(sys.modules[module]).pop(name, None)
sys.platform = platform
import federation
names = [one.name for one in pkgutil.walk_packages(federation.__path__, "federation.")]
for name in [*names, "client", "server"]:
    if name.rpartition(".")[2] not in ("stand_in", "sitecustomize"):
        importlib.import_module(name)
from federation.app.cores import cores
from federation.app.hide_tensorflow import from_workers
from federation.launch import command, limits, warm
from_workers()
command.catch_signals()
print(len(names), cores() > 0, limits.most_connections() > 0, warm.SUPPORTED)
"""


@pytest.mark.parametrize("platform", LACKS)
def test_modules_need_nothing_that_another_system_lacks(platform: str) -> None:
    command = [sys.executable, "-c", IMPORT_ALL, platform, json.dumps(LACKS[platform])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, *found = done.stdout.split()
    assert int(count) > 40 and found == ["True", "True", "False"]


def test_programs_are_found_on_the_path_of_the_processes(tmp_path: Path) -> None:
    suffix = ".bat" if sys.platform == "win32" else ""
    program = tmp_path / f"a-command{suffix}"
    program.write_text("")
    program.chmod(0o700)
    found = find_program(["a-command", "run"], {"PATH": str(tmp_path)})
    assert [found[0].lower(), *found[1:]] == [str(program).lower(), "run"]
    assert find_program(["no-command", "run"], {"PATH": str(tmp_path)}) == ["no-command", "run"]
    assert find_program([sys.executable], {"PATH": ""}) == [sys.executable]


def test_where_there_are_no_sessions_only_the_mark_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.getsid", raising=False)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeper, env={"A_MARK": "mine"}) as mine, subprocess.Popen(sleeper) as another:
        guard.kill_all("A_MARK", "mine")
        assert not psutil.pid_exists(mine.pid) and another.poll() is None
        another.kill()
