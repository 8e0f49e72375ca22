"""The proxy in front of the SuperLink: the only part of the server that clients connect to.

A SuperLink serves three APIs on one port. The API for clients can require keys, but the API that starts runs and
registers keys has no authentication. Therefore the SuperLink only accepts connections from this machine, and the proxy
forwards the calls of clients and nothing else. It also terminates TLS.

The proxy also makes rounds faster. A SuperNode that finds no message waits for three seconds before it asks again, and
one second if it finds a message that is not completely uploaded. Therefore the proxy holds such an answer and repeats
the call until the answer changes, for up to HOLD seconds (long polling).

The SuperLink only receives complete requests; limits.py limits how long clients may take to send them.
"""

import argparse
import asyncio
import gc
import json
import logging
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
}  # these belong to one connection
HOP_BY_HOP |= {"host", "date", "server"}
NOT_YET = {  # the answers that are held, by call
    "pull-messages": b"",  # there is no message
    "pull-object": b"\x08\x01",  # object_found is true, object_available is not, and there is no content
}
HOLD = 20.0  # seconds; the timeout of a SuperNode is 30
PACE = 0.05  # seconds between two repeated calls, of all clients together
BACKLOG = 128  # connections that are accepted at once, or wait to be accepted
SUPERLINK = 256  # connections to the SuperLink, which usually has 1,024 file descriptors
LONGEST_TURN = 5.0  # seconds until the calls of all waiting clients have been repeated


class TooLargeError(Exception):
    """A request has more than MAX_REQUEST_BYTES bytes."""


class Turns:
    """Lets the waiting calls proceed one after another, at a pace that does not depend on their number.

    If one of them gets an answer, the others follow immediately, since most messages are sent to many clients at once.
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
    """Forwards the calls of clients to the SuperLink at a URL."""

    def __init__(self, superlink: str, ca: Path | None) -> None:
        verify = ssl.create_default_context(cafile=ca) if ca else False
        limits = httpx.Limits(max_connections=SUPERLINK)
        self.client = httpx.AsyncClient(base_url=superlink, verify=verify, timeout=None, trust_env=False, limits=limits)
        self.client.headers.clear()  # they ask for compressed answers, which the caller may not understand
        self.turns = Turns()

    async def pass_on(self, request: Request) -> Response:
        """Answer a call."""
        call = request.path_params.get("call")
        if call is not None and not re.fullmatch("[a-z-]+", call):
            return PlainTextResponse("no such call", 404)
        if request.headers.get("upgrade", "").lower() == "websocket":
            return PlainTextResponse("no WebSocket", 400)
        path = f"/v1/fleet/{call}" if call else "/health"  # request.url depends on the Host header
        try:
            question = await whole_body(request)
            if call in NOT_YET:
                return await self.hold(request, path, question, NOT_YET[call])
            return await self.forward(request, path, question)
        except TooLargeError:
            return PlainTextResponse("too large", 413)
        except ClientDisconnect:
            return PlainTextResponse("incomplete", 400)  # which nobody reads
        except httpx.TransportError:
            return PlainTextResponse("the SuperLink does not answer", 502)

    async def forward(self, request: Request, path: str, question: bytes) -> Response:
        """Forward a request, and stream the answer back."""
        answer = await self.ask(request, path, question)
        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = _without(answer.headers.raw)
        return response

    async def hold(self, request: Request, path: str, question: bytes, not_yet: bytes) -> Response:
        """Repeat a request until the answer is different from `not_yet`, or until HOLD seconds have passed."""
        deadline = time.monotonic() + HOLD
        answer, content = await self.whole(request, path, question)
        while answer.status_code == 200 and content == not_yet and time.monotonic() < deadline:
            await self.turns.next()
            if await request.is_disconnected():  # otherwise its message would be lost
                raise ClientDisconnect
            answer, content = await self.whole(request, path, question)
            if content != not_yet:
                self.turns.hurry()
        response = Response(content, answer.status_code)
        response.raw_headers = _without(answer.headers.raw)
        return response

    async def whole(self, request: Request, path: str, question: bytes) -> tuple[httpx.Response, bytes]:
        """Return the SuperLink's answer and its body, without decoding it."""
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
    """Return an app that forwards the calls of clients to the SuperLink at a URL.

    It also serves the names of the framework modules that the task `imports`, so that clients can import them early.
    """
    pass_on = FleetProxy(superlink, ca).pass_on
    calls = [Route("/health", pass_on, methods=["GET"]), Route("/v1/fleet/{call}", pass_on, methods=["POST"])]
    calls.append(Route("/imports", lambda request: JSONResponse(list(imports)), methods=["GET"]))
    app = Starlette(routes=calls)
    app.router.redirect_slashes = False
    return app


async def whole_body(request: Request) -> bytes:
    """Return the body of a request once it is complete. Raises TooLargeError."""
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


def served(app: ASGIApp, connections: Connections, host: str, port: int, log_level: str = "warning") -> uvicorn.Config:
    """Return the settings with which uvicorn serves an app that accepts `connections`."""
    return uvicorn.Config(
        Limited(app, connections), host, port, http=connections.protocol(), ws="none", lifespan="off",
        loop="asyncio",  # with uvloop, start_tls never returns after pause_reading
        backlog=BACKLOG, log_level=log_level, log_config=None,  # its own would close the handlers of others
        timeout_graceful_shutdown=0,  # do not wait for held calls
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
    logging.basicConfig(format="%(levelname)s: %(message)s")
    connections = Connections(most_connections(), certificate(args.tls) if args.tls else None)
    app = proxy(args.superlink, args.superlink_ca, json.loads(args.imports.read_text("utf-8")) if args.imports else ())
    gc.freeze()  # a failed handshake leaves 256 KiB to the garbage collector, so run it often
    gc.set_threshold(200, 5, 5)
    uvicorn.Server(served(app, connections, args.host, args.port)).run()


if __name__ == "__main__":
    main()
