"""Who may join and who may not, over real processes: TLS, keys, and the proxy that strangers knock at."""

import random
import shutil
import socket
import ssl
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest

from federation.launch.network import free_port
from federation.security.certificates import make_authority, make_client, make_server
from tests.conftest import Terminal, Terminals, eventually
from tests.processes import SETTINGS, as_text, assert_all_gone, client, metrics_of, named, undisturbed
from tests.tasks import held_by

pytestmark = pytest.mark.slow
TRIES = 10_000


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def assert_private(keys: Path) -> None:
    """Check that only their owner can read private keys, and that none is among the public ones."""
    assert {mode(path) for path in keys.rglob("*.key")} == {0o600}
    assert len(list(keys.rglob("*.key"))) == 5
    assert sorted(path.name for path in (keys / "clients").iterdir()) == [
        "berlin.pub",
        "ca.crt",
        "paris.pub",
        "rome.pub",
    ]


@contextmanager
def expired_server(folder: Path) -> Iterator[int]:
    """Serve nothing, over TLS with a certificate that has expired; yield the port."""
    make_server(folder, ["127.0.0.1"], days=-1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                with suppress(ssl.SSLError):
                    context.wrap_socket(listener.accept()[0], server_side=True)

    Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def start(terminals: Terminals, *options: str) -> tuple[int, Terminal]:
    port = free_port()
    server = terminals.open("server.py", "--address", f"0.0.0.0:{port}", "--tls", "keys", "--task", "tiny", *options)
    return port, server


def test_strangers_stay_outside(terminals: Terminals, keys: Path, tmp_path: Path) -> None:
    assert_private(keys)
    hold = terminals.folder / "hold"
    (terminals.folder / "tiny.py").write_text(held_by(hold))
    port, server = start(terminals, "--clients", "3", "--rounds", "3", "--run-config", "min-clients=2")
    server.wait_for("waiting for 3 clients", 300)
    rogue = tmp_path / "rogue"
    make_authority(rogue)
    make_client(rogue, "mallory")
    unknown = tmp_path / "unknown"
    shutil.copytree(keys / "berlin", unknown)
    shutil.copy(rogue / "mallory" / "client.key", unknown)
    (keyless := tmp_path / "keyless").mkdir()
    shutil.copy(keys / "ca.crt", keyless)
    shutil.copytree(keys, tmp_path / "expired")
    berlin = client(terminals, port, keys / "berlin")
    server.wait_for("client 0 joined")
    with expired_server(tmp_path / "expired") as expired:
        started = time.monotonic()
        refused = {
            "uses TLS; add --tls": client(terminals, port),
            "is not trusted: unable to get local issuer certificate": client(terminals, port, rogue / "mallory"),
            "is not trusted: certificate has expired": client(terminals, expired, keys / "berlin"),
            "is not trusted: IP address mismatch": client(terminals, port, keys / "berlin", "127.0.0.2"),
            f"rejected {unknown}/client.key: either": client(terminals, port, unknown),
            f"rejected {keys}/berlin/client.key: either": client(terminals, port, keys / "berlin"),
            "requires a client key": client(terminals, port, keyless),
        }
        for reason, stranger in refused.items():
            assert stranger.wait(120) == 1, reason + stranger.text
            assert reason in stranger.text.splitlines()[-1] and "Traceback" not in stranger.text
            assert sum("client.py:" in line for line in stranger.text.splitlines()) == 1
        print(f"the last of {len(refused)} strangers was refused after {time.monotonic() - started:.0f} s")
    knock(port, keys / "ca.crt")

    members = [berlin] + [client(terminals, port, keys / name) for name in ("paris", "rome")]
    server.wait_for("\n    1  ", 300)
    hold.touch()  # or the run would be over before rome has tried to come back
    (keys / "clients" / "rome.pub").unlink()
    server.wait_for("2 keys may join", 60)
    members[2].wait_for(f"rejected {keys}/rome/client.key: it does not know this key, or", 120)
    hold.unlink()
    assert server.wait(400) == 0, server.text
    assert [member.wait(60) for member in members[:2]] == [0, 0]
    members[2].interrupt()  # it would try once more, and then give up
    assert members[2].wait(20) in (1, 130)
    rounds = metrics_of(terminals.folder)["rounds"]
    assert rounds[1]["clients"] == 3 and rounds[-1]["clients"] == 2
    assert_all_gone(terminals)


def knock(port: int, ca: Path) -> None:
    """Check that of the SuperLink's APIs only the clients' one is to be reached, and only by those who sign."""
    context = ssl.create_default_context(cafile=ca)

    def status(path: str, body: bytes | None = b"") -> int:
        request = urllib.request.Request(
            f"https://localhost:{port}{path}", body, {"Content-Type": "application/protobuf"}
        )
        try:
            with urllib.request.urlopen(request, context=context, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/health", None) == 200
    for hidden in (
        "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/pull-task-input", "/docs", "/openapi.json",
        "/v1/fleet/..%2Fcontrol%2Fregister-node", "/v1/fleet/../control/register-node", "//v1/control/start-run",
        "/v1/fleet/", "/V1/fleet/get-run",
    ):  # fmt: skip
        assert status(hidden) == 404, hidden
    for call in ("register-node", "activate-node", "pull-messages", "get-run", "get-fab", "push-object"):
        assert 400 <= status(f"/v1/fleet/{call}") < 500, call


@pytest.mark.usefixtures("one_thread", "in_a_run")
def test_neither_noise_nor_a_client_that_is_killed_and_comes_back_disturbs_a_run(
    terminals: Terminals, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"personal": "bias"}  # which the killed client has to find again
    port, server = start(terminals, "--run-config", f"{as_text(settings)} min-clients=2 retries=9")
    members = [client(terminals, port, keys / name) for name in ("berlin", "paris")]
    server.wait_for("\n    1  ", 300)
    victim = next(member for member in members if "joining" in member.text)
    victim.process.kill()
    eventually(lambda: len(named(terminals.processes(), "flower-supernode")) == 1, 10)
    back = client(terminals, port, keys / ("berlin" if victim is members[0] else "paris"))
    back.wait_for("or was killed within the last minute; trying again in", 60)
    noise = Noise(port)
    noise.check_nothing_grows(
        named(terminals.processes(), "federation.launch.fleet_proxy") + named(terminals.processes(), "flower-superlink")
    )
    with noise.going_on():
        server.wait_for("waiting for 2 clients, 1 here", 200)
        assert server.wait(500) == 0, server.text
    assert back.wait(60) == 0 and members[victim is members[0]].wait(60) == 0
    ended = metrics_of(terminals.folder)
    assert [row["clients"] for row in ended["rounds"]] == [None, 2, 2, 2]
    assert ended["final_weights_sha256"] == undisturbed(terminals.folder, settings, monkeypatch)
    assert_all_gone(terminals)


def memory(process: psutil.Process) -> float:
    """Return the resident memory of a process in MiB."""
    return float(process.memory_info().rss / 2**20)


class Noise:
    """What strangers may send: no TLS, broken TLS, no HTTP, half a request, calls with a body of random bytes."""

    def __init__(self, port: int) -> None:
        self.port, self.tries = port, 0
        self.context = ssl.create_default_context()
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE

    def check_nothing_grows(self, parts: list[psutil.Process]) -> None:
        """Check that these parts of the server, proxy and SuperLink, need no more memory after `TRIES` tries."""
        self.make(1000)
        before = [memory(part) for part in parts]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.make, [TRIES // 20] * 20))
        assert self.tries >= TRIES
        after = [memory(part) for part in parts]
        assert [now - then < 30 for now, then in zip(after, before, strict=True)] == [True, True], (before, after)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Go on with it for as long as a block lasts."""
        over = Event()
        with ThreadPoolExecutor(1) as pool:
            noise = pool.submit(lambda: [self.make(100) for _ in iter(over.is_set, True)])
            try:
                yield
            finally:
                over.set()
            noise.result()

    def make(self, tries: int) -> None:
        dice = random.Random(tries)
        for _ in range(tries):
            content = dice.choice((self.bytes, self.half, self.call, self.hello))(dice)
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as plain:
                if dice.random() < 0.7:
                    plain.sendall(content)
                else:
                    with self.context.wrap_socket(plain) as secure:
                        secure.sendall(content)
            self.tries += 1

    def bytes(self, dice: random.Random) -> bytes:
        return dice.randbytes(dice.randrange(2000))

    def hello(self, dice: random.Random) -> bytes:
        return b"\x16\x03\x01\x02\x00\x01" + dice.randbytes(dice.randrange(600))

    def half(self, dice: random.Random) -> bytes:
        whole = self.call(dice)
        return whole[: dice.randrange(len(whole))]

    def call(self, dice: random.Random) -> bytes:
        body = self.bytes(dice)
        name = dice.choice(
            ("register-node", "activate-node", "pull-messages", "push-messages", "get-run", "push-object")
        )
        length = dice.choice((len(body), 10**12, -1, 0))
        head = f"POST /v1/fleet/{name} HTTP/1.1\r\nHost: here\r\nContent-Type: application/protobuf\r\n"
        return f"{head}Content-Length: {length}\r\n\r\n".encode() + body
