"""The gate: what of a SuperLink other machines can reach.

A SuperLink of Flower 1.42 serves three APIs on one port. The one for clients may ask for their keys; but the one that
starts runs, and registers keys, asks nobody who they are. So where others can connect, the SuperLink listens to this
machine only, and the gate, in front of it, passes on the calls of clients and nothing else. It also ends TLS.
"""

import argparse
import re
import ssl
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


class TooLargeError(Exception):
    """A request has more than MOST bytes."""


def gate(superlink: str, ca: Path | None = None) -> Starlette:
    """Return an app that passes the calls of clients on to the SuperLink at that URL."""
    verify = ssl.create_default_context(cafile=ca) if ca else False
    limits = httpx.Limits(max_connections=None)  # or 100 that never finish their request would keep out all others
    client = httpx.AsyncClient(base_url=superlink, verify=verify, timeout=None, trust_env=False, limits=limits)
    client.headers.clear()  # it would ask for compressed answers, whatever the caller can read

    async def pass_on(request: Request) -> Response:
        call = request.path_params.get("call")
        if call is not None and not re.fullmatch("[a-z-]+", call):
            return PlainTextResponse("no such call", 404)
        path = f"/v1/fleet/{call}" if call else "/health"  # not from request.url, which the Host header is a part of
        question = client.build_request(
            request.method, path, headers=_without(request.headers.raw), content=_limited(request)
        )
        try:
            answer = await client.send(question, stream=True)
        except TooLargeError:
            return PlainTextResponse("too large", 413)
        except ClientDisconnect:
            return PlainTextResponse("incomplete", 400)  # nobody reads that
        except httpx.TransportError:
            return PlainTextResponse("the SuperLink does not answer", 502)
        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = _without(answer.headers.raw)
        return response

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
    uvicorn.run(gate(args.superlink, args.superlink_ca), host=args.host, port=args.port, log_level="warning", **tls)


if __name__ == "__main__":
    main()
