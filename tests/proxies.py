"""What tests of the proxy share: a stand-in for the SuperLink, the proxy before it, and calls as they are spelt."""

import contextlib
import http.client
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn

from federation.launch.fleet_proxy import proxy, served
from federation.launch.limits import Connections
from tests.conftest import eventually

Headers = list[tuple[str, str]]


@dataclass
class Request:
    method: str
    path: str
    query: bytes
    headers: dict[str, str]
    body: bytes


@dataclass
class Upstream:
    """Stands for the SuperLink: records what reaches it, and answers with what it is told to, or the body that came."""

    seen: list[Request] = field(default_factory=list)
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    answer: bytes | None = None
    first: list[bytes] = field(default_factory=list)  # answers that come before that one

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["raw_path"].decode()
        self.seen.append(Request(scope["method"], path, scope["query_string"], headers, body))
        answer = self.first.pop(0) if self.first else body if self.answer is None else self.answer
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": answer})


@contextlib.contextmanager
def serving(app: Any, tls: Path | None = None) -> Iterator[int]:
    """Serve an app in a thread; yield its port."""
    secure = {"ssl_certfile": tls / "server.crt", "ssl_keyfile": tls / "server.key"} if tls else {}
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, date_header=True, **secure)  # type: ignore[arg-type]
    with running(uvicorn.Server(config)) as port:
        yield port


@contextlib.contextmanager
def proxy_before(url: str, ca: Path | None = None, connections: Connections | None = None) -> Iterator[int]:
    """Serve a proxy as its process does, in a thread; yield its port."""
    config = served(proxy(url, ca), connections or Connections(most=1000), "127.0.0.1", 0)
    with running(uvicorn.Server(config)) as port:
        yield port


@contextlib.contextmanager
def running(server: uvicorn.Server) -> Iterator[int]:
    thread = Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started, 10)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def ask(
    port: int, method: str, path: str, body: bytes | Iterable[bytes] = b"", headers: Headers | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Make a request as it is spelt: without any change to the path, with no other headers; chunked if in pieces."""
    head = [("Host", "here"), *(headers or [])]
    pieces = [body] if isinstance(body, bytes) else list(body)
    if isinstance(body, bytes):
        head.append(("Content-Length", str(len(body))))
    else:
        head.append(("Transfer-Encoding", "chunked"))
        pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head), "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        with contextlib.suppress(ConnectionError):  # it may have been refused before it was read to its end
            for piece in pieces:
                connection.sendall(piece)
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        with response:
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
