"""The limits of the proxy: strangers may be many and slow, and keep nobody out."""

import asyncio
import contextlib
import http.client
import random
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from federation.launch import limits
from federation.launch.fleet_proxy import certificate
from federation.launch.limits import Connections, most_connections
from federation.launch.network import free_port
from federation.security.certificates import make_authority, make_server
from tests.conftest import ROOT, Terminals, eventually
from tests.processes import SETTINGS, as_text, assert_all_gone, client, metrics_of, undisturbed
from tests.proxies import Upstream, ask, proxy_before, serving

CALL = "/v1/fleet/push-messages"


HEALTH = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"
HALF = f"POST {CALL} HTTP/1.1\r\nHost: here\r\nContent-Length: 8\r\n\r\nhalf".encode()
KEY = "Flwr-Public-Key"


class Door:
    """A proxy in front of a stand-in for the SuperLink, and those who knock."""

    def __init__(self, connections: Connections, upstream: Upstream, port: int) -> None:
        self.connections, self.upstream, self.port = connections, upstream, port
        self.visitors = contextlib.ExitStack()

    def knock(self, content: bytes = b"", count: int = 1) -> list[socket.socket]:
        """Open connections, one after the other, and send that; return them once all have been seen."""
        opened = []
        for _ in range(count):
            known = set(self.connections.open)
            opened.append(self.visitors.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=10)))
            eventually(lambda known=known: self.connections.open - known, 5)  # type: ignore[misc]
            opened[-1].sendall(content)
        return opened


@pytest.fixture
def door() -> Iterator[Door]:
    """Open a proxy with room for eight strangers, four of an address, and ten connections altogether."""
    connections, upstream = Connections(most=8), Upstream()
    connections.most = 10
    with serving(upstream) as behind, proxy_before(f"http://127.0.0.1:{behind}", None, connections) as port:
        door = Door(connections, upstream, port)
        with door.visitors:
            yield door


def is_closed(connection: socket.socket) -> bool:
    """Wait until something comes, and tell whether that is the end."""
    try:
        return connection.recv(1000) == b""
    except ConnectionError:
        return True


def answer(connection: socket.socket, request: bytes) -> int:
    """Send a request, or the rest of one, and return the status of the whole answer."""
    connection.sendall(request)
    response = http.client.HTTPResponse(connection)
    response.begin()
    with response:
        response.read()
        return response.status


def request(*headers: str) -> bytes:
    return "\r\n".join([f"POST {CALL} HTTP/1.1", "Host: here", "Content-Length: 0", *headers, "", ""]).encode()


# -------------------------------------------------------------------------------------------------------------- number


def test_one_stranger_too_many_closes_the_oldest_and_that_is_said_once(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *others = door.knock(count=4)
    assert capsys.readouterr().out == ""
    newest = door.knock(HALF, count=2)
    assert is_closed(first) and is_closed(second)
    assert [answer(connection, HEALTH) for connection in others] == [200] * 2
    assert door.connections.open and len(door.connections.open) == 4
    assert answer(newest[0], b"4321") == 200
    said = capsys.readouterr().out
    assert said.count("federation: the server is under load") == 1 and said.count("\n") == 1


@pytest.mark.parametrize("status", [200, 401])
def test_a_client_keeps_its_place_and_one_whose_call_is_refused_does_not(door: Door, status: int) -> None:
    door.upstream.status = status
    (client,) = door.knock()
    assert answer(client, request()) == status
    door.knock(count=9)
    if status == 401:
        assert is_closed(client)
    else:
        assert answer(client, request()) == 200


def test_whether_the_server_is_well_makes_nobody_a_client(door: Door) -> None:
    (stranger,) = door.knock()
    assert answer(stranger, HEALTH) == 200
    door.knock(count=4)
    assert is_closed(stranger)


def test_a_client_is_known_by_its_key_before_its_request_is_complete(door: Door) -> None:
    assert KEY.lower() == FLEET_HTTP_PUBLIC_KEY_HEADER == limits.PUBLIC_KEY.decode()
    assert ask(door.port, "POST", CALL, headers=[(KEY, "berlin")])[0] == 200
    door.upstream.status = 401
    assert ask(door.port, "POST", CALL, headers=[(KEY, "mallory")])[0] == 401
    door.upstream.status = 200
    slow = {
        name: door.knock(HALF.replace(b"Host", f"{KEY}: {name}\r\nHost".encode()))[0] for name in ("berlin", "mallory")
    }
    eventually(lambda: len(door.connections.strangers["127.0.0.1"]) == 1, 5)
    door.knock(count=4)
    assert is_closed(slow["mallory"])
    assert answer(slow["berlin"], b"4321") == 200


def test_many_clients_leave_room_for_another(door: Door) -> None:
    """There is room for ten: of nine clients none has to go, whoever knocks."""
    clients = door.knock(count=0)
    for _ in range(9):
        clients += door.knock()
        assert answer(clients[-1], request()) == 200
    for _ in range(3):
        (stranger,) = door.knock()
    assert answer(stranger, request()) == 200
    assert [answer(client, request()) for client in clients] == [200] * 9


def test_the_crowd_of_one_address_closes_no_connection_of_another(door: Door) -> None:
    door.connections.most_of_an_address = 100
    source = ("127.0.0.2", 0)
    with socket.create_connection(("127.0.0.1", door.port), 10, source_address=source) as other:
        eventually(lambda: "127.0.0.2" in door.connections.strangers, 5)
        crowd = door.knock(count=12)
        assert is_closed(crowd[0])
        assert answer(other, HEALTH) == 200


def test_nothing_is_kept_of_those_who_have_gone(door: Door) -> None:
    door.knock(HALF, count=3)
    door.visitors.close()
    eventually(lambda: not door.connections.open and not door.connections.strangers, 5)


# ---------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("limit", "content"),
    [("HEAD", b""), ("HEAD", b"POST /v1/fl"), ("HEAD", HEALTH), ("HEAD_SIZE", b"GET /" + b"x" * 1001), ("BODY", HALF)],
    ids=["silence", "half a line", "half of a second request", "endless headers", "half a body"],
)
def test_what_does_not_come_in_time_is_not_waited_for(
    door: Door, monkeypatch: pytest.MonkeyPatch, limit: str, content: bytes
) -> None:
    monkeypatch.setattr(limits, limit, 1000 if limit == "HEAD_SIZE" else 0.2)
    (stranger,) = door.knock(content)
    if content == HEALTH:
        assert answer(stranger, b"") == 200
        stranger.sendall(b"POST")
    assert is_closed(stranger)
    assert door.upstream.seen == [] or content == HEALTH


def test_a_body_is_waited_for_as_long_as_it_comes(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY", 0.3)
    monkeypatch.setattr(limits, "RATE", 4)  # so that four bytes earn a second
    (client,) = door.knock(HALF)
    eventually(lambda: any(connection.requests for connection in door.connections.open), 5)
    with pytest.raises(TimeoutError):
        client.settimeout(0.6)
        client.recv(1)
    assert answer(client, b"4321") == 200


def test_a_call_that_is_held_is_not_cut_short(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("HEAD", "BODY"):
        monkeypatch.setattr(limits, limit, 0.2)
    monkeypatch.setattr("federation.launch.fleet_proxy.HOLD", 1.0)
    door.upstream.answer = b""
    assert ask(door.port, "POST", "/v1/fleet/pull-messages")[::2] == (200, b"")
    assert len(door.upstream.seen) > 3


# ----------------------------------------------------------------------------------------------------------------- TLS


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[Door, ssl.SSLContext]]:
    make_authority(tmp_path)
    make_server(tmp_path, ["localhost"])
    connections, upstream = Connections(most=8, tls=certificate(tmp_path)), Upstream()
    with serving(upstream) as behind, proxy_before(f"http://127.0.0.1:{behind}", None, connections) as port:
        door = Door(connections, upstream, port)
        with door.visitors:
            yield door, ssl.create_default_context(cafile=tmp_path / "ca.crt")


def test_strangers_without_a_handshake_keep_nobody_out(secure: tuple[Door, ssl.SSLContext]) -> None:
    door, context = secure
    first, *_ = door.knock(count=4)
    with context.wrap_socket(door.knock()[0], server_hostname="localhost") as client:
        assert is_closed(first)
        assert answer(client, request()) == 200
        door.knock(b"no TLS", count=9)
        assert answer(client, request()) == 200
    door.visitors.close()
    eventually(lambda: not door.connections.open and not door.connections.strangers, 5)


@pytest.mark.parametrize("content", [b"", b"\x16\x03\x01\x02"])
def test_a_handshake_is_not_waited_for_for_ever(
    secure: tuple[Door, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE", 0.2)
    door, _ = secure
    assert is_closed(door.knock(content)[0])
    eventually(lambda: not door.connections.open, 5)


# --------------------------------------------------------------------------------------------------------- descriptors


@pytest.mark.parametrize(
    ("hard", "most"), [(20_000, 20_000 - limits.RESERVE), (256, limits.FEWEST), (-1, 10_240 - limits.RESERVE)]
)
def test_the_limit_of_descriptors_is_raised_as_far_as_the_system_lets(
    monkeypatch: pytest.MonkeyPatch, hard: int, most: int
) -> None:
    granted = [256]

    def set_limit(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] < 0:
            raise ValueError("as macOS does")
        granted[0] = wanted[0]

    monkeypatch.setattr(resource, "getrlimit", lambda _: (granted[0], hard))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    assert most_connections() == most


# ---------------------------------------------------------------------------------------------------------- a whole run


class Crowd:
    """Strangers who hold on to connections, and come back a second after each is closed: idle, or ever so slow."""

    def __init__(self, port: int, ca: Path, idle: int, slow: int) -> None:
        self.port, self.context = port, ssl.create_default_context(cafile=ca)
        self.kinds = [self.stay] * idle + [self.trickle] * slow
        self.here = self.closed = 0

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Be there for as long as a block lasts."""
        loop = asyncio.new_event_loop()
        crowd = loop.create_task(self.come())
        thread = Thread(target=lambda: loop.run_until_complete(asyncio.wait([crowd])))
        thread.start()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(crowd.cancel)
            thread.join()

    async def come(self) -> None:
        async with asyncio.TaskGroup() as all_of_them:
            for number, kind in enumerate(self.kinds):
                all_of_them.create_task(self.insist(kind, f"127.0.0.{1 + number % 2}"))
                await asyncio.sleep(0.001)

    async def insist(self, kind: Callable[[str], Awaitable[None]], source: str) -> None:
        while True:
            with contextlib.suppress(OSError):
                await kind(source)
            self.closed += 1
            await asyncio.sleep(1)  # the pace of those who come back: nothing to wait for

    async def stay(self, source: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        await self.until_closed(reader, writer, b"", 3600)

    async def trickle(self, source: str) -> None:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, local_addr=(source, 0), ssl=self.context, server_hostname="localhost"
        )
        head = f"POST {CALL} HTTP/1.1\r\nHost: here\r\n"
        writer.write((head if random.random() < 0.5 else f"{head}Content-Length: 1000\r\n\r\n").encode())
        await self.until_closed(reader, writer, b"x", 2)

    async def until_closed(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes, pause: float
    ) -> None:
        self.here += 1
        try:
            end = asyncio.ensure_future(reader.read())
            while not (await asyncio.wait([end], timeout=pause))[0]:
                writer.write(sent)
            await end
        finally:
            self.here -= 1
            end.cancel()
            writer.transport.abort()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "in_a_run")
def test_a_crowd_of_strangers_changes_nothing_in_a_run(
    terminals: Terminals, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it comes from the address of the clients, and there are fewer descriptors than strangers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    limits_of_server = (
        f"ulimit -Hn 2048 && exec python {ROOT / 'server.py'} --address 127.0.0.1:{(port := free_port())}"
    )
    options = f"--tls keys --task tiny --run-config '{as_text(SETTINGS).replace(chr(39), chr(34))}'"
    server = terminals.shell(f"ulimit -Sn 1024 && {limits_of_server} {options}", terminals.folder)
    server.wait_for("waiting for 2 clients", 120)
    crowd = Crowd(port, keys / "ca.crt", idle=2000, slow=300)
    with crowd.around():
        eventually(lambda: "the server is under load" in server.text and crowd.closed > 1000, 60)
        members = [client(terminals, port, keys / name) for name in ("berlin", "paris")]
        server.wait_for("\n    2  ", 120)
        assert crowd.here > 1000
        assert server.wait(300) == 0, server.text
    assert [member.wait(60) for member in members] == [0, 0], [member.text for member in members]
    assert server.text.count("the server is under load") == 1
    assert not any("lost the server" in member.text for member in members)
    ended = metrics_of(terminals.folder)
    assert [row["clients"] for row in ended["rounds"]] == [None, 2, 2, 2]
    assert ended["final_weights_sha256"] == undisturbed(terminals.folder, SETTINGS, monkeypatch)
    assert_all_gone(terminals)
