"""Limits on the connections to the proxy: on their number, and on the time that a request may take.

A connection is a stranger's until the SuperLink has answered one of its calls with 200. Strangers cannot keep clients
out: if there are too many, each new connection closes a stranger's oldest one. A new client finishes its request long
before its connection is the oldest.
"""

import asyncio
import ssl
from functools import partial
from typing import Any, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from federation.app.console import print_to_user

HANDSHAKE = 20.0  # seconds for the TLS handshake
HEAD = 20.0  # seconds for the headers of a request
HEAD_SIZE = 2**20  # bytes of the headers, including any part of the body that arrives with them
BODY = 30.0  # seconds for a body, plus one second
RATE = 1024  # for each of these bytes
STRANGERS = 4000  # connections of strangers, each of which needs a tenth of a MiB
RESERVE = 512  # file descriptors for connections to the SuperLink and other purposes
FEWEST = 64  # connections, even if there are fewer descriptors
PUBLIC_KEY = b"flwr-public-key"  # the header with which a SuperNode identifies itself


class Connections:
    """All connections to the proxy: those of clients, and those of strangers, with the oldest first."""

    def __init__(self, most: int, tls: ssl.SSLContext | None = None) -> None:
        self.most, self.most_of_strangers, self.tls = most, min(most, STRANGERS), tls
        self.most_of_an_address = self.most_of_strangers // 2
        self.open: set[Connection] = set()
        self.strangers: dict[str, dict[Connection, None]] = {}  # by address
        self.known_keys: set[bytes] = set()
        self.full = False

    def protocol(self) -> type[asyncio.Protocol]:
        """Return the protocol class that uvicorn creates for each connection."""
        return cast(type[asyncio.Protocol], partial(Connection, self))

    def add(self, connection: "Connection") -> None:
        """Add a stranger's connection; close another one if there are too many."""
        self.open.add(connection)
        neighbours = self.strangers.setdefault(connection.address, {})
        neighbours[connection] = None
        if len(neighbours) > self.most_of_an_address:
            self._close_oldest(neighbours)
        elif len(self.open) > self.most or sum(map(len, self.strangers.values())) > self.most_of_strangers:
            self._close_oldest(max(self.strangers.values(), key=len))

    def _close_oldest(self, strangers: "dict[Connection, None]") -> None:
        if not self.full:
            self.full = True
            count = sum(map(len, self.strangers.values()))
            print_to_user(f"the server is under load: {count:,} connections of strangers; from now on each new one "
                          "closes the oldest one; clients that have joined keep theirs")  # fmt: skip
        next(iter(strangers)).abort()

    def trust(self, connection: "Connection") -> None:
        """Treat a connection as a client's from now on."""
        neighbours = self.strangers.get(connection.address, {})
        neighbours.pop(connection, None)
        if not neighbours:
            self.strangers.pop(connection.address, None)

    def remove(self, connection: "Connection") -> None:
        self.trust(connection)
        self.open.discard(connection)


class Connection(asyncio.Protocol):
    """A connection: TLS, if required, then uvicorn's protocol for HTTP, with time limits for both."""

    def __init__(self, connections: Connections, *, app_state: dict[str, Any], **settings: Any) -> None:
        self.connections = connections
        self.settings = settings | {"app_state": app_state | {"connection": self}}
        self.http: asyncio.Protocol | None = None  # after the TLS handshake, if there is one
        self.transport: asyncio.Transport | None = None  # until it is closed
        self.address, self.early = "", b""
        self.requests = 0  # that are being answered now
        self.body_complete = True  # whether the next data belongs to another request
        self.head_size = 0
        self.timer: asyncio.TimerHandle | None = None

    # ---------------------------------------------------------------------------------------------------- as a protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = self.transport = cast(asyncio.Transport, transport)
        self.address = str((plain.get_extra_info("peername") or ("",))[0])
        self.connections.add(self)
        if self.connections.tls:
            plain.pause_reading()
            self.handshake = asyncio.get_running_loop().create_task(self.secure(plain, self.connections.tls))
        else:
            self.serve(plain)

    async def secure(self, plain: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """Do the TLS handshake, or close the connection."""
        try:
            transport = await asyncio.get_running_loop().start_tls(
                plain, self, tls, server_side=True, ssl_handshake_timeout=HANDSHAKE
            )
        except OSError:
            self.abort()
            return
        if transport and self in self.connections.open:
            self.serve(transport)

    def serve(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.http = AutoHTTPProtocol(**self.settings)
        self.http.connection_made(transport)
        self.expect_head()
        if self.early:
            self.data_received(self.early)

    def data_received(self, data: bytes) -> None:
        if not self.http:  # asyncio delivers data that came with the handshake before start_tls returns
            self.early += data
            return
        if self.body_complete:
            self.expect_head()
            self.head_size += len(data)
        if self.head_size > HEAD_SIZE:
            self.abort()
        else:
            self.http.data_received(data)

    def eof_received(self) -> bool | None:
        return self.http.eof_received() if self.http else None

    def connection_lost(self, error: Exception | None) -> None:
        self.forget()
        if self.http:
            self.http.connection_lost(error)
        self.http = self.transport = None  # they refer to this object, and the garbage collector is slow
        self.settings.clear()

    def pause_writing(self) -> None:
        if self.http:
            self.http.pause_writing()

    def resume_writing(self) -> None:
        if self.http:
            self.http.resume_writing()

    # --------------------------------------------------------------------------------------------------- and its limits

    def expect_head(self) -> None:
        """Start the clock for headers, unless it is already running."""
        self.timer = self.timer or asyncio.get_running_loop().call_later(HEAD, self.abort)

    def begin(self) -> None:
        """Note that the headers of a request are complete."""
        self.requests += 1
        self.head_size, self.body_complete = 0, False
        self.stop_clock()

    def end(self) -> None:
        """Note that a request has been answered."""
        self.requests -= 1
        self.body_complete = True

    def stop_clock(self) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = None

    def forget(self) -> None:
        self.stop_clock()
        self.connections.remove(self)

    def abort(self) -> None:
        """Close the connection immediately."""
        self.forget()
        if self.transport:
            self.transport.abort()
            self.transport = None


class Limited:
    """An ASGI app that limits the time for the bodies of requests, and distinguishes clients from strangers."""

    def __init__(self, app: ASGIApp, connections: Connections) -> None:
        self.app, self.connections = app, connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection: Connection = scope["state"]["connection"]
        key = next((value for name, value in scope["headers"] if name == PUBLIC_KEY), b"")
        if key in self.connections.known_keys:
            self.connections.trust(connection)

        async def send_and_look(message: Message) -> None:
            if message.get("status") == 200 and scope["path"].startswith("/v1/fleet/"):
                self.connections.trust(connection)
                self.connections.known_keys |= {key} - {b""}
            await send(message)

        connection.begin()
        try:
            await self.app(scope, limited(receive, connection), send_and_look)
        finally:
            connection.end()


def limited(receive: Receive, connection: Connection) -> Receive:
    """Return a `receive` that closes the connection if the body does not arrive in time."""
    clock = asyncio.get_running_loop().time
    deadline, complete = clock() + BODY, False

    async def receive_in_time() -> Message:
        nonlocal deadline, complete
        if complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - clock())
        except TimeoutError:
            connection.abort()
            return {"type": "http.disconnect"}
        deadline += len(message.get("body", b"")) / RATE
        connection.body_complete = complete = not message.get("more_body", False)
        return message

    return receive_in_time


def most_connections() -> int:
    """Raise this process's limit of file descriptors as far as possible, and return how many connections it allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return STRANGERS * 2
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 10240):  # macOS reports no limit, but refuses more than OPEN_MAX
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            break
        except (ValueError, OSError):
            continue
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(FEWEST, (STRANGERS * 16 if soft == resource.RLIM_INFINITY else soft) - RESERVE)
