"""Running the project's commands as a user would, in a clean home, and seeing that nothing of them is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from federation.app.cores import THREADS

if "PYTEST_XDIST_WORKER" in os.environ:  # which shares the cores with others: more threads would wait for one another
    for variable in THREADS:
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # they take longer than what tests then compute
USUAL = os.environ.copy()  # the environment of commands
with suppress(ImportError):
    import triton  # noqa: F401  (PyTorch does so at its first optimizer, and crashes if TensorFlow is loaded by then)

ROOT = Path(__file__).resolve().parents[1]
TAG = "FEDERATION_TEST"
if sys.platform == "win32":  # of the rest, these need what it lacks: signals, sessions, modes of files, scripts for sh
    collect_ignore = ["e2e", "integration/test_survival.py", "integration/test_limits.py", "integration/test_killed.py"]
    collect_ignore += ["integration/test_isolation.py", "unit/test_place.py", "unit/test_key_registry.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ladder", "the equivalence ladder, tests/evidence/test_ladder.py")
    group.addoption("--task", default="cifar", metavar="MODULE", help="the script to climb it (default: cifar)")
    group.addoption("--data", default="", metavar="DIR", help="its data folder (default: the script's own choice)")
    group.addoption("--gpu", action="store_true", help="let it use a GPU, which it must make deterministic")


def _take_interrupts() -> None:
    """Let Ctrl-C and SIGHUP reach a command, even if the shell that runs the tests, or nohup, has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


take_interrupts = None if sys.platform == "win32" else _take_interrupts


class Terminal:
    """A command that runs in a terminal of its own: what it prints goes to a file, and can be waited for."""

    def __init__(self, arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
        self.output = folder / f"{uuid.uuid4().hex[:8]}.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                arguments, cwd=environment["PWD"], env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=take_interrupts,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait(self, timeout: float = 240) -> int:
        """Return the exit status; a command that does not end is an error that tells what it had printed."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    def wait_for(self, text: str, timeout: float = 240) -> None:
        eventually(lambda: text in self.text or self.process.poll() is not None, timeout)
        assert text in self.text, self.text

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


def eventually(condition: Callable[[], object], timeout: float) -> None:
    """Wait until `condition` holds; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


class Terminals:
    """All terminals of one test. They share a home folder, and a tag that their processes inherit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tag = folder, uuid.uuid4().hex
        self.temporary = Path(tempfile.mkdtemp(prefix="ft-", dir=None if sys.platform == "win32" else "/tmp"))
        self.environment = USUAL | {
            TAG: self.tag,
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "home" / "cache"),
            "TMPDIR": str(self.temporary),
            "PWD": str(folder),
            "http_proxy": "http://127.0.0.1:9",  # nothing can be downloaded
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1,localhost,::1",
        }
        (folder / "home").mkdir()

    def open(self, *arguments: str, **environment: str) -> Terminal:
        script = (str(ROOT / arguments[0]), *arguments[1:]) if arguments[0].endswith(".py") else arguments
        return Terminal((sys.executable, *script), self.folder, self.environment | environment)

    def shell(self, command: str, folder: Path, **environment: str) -> Terminal:
        """Type a command into a shell in `folder`, in which `python` and `flwr` are those that run the tests."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PWD": str(folder), "PATH": path} | environment
        return Terminal(("bash", "-c", command), self.folder, self.environment | environment)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a command to its end; return its exit status and output."""
        terminal = self.open(*arguments, **environment)
        return terminal.wait(), terminal.text

    def processes(self) -> list[psutil.Process]:
        """Return all living processes that a command of this test has started, however far down."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(TAG) == self.tag and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False

    def leftovers(self) -> list[str]:
        """Return what of the terminals' session folders is left in the temporary folder."""
        return [path.name for path in self.temporary.glob("federation-*") if "clients" not in path.name]

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command which must fail, and returns its exit status and its errors.

    The command is a function that is called in this process: one of its own would take seconds to import what it needs.
    """
    monkeypatch.chdir(tmp_path)

    def failed(command: Callable[[], object], *line: str) -> tuple[int, str]:
        handler = signal.getsignal(signal.SIGTERM)
        with patch.object(sys, "argv", [*line]), patch.object(sys, "path", sys.path[:]), patch.dict(os.environ):
            with pytest.raises(SystemExit) as end:
                command()
            signal.signal(signal.SIGTERM, handler)
        said = f"{end.value.code}\n" if isinstance(end.value.code, str) else ""
        return 1 if said else int(end.value.code or 0), capsys.readouterr().err + said

    return failed


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a script's main with a command line, and returns what it prints."""

    def run_main(main: Callable[[], object], *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["study.py", *options])
        main()
        return capsys.readouterr().out

    return run_main


@pytest.fixture(scope="module", name="in_a_run")
def in_a_run_fixture() -> Iterator[None]:
    from tests.in_memory import in_a_run

    with in_a_run():
        yield


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    ours = Terminals(tmp_path)
    yield ours
    ours.close()


@pytest.fixture(scope="module")
def module_terminals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    ours = Terminals(tmp_path_factory.mktemp("module"))
    yield ours
    ours.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def keys(terminals: Terminals) -> Path:
    """Make an authority, a server's certificate and the keys of three clients, by the documented command."""
    folder = terminals.folder / "keys"
    names = ["--server", "localhost", "--client", "berlin", "paris", "rome"]
    subprocess.run([sys.executable, "-m", "federation.certificates", folder, *names], cwd=ROOT, check=True)
    from tests.tasks import TINY_NUMPY

    (terminals.folder / "tiny.py").write_text(TINY_NUMPY)
    return folder
