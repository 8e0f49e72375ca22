"""`federate`: the commands of the project behind one door, with help, completion and errors in one line."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from federation import __main__ as federate
from federation.app.config import defaults
from federation.launch import client_command, host, join, server_command
from tests.conftest import ROOT

Failed = Callable[..., tuple[int, str]]
SHORT = {"--rounds": "num-server-rounds", "--clients": "num-clients", "--task": "task", "--out": "out"}
PYTHON = {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def shown(*line: str, **environment: str) -> str:
    """Run `federate` in a process of its own, and return what it prints. It must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "federation", *line],
        env=os.environ | PYTHON | environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


# ------------------------------------------------------------------------------------------------------------- help


def test_without_a_command_it_shows_all_of_them() -> None:
    commands = shown().partition("Commands:")[2]
    assert commands == shown("--help").partition("Commands:")[2]
    assert re.findall(r"^  (\w+) +[A-Z].*\.$", commands, re.M) == [
        "server", "client", "new", "check", "compare", "predict", "export", "certificates",
    ]  # fmt: skip


def test_the_help_of_the_server_names_the_defaults_of_the_run_config() -> None:
    help = shown("server", "--help")
    named = dict(re.findall(r"(--\w+) .*\(default: (.*)\)", help))
    assert {option: named[option] for option in SHORT} == {name: str(defaults()[key]) for name, key in SHORT.items()}
    assert "federate server --task my_script --simulate 10\n" in help


def test_a_script_and_federate_have_the_same_help_under_their_own_names() -> None:
    script = subprocess.run([sys.executable, ROOT / "client.py", "--help"], capture_output=True, text=True, check=True)
    help = shown("client", "--help", COLUMNS="80")
    assert "federate client --server HOST:8080" in help
    usage, example = ("federate client [", "client.py ["), ("federate client", "python client.py")
    assert script.stdout == help.replace(*usage).replace(*example)


def test_help_and_completion_do_not_wait_for_flower() -> None:
    code = "import sys, federation.__main__; print({'flwr', 'numpy', 'torch', 'pydantic'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


# ------------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("federate ser", ["server"]),
        ("federate c", ["client", "check", "compare", "certificates"]),
        ("federate server --ro", ["--rounds"]),
        ("federate server --task my_script --re", ["--resume"]),
        ("federate certificates keys --cl", ["--client"]),
    ],
)
def test_shells_ask_it_how_to_go_on(typed: str, offered: list[str]) -> None:
    asked = {"_FEDERATE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert shown(**asked).split() == offered


@pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="there is no bash here")
def test_bash_completes_it_with_the_script_that_it_shows(tmp_path: Path) -> None:
    command = tmp_path / "federate"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m federation "$@"\n')
    command.chmod(0o700)
    completion = shown("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    typed = "COMP_WORDS=(federate server --ro) COMP_CWORD=2"
    ask = '$(complete -p federate | grep -o "_federate[a-z_]*") federate; echo "${COMPREPLY[@]}"'
    script = f"{completion}\n{typed}\n{ask}"
    environment = os.environ | PYTHON | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.check_output(["bash", "-c", script], env=environment, text=True) == "--rounds\n"


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serve", "federate: error: No such command 'serve'"),
        ("server --rounds three", "federate server: error: Invalid value for '--rounds': 'three' is not a valid int"),
        ("server --colour red", "federate server: error: No such option"),
        ("server --run-config colour=1", "federate server: error: run config has no key 'colour'; its keys are: task"),
        ("client --server nowhere", "federate client: error: Invalid value for '--server': 'nowhere' is not HOST:PORT"),
        ("client --partition-id 0", "federate client: error: --partition-id and --num-partitions go together"),
        ("check", "federate check: error: Missing argument 'SCRIPT'"),
        ("compare --quick --seeds 0", "federate compare: error: --seeds 0: 1 or more is needed"),
        (
            "certificates keys --client berlin",
            "federate certificates: error: keys has no certificate authority yet",
        ),
        ("certificates", "federate certificates: error: Missing argument 'FOLDER'"),
    ],
)
def test_misuse_is_one_line_with_the_name_of_the_command(failed: Failed, line: str, said: str) -> None:
    status, errors = failed(federate.main, "federate", *line.split())
    assert (status, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(said)


def test_a_failure_is_one_line_with_the_name_of_the_command(failed: Failed) -> None:
    said = "federate client: --data ./none: there is no such file or folder\n"
    assert failed(federate.main, "federate", "client", "--data", "./none") == (1, said)


# ------------------------------------------------------------------------------------------------------- both doors


@pytest.mark.parametrize("door", ["federate", "python"])
def test_both_doors_lead_to_the_same_run(
    failed: Failed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    hosted, joined = [], []
    monkeypatch.setattr(host, "host_run", lambda *given: hosted.append(given) or 0)
    monkeypatch.setattr(join, "join_run", lambda *given: joined.append(given) or 0)
    options = (
        "--simulate",
        "3",
        "--run-config",
        "seed=4",
        "batch-size=8",
        "--run-config",
        "alpha=0.25",
        "--rounds",
        "7",
    )
    line = ("--server", "[::1]:9", "--wait", "2", "--partition-id", "0", "--num-partitions", "2")
    if door == "federate":
        ended = failed(federate.main, door, "server", *options), failed(federate.main, door, "client", *line)
    else:
        ended = failed(server_command.main, "server.py", *options), failed(client_command.main, "client.py", *line)
    assert ended == ((0, ""), (0, ""))
    [(_, config, nodes, tls)] = hosted
    assert (config.num_clients, config.num_server_rounds, config.seed, config.batch_size, config.alpha) == (
        3,
        7,
        4,
        8,
        0.25,
    )
    assert nodes["num-supernodes"] <= 3 and tls is None and config.out == str(tmp_path / "runs" / "federated")
    settings = {"clients": 1, "own-data": False, "partition-id": 0, "num-partitions": 2}
    settings["state"] = str(Path.cwd() / "runs" / "client-state")
    assert joined == [(("::1", 9), 2.0, settings, None, None)]
