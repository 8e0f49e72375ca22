"""The proxy in front of the SuperLink, and the only part of the server that clients connect to.

A SuperLink serves three APIs on one port. The one for clients may ask for their keys; but the one that starts runs,
and registers keys, asks nobody who they are. So the SuperLink listens to this machine only, and the proxy passes on the
calls of clients and nothing else. It also ends TLS.

And it makes clients fast. A SuperNode that finds no message sleeps for three seconds, and one that finds a message
before all of it has been uploaded sleeps for one. So the proxy holds an answer that says "not yet": it asks the
SuperLink again until there is another one, for up to HOLD seconds (long polling).

The SuperLink sees whole requests only: how long strangers may take over theirs is a matter of limits.py.
"""

import argparse
import asyncio
import gc
import json
import re
import ssl
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from federation.launch.limits import Connections, Limited, most_connections

MAX_REQUEST_BYTES = 64 * 2**20  # bytes of a request; Flower sends models in pieces of 5 MiB
HOP_BY_HOP = {
    "connection",
    "proxy-connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}  # for one hop
HOP_BY_HOP |= {"host", "date", "server"}
NOT_YET = {  # by call, the answer that is held
    "pull-messages": b"",  # there is no message
    "pull-object": b"\x08\x01",  # object_found is true, object_available is not, and there is no content
}
HOLD = 20.0  # seconds; a SuperNode waits 30 for an answer
PACE = 0.05  # seconds between two questions, of all clients together
BACKLOG = 128  # connections that are accepted at once, or wait for that
SUPERLINK = 256  # connections to the SuperLink: it has 1,024 descriptors, as most systems grant
LONGEST_TURN = 5.0  # seconds until each client's question has been asked again, however many wait


class TooLargeError(Exception):
    """A request has more than MAX_REQUEST_BYTES bytes."""


class Turns:
    """Lets those who wait ask one after the other, at a steady pace whatever their number.

    Once one of them has got an answer, the others follow at once: most messages are sent to many clients together.
    """

    def __init__(self) -> None:
        self.queue = asyncio.Lock()
        self.waiting = self.hurried = 0

    async def next(self) -> None:
        self.waiting += 1
        try:
            async with self.queue:
                if self.hurried:
                    self.hurried -= 1
                else:
                    await asyncio.sleep(min(PACE, LONGEST_TURN / self.waiting))
        finally:
            self.waiting -= 1

    def hurry(self) -> None:
        self.hurried = self.waiting


class FleetProxy:
    """Passes the calls of clients on to the SuperLink at a URL."""

    def __init__(self, superlink: str, ca: Path | None) -> None:
        verify = ssl.create_default_context(cafile=ca) if ca else False
        limits = httpx.Limits(max_connections=SUPERLINK)
        self.client = httpx.AsyncClient(base_url=superlink, verify=verify, timeout=None, trust_env=False, limits=limits)
        self.client.headers.clear()  # it would ask for compressed answers, whatever the caller can read
        self.turns = Turns()

    async def pass_on(self, request: Request) -> Response:
        """Answer one call."""
        call = request.path_params.get("call")
        if call is not None and not re.fullmatch("[a-z-]+", call):
            return PlainTextResponse("no such call", 404)
        if request.headers.get("upgrade", "").lower() == "websocket":
            return PlainTextResponse("no WebSocket", 400)
        path = f"/v1/fleet/{call}" if call else "/health"  # not from request.url, which the Host header is a part of
        try:
            question = await whole_body(request)
            if call in NOT_YET:
                return await self.hold(request, path, question, NOT_YET[call])
            return await self.forward(request, path, question)
        except TooLargeError:
            return PlainTextResponse("too large", 413)
        except ClientDisconnect:
            return PlainTextResponse("incomplete", 400)  # nobody reads that
        except httpx.TransportError:
            return PlainTextResponse("the SuperLink does not answer", 502)

    async def forward(self, request: Request, path: str, question: bytes) -> Response:
        """Pass on a request, and the answer piece by piece."""
        answer = await self.ask(request, path, question)
        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = _without(answer.headers.raw)
        return response

    async def hold(self, request: Request, path: str, question: bytes, not_yet: bytes) -> Response:
        """Pass on a request again and again until the answer is another one than `not_yet`, or time is over."""
        deadline = time.monotonic() + HOLD
        answer, content = await self.whole(request, path, question)
        while answer.status_code == 200 and content == not_yet and time.monotonic() < deadline:
            await self.turns.next()
            if await request.is_disconnected():  # a message for one who has gone would be lost
                raise ClientDisconnect
            answer, content = await self.whole(request, path, question)
            if content != not_yet:
                self.turns.hurry()
        response = Response(content, answer.status_code)
        response.raw_headers = _without(answer.headers.raw)
        return response

    async def whole(self, request: Request, path: str, question: bytes) -> tuple[httpx.Response, bytes]:
        """Ask the SuperLink, and return its answer and the bytes of that, as they were sent."""
        answer = await self.ask(request, path, question)
        try:
            return answer, b"".join([piece async for piece in answer.aiter_raw()])
        finally:
            await answer.aclose()

    async def ask(self, request: Request, path: str, content: bytes) -> httpx.Response:
        headers = _without(request.headers.raw)
        question = self.client.build_request(request.method, path, headers=headers, content=content)
        return await self.client.send(question, stream=True)


def proxy(superlink: str, ca: Path | None = None, imports: Sequence[str] = ()) -> Starlette:
    """Return an app that passes the calls of clients on to the SuperLink at that URL.

    By itself it tells them which modules of frameworks the task `imports`, so that they need not wait for the task.
    """
    pass_on = FleetProxy(superlink, ca).pass_on
    calls = [Route("/health", pass_on, methods=["GET"]), Route("/v1/fleet/{call}", pass_on, methods=["POST"])]
    calls.append(Route("/imports", lambda request: JSONResponse(list(imports)), methods=["GET"]))
    app = Starlette(routes=calls)
    app.router.redirect_slashes = False
    return app


async def whole_body(request: Request) -> bytes:
    """Return the body of a request once all of it has come. Raises TooLargeError."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_REQUEST_BYTES:
            raise TooLargeError
        pieces.append(piece)
    return b"".join(pieces)


def _without(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    named = b",".join(value for name, value in headers if name.lower() == b"connection").decode("latin-1").lower()
    own = HOP_BY_HOP.union(name.strip() for name in named.split(","))
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() not in own]


def served(app: ASGIApp, connections: Connections, host: str, port: int) -> uvicorn.Config:
    """Return how uvicorn is to serve a proxy, which is open for `connections`."""
    return uvicorn.Config(
        Limited(app, connections), host, port, http=connections.protocol(), ws="none", lifespan="off",
        loop="asyncio",  # in uvloop, TLS after pause_reading never gets on
        backlog=BACKLOG, log_level="warning",
        timeout_graceful_shutdown=0,  # those who wait for a message are not waited for at the end
    )  # fmt: skip


def certificate(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    return context


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("superlink", help="its URL")
    parser.add_argument("--superlink-ca", type=Path)
    parser.add_argument("--imports", type=Path, help="a file with the modules that a task imports, as a JSON list")
    parser.add_argument("--tls", type=Path, help="the folder of server.crt and server.key")
    args = parser.parse_args()
    connections = Connections(most_connections(), certificate(args.tls) if args.tls else None)
    app = proxy(args.superlink, args.superlink_ca, json.loads(args.imports.read_text("utf-8")) if args.imports else ())
    gc.freeze()  # a handshake that fails leaves its buffers, 256 KiB, to the garbage collector: so that it comes often
    gc.set_threshold(200, 5, 5)
    uvicorn.Server(served(app, connections, args.host, args.port)).run()


if __name__ == "__main__":
    main()
