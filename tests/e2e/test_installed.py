"""`pip install` without a checkout: one package in site-packages, and `federate` works from any folder."""

import sys
import venv
from importlib.metadata import distribution
from pathlib import Path
from subprocess import check_call, check_output

import pytest

from federation.app.config import defaults
from federation.launch.network import free_port
from tests.conftest import ROOT, Terminal, Terminals
from tests.processes import assert_all_gone, metrics_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its virtual environments have another layout")
PACKAGES = [folder for folder in sys.path if Path(folder).name == "site-packages"]
BUILD = "import sys; from poetry.core.masonry.api import build_wheel; print(build_wheel(sys.argv[1]))"
TASK = """
import torch
from cifar import Net, test, train

def load_data(root=None):
    x = torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = x[:, 0, 0, 0].long() % 10
    return (x[:40], y[:40]), (x[40:], y[40:])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the project into a virtual environment, which has the packages of this one, but not its checkout."""
    folder, wheels = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("wheels")
    venv.create(folder)
    wheel = check_output([sys.executable, "-c", BUILD, str(wheels)], cwd=ROOT, text=True).splitlines()[-1]
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    check_call([*pip, str(wheels / wheel)])
    (site_packages(folder) / "packages.pth").write_text("\n".join(PACKAGES))
    for command in distribution("flwr").entry_points.select(group="console_scripts"):
        script = folder / "bin" / command.name
        script.write_text(f"#!{python}\nfrom {command.module} import {command.attr}\n{command.attr}()\n")
        script.chmod(0o700)
    return folder


def site_packages(environment: Path) -> Path:
    [folder] = environment.glob("lib/*/site-packages")
    return folder


def activated(environment: Path) -> str:
    return f"unset PYTHONPATH; PATH={environment}/bin:$PATH"


def test_one_package_goes_into_site_packages(environment: Path) -> None:
    names = {path.name for path in site_packages(environment).iterdir() if path.suffix not in (".dist-info", ".pth")}
    assert names == {"federation"}
    scripts = {path.name for path in (site_packages(environment) / "federation" / "scripts").glob("*.*")}
    assert scripts == {"pyproject.toml", "client.py", "server.py", *(path.name for path in ROOT.glob("cifar*.py"))}


def test_it_has_the_defaults_of_the_checkout(environment: Path, tmp_path: Path) -> None:
    code = "import federation.app.config as config; print(config.__file__, config.defaults())"
    printed = check_output([environment / "bin" / "python", "-Ec", code], cwd=tmp_path, text=True)
    assert printed == f"{site_packages(environment) / 'federation' / 'app' / 'config.py'} {defaults()}\n"


@pytest.mark.slow
def test_a_script_that_uses_ours_reaches_a_client_in_an_empty_folder(terminals: Terminals, environment: Path) -> None:
    here, there = terminals.folder / "here", terminals.folder / "there"
    here.mkdir()
    there.mkdir()
    (here / "my_script.py").write_text(TASK)
    address = f"127.0.0.1:{free_port()}"

    def typed(command: str, folder: Path) -> Terminal:
        return terminals.shell(f"{activated(environment)}; {command}", folder)

    server = typed(f"federate server --task my_script.py --clients 1 --rounds 1 --address {address}", here)
    client = typed(f"federate client --server {address} --threads 1", there)
    assert server.wait() == client.wait(30) == 0, server.text + client.text
    assert "trained on 40 samples" in client.text
    assert metrics_of(here)["status"] == "finished" and list(there.iterdir()) == []
    assert_all_gone(terminals)


@pytest.mark.slow
def test_the_default_task_and_the_skeleton_are_installed_too(terminals: Terminals, environment: Path) -> None:
    commands = [
        "federate new my_task.py && federate check my_task",
        "federate check cifar.py --data embedded",
        "federate server --simulate 2 --data embedded --rounds 1",
    ]
    terminal = terminals.shell(f"{activated(environment)}; {' && '.join(commands)}", terminals.folder)
    assert terminal.wait(400) == 0, terminal.text
    assert all(f"{task} can be federated" in terminal.text for task in ("my_task", "cifar"))
    assert [row["clients"] for row in metrics_of(terminals.folder)["rounds"]] == [None, 2]
    assert_all_gone(terminals)
