"""The archives of a release, and what they install: one package in site-packages; `federate` works from any folder."""

import re
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from subprocess import check_call, check_output

import pytest
from packaging.metadata import Metadata

from federation.app.config import defaults, version
from federation.launch.network import free_port
from tests.conftest import ROOT, Terminal, Terminals
from tests.processes import assert_all_gone, metrics_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its virtual environments have another layout")
PACKAGES = [folder for folder in sys.path if Path(folder).name == "site-packages"]
BUILD = "import sys; from poetry.core.masonry.api import build_{0} as build; print(build(sys.argv[1]))"
REFERENCE = ROOT / "docs" / "reference" / "models.md"
TASK = """
import torch
from cifar import Net, test, train

def load_data(root=None):
    x = torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = x[:, 0, 0, 0].long() % 10
    return (x[:40], y[:40]), (x[40:], y[40:])
"""


def build(kind: str, source: Path, to: Path) -> Path:
    """Build a "wheel" or an "sdist", with the means of `python -m build`."""
    command = [sys.executable, "-c", BUILD.format(kind), str(to)]
    return to / check_output(command, cwd=source, text=True).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    archive = build("sdist", ROOT, folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel that is built from the source archive."""
    return build("wheel", source, source.parent)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """Install the project into a virtual environment, which has the packages of this one, but not its checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    check_call([*pip, str(wheel)])
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


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a checkout knows which files it has")
def test_the_source_archive_has_every_file_of_the_checkout(source: Path) -> None:
    listed = check_output(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True)
    found = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert found - {"PKG-INFO"} == {name for name in listed.splitlines() if (ROOT / name).exists()}


def test_the_source_archive_builds_the_wheel_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    assert contents(wheel) == contents(build("wheel", ROOT, tmp_path))


def test_the_wheel_is_typed_and_has_the_licence_and_the_description(wheel: Path) -> None:
    files, name = contents(wheel), f"centralized_to_federated-{version()}.dist-info"
    metadata = Metadata.from_email(files[f"{name}/METADATA"], validate=True)
    assert "federation/py.typed" in files
    assert files[f"{name}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert metadata.license_expression == "Apache-2.0"
    assert (metadata.description or "").strip() == (ROOT / "README.md").read_text("utf-8").strip()


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
    [reading_a_run] = re.findall(r"```python\n(.*?)```", REFERENCE.read_text("utf-8"), re.DOTALL)
    (terminals.folder / "read.py").write_text(reading_a_run)
    commands = [
        "federate --version",
        "federate new my_task.py && federate check my_task",
        "federate check cifar.py --data embedded",
        "federate server --simulate 2 --data embedded --rounds 1",
        "python -E read.py",
    ]
    terminal = terminals.shell(f"{activated(environment)}; {' && '.join(commands)}", terminals.folder)
    assert terminal.wait(400) == 0, terminal.text
    assert f"federate {version()}\n" in terminal.text
    accuracy = metrics_of(terminals.folder)["rounds"][-1]["server_accuracy"]
    assert f"\n{accuracy} ['conv1.weight', 'conv1.bias'," in terminal.text
    assert all(f"{task} can be federated" in terminal.text for task in ("my_task", "cifar"))
    assert [row["clients"] for row in metrics_of(terminals.folder)["rounds"]] == [None, 2]
    assert_all_gone(terminals)
