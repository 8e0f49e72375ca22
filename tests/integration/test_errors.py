"""Errors of server.py and client.py: one line that names thing and value, the right status, nothing left behind."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_private_key

import cifar
import cifar_data
from federation.app import weights
from federation.app.checkpoint import save_checkpoint
from federation.app.config import RunConfig, validate
from federation.app.run_folder import lock_run_folder
from federation.launch import client_command, host, join, network, prepare, server_command
from federation.launch.command_line import run_script
from federation.launch.network import free_port
from federation.security.certificates import make_authority, make_client, make_server
from tests.conftest import ROOT, Terminals
from tests.tasks import TINY

Command = Callable[..., tuple[int, str]]
CHECKPOINT = "checkpoint-1.npz"  # of a run that has been interrupted after its first round


@pytest.fixture
def port() -> Iterator[int]:
    """Return a port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Return a function that runs a program in this process, up to where a server or client would begin its work.

    That fails the test. All that comes before it is a SuperLink, which nobody can reach yet; here it is not started.
    """

    def start(*line: str) -> None:
        assert line[0] == "flower-superlink", "it went on to start processes"

    def popen(*line: str, **_: object) -> SimpleNamespace:
        *_, config, report = line
        monkeypatch.setattr("sys.argv", ["prepare", config, report])
        prepare.main()
        return SimpleNamespace(poll=lambda: 0)

    @contextmanager
    def process_group(*_: object, **__: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(
            home=tmp_path, start=start, popen=popen, open_console=lambda: None, expect=lambda modules, at_once: None
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar_data, "DATA_DIR", tmp_path / "cache" / "cifar10")
    monkeypatch.setattr(host, "process_group", process_group)
    monkeypatch.setattr(host, "await_server", lambda *_: pytest.fail("it went on to serve"))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing can be downloaded
    handler = signal.getsignal(signal.SIGTERM)

    def command(name: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            run_script({"server.py": server_command.server, "client.py": client_command.client}[name])
        code = end.value.code
        said = code + "\n" if isinstance(code, str) else ""
        return 1 if said else int(code or 0), capsys.readouterr().err + said

    yield command
    signal.signal(signal.SIGTERM, handler)


def check(outcome: tuple[int, str], status: int, name: str, *named: str) -> None:
    """Check that a program ended with `status`, and its last line names what it should."""
    assert outcome[0] == status, outcome[1]
    *before, last = outcome[1].splitlines()
    assert last.startswith(f"{name}: ") and all(text in last for text in named), outcome[1]
    assert "Traceback" not in outcome[1]
    assert [line for line in before if not line.startswith(("WARNING: ", "watch it at "))] == [], (
        "one line, and no more"
    )


# ------------------------------------------------------------------------------------------------ the server's line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--run-config", "rounds=3"], ["'rounds'", "num-server-rounds"]),
        (["--run-config", "num-server-rounds=3 colour=1"], ["'colour'"]),
        (["--run-config", "seed 3"], ["'seed 3'", "key=value"]),
        (["--run-config", "none.toml"], ["none.toml", "No such file"]),
        (["--run-config", 'num-server-rounds="3"'], ["num-server-rounds='3'", "int"]),
        (["--run-config", "num-server-rounds=2.5"], ["num-server-rounds=2.5", "int"]),
        (["--run-config", "batch-size=true"], ["batch-size=True", "int"]),
        (["--run-config", 'learning-rate="fast"'], ["learning-rate='fast'", "float"]),
        (["--run-config", "task=3"], ["task=3", "str"]),
        (["--rounds", "0"], ["num-server-rounds=0", "1 to"]),
        (["--rounds", "-1"], ["num-server-rounds=-1", "1 to"]),
        (["--rounds", "three"], ["--rounds", "'three'"]),
        (["--clients", "0"], ["num-clients=0", "1 to"]),
        (["--clients", "1000000"], ["num-clients=1000000", "100000"]),
        (["--run-config", "batch-size=0"], ["batch-size=0", "1 to"]),
        (["--run-config", "learning-rate=-0.1"], ["learning-rate=-0.1", "0 to"]),
        (["--run-config", "learning-rate=nan"], ["learning-rate=nan", "0 to"]),
        (["--run-config", "fraction-train=0"], ["fraction-train=0", "to 1"]),
        (["--run-config", "fraction-train=1.5"], ["fraction-train=1.5", "to 1"]),
        (["--run-config", "seed=-1"], ["seed=-1", "0 to"]),
        (["--run-config", "seed=1", "--run-config", "batch-size=0"], ["batch-size=0"]),
        (
            ["--run-config", "partitioner='foo'"],
            ["partitioner='foo'", "iid, dirichlet, inner-dirichlet, pathological"],
        ),
        (["--run-config", "alpha=0"], ["alpha=0", "0.001 to"]),
        (["--run-config", "strategy='foo'"], ["strategy='foo'", "fedavg, fedprox, scaffold"]),
        (["--run-config", "strategy='foo bar'"], ["strategy='foo bar'", "dotted name"]),
        (["--run-config", "strategy='fedadam' strategy-arguments='beta_1=1.0'"], ["beta_1=1.0", "0 to 0.999999"]),
        (["--run-config", "strategy='fedadam' strategy-arguments='tau=0'"], ["tau=0", "1e-12 to"]),
        (["--run-config", "strategy='fedavgm' strategy-arguments='q=1'"], ["no q", "server_learning_rate, server_m"]),
        (["--run-config", "strategy='krum'"], ["strategy=krum needs 5 clients", "2"]),
        (["--run-config", "strategy='bulyan' num-clients=6"], ["strategy=bulyan needs 7 clients", "6"]),
        (["--run-config", "strategy='qfedavg'"], ["strategy=qfedavg", "learning-rate"]),
        (["--run-config", "topology='ring' strategy='krum'"], ["topology=ring", "strategy=fedavg"]),
        (["--run-config", "personal='fc3.*' strategy='scaffold'"], ["strategy=scaffold", "personal"]),
        (["--run-config", "dp='server-fixed' strategy='krum'"], ["dp=server-fixed", "strategy=fedavg"]),
        (["--run-config", "compression='int8'"], ["compression=int8", "upload=delta"]),
        (["--run-config", "learning-rate-schedule='cosine'"], ["learning-rate-schedule=cosine", "learning-rate"]),
        (["--run-config", "clients-per-round=3"], ["clients-per-round=3", "num-clients"]),
        (["--run-config", "local-steps=3 local-epochs=2"], ["local-steps=3", "local-epochs"]),
        (["--run-config", "min-clients=3"], ["min-clients=3", "num-clients=2"]),
        (["--run-config", "retries=-1"], ["retries=-1", "0 to"]),
        (["--run-config", "labels-per-client=0"], ["labels-per-client=0", "1 to"]),
        (["--run-config", "resume=1"], ["resume=1", "bool"]),
        (["--resume"], ["cannot resume runs/federated", "no checkpoint", "without --resume"]),
        (["--run-config", "resume=true out='elsewhere'"], ["cannot resume elsewhere: it has no checkpoint"]),
        (["--initial", "none.npz"], ["initial=none.npz", "no such file"]),
        (
            ["--simulate", "2", "--initial", "none.npz", "--run-config", "server-evaluation=false"],
            ["initial=none.npz", "reads no data", "set server-evaluation=true"],
        ),
        (["--simulate", "0"], ["--simulate 0: 1 client or more"]),
        (["--simulate", "-2"], ["--simulate -2: 1 client or more"]),
        (["--simulate", "2", "--clients", "2"], ["--simulate", "--clients"]),
        (["--gpus-per-client", "0.5"], ["--gpus-per-client", "go with --simulate"]),
        (["--federation-config", "backend='ray'"], ["--federation-config", "go with --simulate"]),
        (["--simulate", "2", "--gpus-per-client", "99"], ["--gpus-per-client 99: this machine has"]),
        (["--simulate", "2", "--gpus-per-client", "half"], ["--gpus-per-client", "'half'"]),
        (["--simulate", "2", "--federation-config", "nonsense"], ["--federation-config 'nonsense'", "key=value"]),
        (["--simulate", "2", "--federation-config", "nodes=2"], ["no setting 'nodes'", "num-supernodes"]),
        (["--simulate", "2", "--federation-config", "num-supernodes=0"], ["num-supernodes=0", "1 or more"]),
        (["--simulate", "2", "--federation-config", "num-supernodes='x'"], ["num-supernodes='x'", "1 or more"]),
        (["--simulate", "2", "--federation-config", "init-args-num-cpus=1.5"], ["init-args-num-cpus=1.5"]),
        (["--simulate", "2", "--clients", "0"], ["--clients"]),
        (["--simulate", "2", "--address", "127.0.0.1:8080"], ["--simulate", "--address"]),
        (["--address", "0.0.0.0:8080"], ["--address 0.0.0.0:8080", "--tls DIR", "--insecure"]),
        (["--address", "[::]:8080"], ["--address [::]:8080", "--tls DIR", "--insecure"]),
        (["--colour", "red"], ["--colour"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_server_refuses_a_wrong_line(command: Command, arguments: list[str], named: list[str], tmp_path: Path) -> None:
    check(command("server.py", *arguments), 2, "server.py", *named)
    assert list(tmp_path.iterdir()) == [], "nothing is made before the line is understood"


@pytest.mark.parametrize(
    ("name", "option"), [("server.py", "--address"), ("client.py", "--server")], ids=["server", "client"]
)
@pytest.mark.parametrize(
    "address",
    ["8080", ":8080", "localhost", "localhost:", "localhost:0", "localhost:65536", "localhost:-1", "localhost:http",
     "http://localhost:8080", "[::1]", "local host:8080", ""],
)  # fmt: skip
def test_a_bad_address_is_refused(command: Command, name: str, option: str, address: str) -> None:
    check(command(name, option, address), 2, name, option, repr(address), "HOST:PORT")


# --------------------------------------------------------------------------------------------- keys and certificates


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Make a server's folder, and in it the one of a client, for --tls."""
    folder = tmp_path / "keys"
    make_authority(folder)
    make_server(folder, ["localhost"])
    make_client(folder, "berlin")
    return folder


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--insecure"], ["--insecure", "--tls", "exclude"]),
        (["--simulate", "2"], ["--simulate", "--tls"]),
    ],
    ids=["insecure", "simulate"],
)
def test_options_that_exclude_tls_are_refused(
    command: Command, keys: Path, arguments: list[str], named: list[str]
) -> None:
    check(command("server.py", "--tls", str(keys), *arguments), 2, "server.py", *named)


def expired(keys: Path) -> None:
    make_server(keys, ["localhost"], days=-1)


def of_another_certificate(keys: Path) -> None:
    private = (keys / "server.key").read_bytes()
    make_server(keys, ["localhost"])
    (keys / "server.key").write_bytes(private)


def damaged(name: str) -> Callable[[Path], object]:
    return lambda keys: (keys / name).write_bytes((keys / name).read_bytes()[:-200])


def missing(name: str) -> Callable[[Path], object]:
    return lambda keys: (keys / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (shutil.rmtree, ["ca.crt", "No such file"]),
        (missing("ca.crt"), ["ca.crt", "No such file"]),
        (damaged("ca.crt"), ["ca.crt", "is not the certificate of an authority"]),
        (missing("server.crt"), ["server.crt", "No such file"]),
        (missing("server.key"), ["server.key", "No such file"]),
        (damaged("server.crt"), ["server.crt", "PEM"]),
        (damaged("server.key"), ["server.key", "PEM"]),
        (of_another_certificate, ["server.key", "KEY_VALUES_MISMATCH"]),
        (expired, ["server.crt", "expired on 20"]),
    ],
    ids=["no folder", "no ca.crt", "damaged ca.crt", "no server.crt", "no server.key", "damaged server.crt",
         "damaged server.key", "another key", "expired"],
)  # fmt: skip
def test_server_names_what_is_wrong_with_its_certificate(
    command: Command, keys: Path, spoil: Callable[[Path], object], named: list[str], tmp_path: Path
) -> None:
    spoil(keys)
    outcome = command("server.py", "--address", "0.0.0.0:8080", "--tls", "keys")
    check(outcome, 2, "server.py", "--tls", str(keys), *named)
    assert not (tmp_path / "runs").exists()


def rewritten(
    private: PrivateKeyTypes | None = None, form: PrivateFormat = PrivateFormat.OpenSSH
) -> Callable[[Path], object]:
    """Return a function that replaces a client's key: by another one, or in another form."""

    def rewrite(keys: Path) -> None:
        path = keys / "client.key"
        key = private or load_ssh_private_key(path.read_bytes(), None)
        path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))

    return rewrite


def encrypted(keys: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", keys / "client.key"], check=True)


needs_ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen encrypts the key")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (shutil.rmtree, ["ca.crt", "No such file"]),
        (missing("ca.crt"), ["ca.crt", "No such file"]),
        (damaged("ca.crt"), ["ca.crt", "is not the certificate of an authority"]),
        (damaged("client.key"), ["client.key", "OpenSSH's format"]),
        (rewritten(form=PrivateFormat.PKCS8), ["client.key", "OpenSSH's format"]),
        (rewritten(form=PrivateFormat.TraditionalOpenSSL), ["client.key", "OpenSSH's format"]),
        pytest.param(encrypted, ["client.key", "password"], marks=needs_ssh_keygen),
        (rewritten(ed25519.Ed25519PrivateKey.generate()), ["client.key", "ssh-keygen -t ecdsa -b 384"]),
    ],
    ids=["no folder", "no ca.crt", "damaged ca.crt", "damaged key", "PKCS8", "PEM", "encrypted", "ed25519"],
)
def test_client_names_what_is_wrong_with_its_key(
    command: Command, keys: Path, spoil: Callable[[Path], object], named: list[str]
) -> None:
    spoil(keys / "berlin")
    check(command("client.py", "--tls", "keys/berlin"), 2, "client.py", "--tls", str(keys / "berlin"), *named)


@pytest.mark.parametrize("folder", ["keys", "keys/berlin"], ids=["the server's folder, which has no key", "its own"])
def test_client_accepts_good_keys(command: Command, keys: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    joined: list[object] = []
    monkeypatch.setattr(join, "join_run", lambda *arguments: joined.append(arguments[-1]) or 0)
    assert command("client.py", "--tls", folder)[0] == 0
    assert joined == [keys.parent / folder]


@pytest.mark.parametrize(
    ("options", "address", "warned"),
    [
        ([], "127.0.0.1", False),
        (["--tls", "keys"], "127.0.0.1", False),
        (["--tls", "keys"], "0.0.0.0", False),
        (["--insecure"], "0.0.0.0", True),
        (["--insecure"], "127.0.0.1", False),
    ],
    ids=["this machine", "this machine, TLS", "TLS", "insecure", "this machine, insecure"],
)
def test_other_machines_may_connect_with_tls_or_after_a_warning(
    monkeypatch: pytest.MonkeyPatch, command: Command, keys: Path, options: list[str], address: str, warned: bool
) -> None:
    hosted: list[tuple[object, object]] = []
    monkeypatch.setattr(
        host,
        "host_run",
        lambda address, config, simulated, tls: hosted.append((address, tls)) or 0,
    )
    said: list[str] = []
    monkeypatch.setattr(network, "say", said.append)
    port = free_port()
    assert command("server.py", "--data", "embedded", "--address", f"{address}:{port}", *options)[0] == 0
    assert hosted == [((address, port), keys if "--tls" in options else None)]
    assert said == [f"WARNING: {address}:{port} is open to everyone who can connect, without TLS"] * warned


# ------------------------------------------------------------------------------------------- the server's surroundings


def test_server_names_a_data_folder_that_is_missing(command: Command, tmp_path: Path) -> None:
    check(command("server.py", "--data", "nowhere"), 1, "server.py", str(tmp_path / "nowhere"), "does not exist")


def test_server_names_a_data_folder_that_is_empty(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(command("server.py", "--data", "empty"), 1, "server.py", str(tmp_path / "empty"), "train/")


def test_server_names_a_run_folder_that_cannot_be_written(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    check(command("server.py", "--data", "embedded", "--out", str(out)), 1, "server.py", str(out), "--out")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_server_names_a_run_folder_that_is_there_and_cannot_be_written(command: Command) -> None:
    check(command("server.py", "--data", "embedded", "--out", "/proc"), 1, "server.py", "/proc", "--out")


@pytest.mark.parametrize(("task", "name"), [("no_such_task",) * 2, ("nested/none.py", "nested.none")])
def test_server_names_a_task_that_is_not_there(command: Command, task: str, name: str) -> None:
    check(command("server.py", "--task", task), 1, "server.py", name, "cannot be imported")


def test_server_names_the_folder_of_a_task_that_is_elsewhere(command: Command) -> None:
    check(command("server.py", "--task", "/home/flowers.py"), 2, "server.py", "/home/flowers.py", "its name, flowers")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train-arguments='momentun=0.5'", "tiny.train() takes no momentun; what can be set: "),
        ("train-arguments='momentum=true'", "momentum=True should be of type float"),
        ("partitioner='by-column'", "the data have no groups: load_data() should return (x, y, groups)"),
        (
            "best-metric='server_recall'",
            "there is no such metric; there are train_loss, clients_loss, clients_accuracy",
        ),
        ("server-evaluation=false best-metric='server_accuracy'", "there is no such metric"),
        ("personal='fc3.*'", "personal='fc3.*' matches none of the entries of the model: weight, bias"),
        ("personal='weight bias'", "personal='weight bias' matches all entries of the model: weight, bias"),
        ("strategy='tiny.Net'", "strategy='tiny.Net' is none of: fedavg, "),
    ],
)
def test_server_refuses_settings_that_the_task_or_its_data_cannot_take(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, said: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny.py").write_text(TINY.replace("lr=0.1", "lr=0.1, momentum=0.0"), "utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("an earlier result")
    line = ["--task", "tiny", "--out", "run", "--run-config", setting]
    check(command("server.py", *line), 2, "server.py", "error: ", said)
    assert (tmp_path / "run" / "metrics.json").read_text() == "an earlier result"


def test_server_names_weights_that_are_missing_or_do_not_fit(command: Command, tmp_path: Path) -> None:
    check(command("server.py", "--initial", "none.pt"), 2, "server.py", "error: initial=none.pt: there is no such file")
    (tmp_path / "broken.pt").write_bytes(b"no model")
    check(command("server.py", "--initial", "broken.pt"), 1, "server.py", "cannot read the model", "broken.pt")


FRAME = """
class Frame:  # picks by name, as that of pandas does
    def __init__(self, rows): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, key):
        if isinstance(key, slice): return self.rows[key]
        raise KeyError(f"{len(key)} rows are no column")
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return (x[:62], x[:62, :10]", "return (Frame(x[:62]), x[:62, :10]", "it returns Frame and Tensor"),
        ("return loss.item()\n", "return net\n", "train() returns Linear"),
        ("return F.cross_entropy(logits, data[1]).item(), ", "return ", "test() returns 0."),
        ("lr=0.1", "lr", "train() has no default for lr: the run config needs a learning-rate"),
        ("x[:62, :10].argmax(1))", "list(map(object, range(62))))", "object"),
    ],
    ids=["rows that cannot be picked", "a training without a loss", "a test without a loss", "no rate", "objects"],
)
def test_server_tries_a_task_before_it_opens(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"tried_{sha256(new.encode()).hexdigest()[:8]}"
    assert TINY.count(old) == 1
    (tmp_path / f"{name}.py").write_text(FRAME + TINY.replace(old, new), "utf-8")
    check(command("server.py", "--task", f"{name}.py"), 1, "server.py", name, said)


def test_server_names_what_a_task_lacks(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = (ROOT / "cifar.py").read_text("utf-8").replace("def train(", "def fit(")
    (tmp_path / "a_task_without_train.py").write_text(source, "utf-8")
    named = [str(tmp_path / "a_task_without_train.py"), "has no train()"]
    check(command("server.py", "--task", "a_task_without_train"), 1, "server.py", *named)


def test_server_names_a_port_that_is_taken(command: Command, port: int) -> None:
    outcome = command("server.py", "--data", "embedded", "--address", f"127.0.0.1:{port}")
    check(outcome, 1, "server.py", f"127.0.0.1:{port}", "in use", "--address")


def test_server_names_an_address_that_is_not_its_own(command: Command) -> None:
    outcome = command("server.py", "--data", "embedded", "--address", "192.0.2.1:8080", "--insecure")
    check(outcome, 1, "server.py", "192.0.2.1:8080", "--address")


def test_server_refuses_more_clients_than_samples(command: Command) -> None:
    outcome = command("server.py", "--data", "embedded", "--clients", "2001")  # the embedded set has 2,000 for tests
    check(outcome, 1, "server.py", "2001", "2000")


def test_a_port_that_is_taken_leaves_the_results_of_its_owner_alone(
    command: Command, port: int, tmp_path: Path
) -> None:
    metrics = tmp_path / "runs" / "federated" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"status": "running"}')
    check(command("server.py", "--data", "embedded", "--address", f"127.0.0.1:{port}"), 1, "server.py", str(port))
    assert metrics.read_text() == '{"status": "running"}', "the server that holds the port is still running"


# ---------------------------------------------------------------------------------------------------- a run to resume


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Return the folder of a run that has been interrupted after its first round."""
    folder = tmp_path / "runs" / "federated"
    config = validate({"data": cifar_data.EMBEDDED, "out": str(folder), "learning-rate": 0.01, "seed": 7}).values()
    dataset = {"name": cifar_data.EMBEDDED, "train": 10_000, "test": 2_000}
    metrics = {"config": config, "dataset": dataset, "rounds": [{"round": 0}, {"round": 1}]}
    folder.mkdir(parents=True)
    save_checkpoint(metrics, {"arrays": weights.from_net(cifar.Net())}, folder)
    assert (folder / CHECKPOINT).exists()
    return folder


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--run-config", "learning-rate=0.02"], ["learning-rate=0.02", "0.01"]),
        (["--run-config", "seed=8"], ["seed=8", "7"]),
        (["--run-config", "batch-size=64"], ["batch-size=64", "32"]),
        (["--run-config", "strategy='fedadam'"], ["strategy='fedadam'", "'fedavg'"]),
        (["--run-config", "partitioner='dirichlet'"], ["partitioner='dirichlet'", "'iid'"]),
        (["--clients", "3"], ["num-clients=3", "2"]),
        (["--simulate", "3"], ["num-clients=3", "2"]),
        (["--task", "benchmarks.niid_task"], ["task='benchmarks.niid_task'", "'cifar'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_run_is_not_resumed_with_another_config(
    command: Command, begun: Path, arguments: list[str], named: list[str]
) -> None:
    before = (begun / CHECKPOINT).read_bytes()
    check(command("server.py", "--resume", *arguments), 2, "server.py", "cannot resume", "runs/federated", *named)
    assert [path.name for path in begun.iterdir()] == [CHECKPOINT] and (begun / CHECKPOINT).read_bytes() == before


def test_a_run_is_resumed_with_its_own_config(command: Command, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted: list[RunConfig] = []
    monkeypatch.setattr(host, "host_run", lambda address, config, simulated, tls: hosted.append(config) or 0)
    assert command("server.py", "--resume", "--rounds", "5", "--address", f"127.0.0.1:{free_port()}")[0] == 0
    (config,) = hosted
    own = {"data": cifar_data.EMBEDDED, "out": str(begun), "learning-rate": 0.01, "seed": 7}
    assert config == validate(own | {"num-server-rounds": 5, "resume": True})


def test_a_run_that_has_moved_is_resumed_where_it_is(
    command: Command, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted: list[RunConfig] = []
    monkeypatch.setattr(host, "host_run", lambda address, config, simulated, tls: hosted.append(config) or 0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").rename(tmp_path / "elsewhere" / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("server.py", "--resume", "--simulate", "2")[0] == 0
    assert hosted[0].out == str(tmp_path / "elsewhere" / "runs" / "federated"), "and not at its old place"
    assert not (tmp_path / "runs").exists()


def test_a_damaged_checkpoint_is_named(command: Command, begun: Path) -> None:
    (begun / CHECKPOINT).write_bytes((begun / CHECKPOINT).read_bytes()[:-100])
    named = [str(Path("runs/federated") / CHECKPOINT), "is damaged", "remove it, and start without --resume"]
    check(command("server.py", "--resume"), 2, "server.py", *named)
    (begun / "checkpoint-0.npz").write_bytes((begun / CHECKPOINT).read_bytes())
    check(command("server.py", "--resume"), 2, "server.py", *named[:2], "--resume will continue from checkpoint-0.npz")


@pytest.mark.parametrize("option", [[], ["--resume"]], ids=["anew", "resumed"])
def test_a_run_folder_that_another_run_writes_to_is_refused(command: Command, begun: Path, option: list[str]) -> None:
    (begun / "metrics.json").write_text('{"status": "running"}')
    arguments = ["--data", "embedded", "--address", f"127.0.0.1:{free_port()}", *option]
    with lock_run_folder(begun):
        before = {path: path.read_bytes() for path in begun.iterdir()}
        check(command("server.py", *arguments), 1, "server.py", f"another run is writing to {begun}", "--out")
        assert {path: path.read_bytes() for path in begun.iterdir()} == before


# ---------------------------------------------------------------------------------------------------- the client's line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--partition-id", "0"], ["--partition-id", "--num-partitions"]),
        (["--num-partitions", "2"], ["--partition-id", "--num-partitions"]),
        (["--partition-id", "2", "--num-partitions", "2"], ["--partition-id 2", "0 to 1"]),
        (["--partition-id", "-1", "--num-partitions", "2"], ["--partition-id -1", "0 to 1"]),
        (["--partition-id", "0", "--num-partitions", "0"], ["--num-partitions 0"]),
        (["--partition-id", "one", "--num-partitions", "2"], ["--partition-id", "'one'"]),
        (["--wait", "-1"], ["--wait"]),
        (["--wait", "nan"], ["--wait"]),
        (["--wait", "long"], ["--wait", "'long'"]),
        (["--threads", "0"], ["--threads"]),
        (["--clients", "0"], ["--clients 0", "1 or more"]),
        (["--clients", "two"], ["--clients", "'two'"]),
        (["--clients", "2", "--partition-id", "0", "--num-partitions", "2"], ["--clients", "--partition-id"]),
        (["--threads", "-1"], ["--threads"]),
        (["--threads", "two"], ["--threads", "'two'"]),
        (["--rounds", "3"], ["--rounds"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_client_refuses_a_wrong_line(command: Command, arguments: list[str], named: list[str]) -> None:
    check(command("client.py", *arguments), 2, "client.py", *named)


# ------------------------------------------------------------------------------------------------- as real processes


LIGHT = """
class Net: ...
def load_data(root): return (range(9), range(9)), (range(9), range(9))
def train(net, data, **settings): ...
def test(net, data): ...
"""  # a task that costs no time to import


def check_nothing_is_left(terminals: Terminals) -> None:
    assert terminals.processes() == []
    assert terminals.leftovers() == []


def test_wrong_lines_end_their_processes_with_status_2(terminals: Terminals) -> None:
    server = terminals.open("server.py", "--run-config", "colour=1")
    client = terminals.open("client.py", "--server", "nowhere")
    check((server.wait(), server.text), 2, "server.py", "'colour'")
    check((client.wait(), client.text), 2, "client.py", "'nowhere'")
    check_nothing_is_left(terminals)


def test_nothing_to_resume_ends_the_servers_process_with_status_2(terminals: Terminals) -> None:
    outcome = terminals.run("server.py", "--resume", "--out", "here", "--simulate", "2", "--data", "embedded")
    check(outcome, 2, "server.py", "cannot resume here: it has no checkpoint")
    assert not (terminals.folder / "here").exists()
    check_nothing_is_left(terminals)


@pytest.mark.parametrize("data", ["/no/such/folder", "~/none", "./none"])
def test_a_client_names_a_data_folder_that_is_missing_before_it_looks_for_a_server(command: Command, data: str) -> None:
    check(command("client.py", "--data", data), 1, "client.py", f"--data {data}: there is no such file or folder")


def test_a_client_gives_up_when_there_is_no_server(terminals: Terminals) -> None:
    address = f"127.0.0.1:{free_port()}"
    status, text = terminals.run("client.py", "--server", address, "--wait", "1")
    first, last = text.splitlines()
    assert first == f"waiting for a server at {address} (up to 1 s)"
    check((status, last), 1, "client.py", f"no server at {address} within 1 s")
    check_nothing_is_left(terminals)


def test_a_port_that_is_taken_ends_the_servers_process(terminals: Terminals, port: int) -> None:
    (terminals.folder / "light.py").write_text(LIGHT)
    address = f"127.0.0.1:{port}"
    outcome = terminals.run("server.py", "--task", "light", "--address", address, PYTHONPATH=str(terminals.folder))
    check(outcome, 1, "server.py", address, "in use")
    check_nothing_is_left(terminals)


def test_a_task_is_found_where_python_looks_for_modules(terminals: Terminals) -> None:
    (terminals.folder / "modules").mkdir()
    (terminals.folder / "modules" / "half_a_task.py").write_text("def Net(): pass\ndef load_data(root): pass\n")
    path = os.pathsep.join([str(terminals.folder / "modules"), os.environ.get("PYTHONPATH", "")])
    outcome = terminals.run("server.py", "--task", "half_a_task", PYTHONPATH=path)
    check(outcome, 1, "server.py", "half_a_task.py", "has no train()")
    check_nothing_is_left(terminals)
