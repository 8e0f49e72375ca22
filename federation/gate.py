"""The gate: a proxy in front of the SuperLink, and the only part of the server that clients connect to.

A SuperLink serves three APIs on one port. The one for clients may ask for their keys; but the one that starts runs,
and registers keys, asks nobody who they are. So the SuperLink listens to this machine only, and the gate passes on the
calls of clients and nothing else. It also ends TLS.

And it makes clients fast. A SuperNode that finds no message sleeps for three seconds, and one that finds a message
before all of it has been uploaded sleeps for one. So the gate holds an answer that says "not yet": it asks the
SuperLink again until there is another one, for up to HOLD seconds (long polling).
"""

import argparse
import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MOST = 64 * 2**20  # bytes of a request; Flower sends models in pieces of 5 MiB
OWN = {"connection", "proxy-connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}  # for one hop
OWN |= {"host", "date", "server"}
NOT_YET = {  # by call, the answer that is held
    "pull-messages": b"",  # there is no message
    "pull-object": b"\x08\x01",  # object_found is true, object_available is not, and there is no content
}
HOLD = 20.0  # seconds; a SuperNode waits 30 for an answer
PACE = 0.05  # seconds between two questions, of all clients together
LONGEST_TURN = 5.0  # seconds until each client's question has been asked again, however many wait


class TooLargeError(Exception):
    """A request has more than MOST bytes."""


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


class Gate:
    """Passes the calls of clients on to the SuperLink at a URL."""

    def __init__(self, superlink: str, ca: Path | None) -> None:
        verify = ssl.create_default_context(cafile=ca) if ca else False
        limits = httpx.Limits(max_connections=None)  # or 100 that never finish their request would keep out all others
        self.client = httpx.AsyncClient(base_url=superlink, verify=verify, timeout=None, trust_env=False, limits=limits)
        self.client.headers.clear()  # it would ask for compressed answers, whatever the caller can read
        self.turns = Turns()

    async def pass_on(self, request: Request) -> Response:
        """Answer one call."""
        call = request.path_params.get("call")
        if call is not None and not re.fullmatch("[a-z-]+", call):
            return PlainTextResponse("no such call", 404)
        path = f"/v1/fleet/{call}" if call else "/health"  # not from request.url, which the Host header is a part of
        try:
            return await (self.hold(request, path, NOT_YET[call]) if call in NOT_YET else self.forward(request, path))
        except TooLargeError:
            return PlainTextResponse("too large", 413)
        except ClientDisconnect:
            return PlainTextResponse("incomplete", 400)  # nobody reads that
        except httpx.TransportError:
            return PlainTextResponse("the SuperLink does not answer", 502)

    async def forward(self, request: Request, path: str) -> Response:
        """Pass on a request, and the answer piece by piece."""
        answer = await self.ask(request, path, _limited(request))
        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = _without(answer.headers.raw)
        return response

    async def hold(self, request: Request, path: str, not_yet: bytes) -> Response:
        """Pass on a request again and again until the answer is another one than `not_yet`, or time is over."""
        question = b"".join([piece async for piece in _limited(request)])
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

    async def ask(self, request: Request, path: str, content: bytes | AsyncIterator[bytes]) -> httpx.Response:
        headers = _without(request.headers.raw)
        question = self.client.build_request(request.method, path, headers=headers, content=content)
        return await self.client.send(question, stream=True)


def gate(superlink: str, ca: Path | None = None) -> Starlette:
    """Return an app that passes the calls of clients on to the SuperLink at that URL."""
    pass_on = Gate(superlink, ca).pass_on
    calls = [Route("/health", pass_on, methods=["GET"]), Route("/v1/fleet/{call}", pass_on, methods=["POST"])]
    app = Starlette(routes=calls)
    app.router.redirect_slashes = False
    return app


async def _limited(request: Request) -> AsyncIterator[bytes]:
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MOST:
            raise TooLargeError
        yield piece


def _without(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    named = b",".join(value for name, value in headers if name.lower() == b"connection").decode("latin-1").lower()
    own = OWN.union(name.strip() for name in named.split(","))
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() not in own]


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("superlink", help="its URL")
    parser.add_argument("--superlink-ca", type=Path)
    parser.add_argument("--tls", type=Path, help="the folder of server.crt and server.key")
    args = parser.parse_args()
    tls = {"ssl_certfile": args.tls / "server.crt", "ssl_keyfile": args.tls / "server.key"} if args.tls else {}
    app = gate(args.superlink, args.superlink_ca)
    # Those who wait for a message are not waited for at the end
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=0, **tls)


if __name__ == "__main__":
    main()
