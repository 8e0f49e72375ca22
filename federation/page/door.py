"""Who may see the page: on this machine whoever asks for it under its own name, elsewhere whoever has the token.

A page of another site could have its name resolve to 127.0.0.1 (DNS rebinding); the browser then still sends that name.
"""

import re
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "federation"
LOCAL = ("localhost", "127.0.0.1", "::1")
HOST = re.compile(r"\[([^\]]+)\](?::\d+)?|([^:]*)(?::\d+)?")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Door:
    """An ASGI app that lets in those who may see `app`, and says in every response what a browser must not do.

    With a `token`, that is who has it; without one, who names one of `hosts`, or this machine.
    """

    def __init__(self, app: ASGIApp, token: str = "", hosts: Iterable[str] = ()) -> None:
        self.app, self.token, self.hosts = app, token, {*LOCAL, *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.welcome(scope) if self.token else self.check_host(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def check_host(self, scope: Scope) -> Response | None:
        """Return a refusal unless a request is for a name of this machine."""
        named = HOST.fullmatch(Headers(scope=scope).get("host", ""))
        if named and (named[1] or named[2]).lower() in self.hosts:
            return None
        return PlainTextResponse("This page answers to the names of its own machine only.", 421)

    def welcome(self, scope: Scope) -> Response | None:
        """Return a refusal without the token; with that of a link, send the browser on, with a cookie instead."""
        connection = HTTPConnection(scope)
        if self.is_token(connection.query_params.get("token", "")):
            return self.hand_over(connection)
        if self.is_token(connection.cookies.get(COOKIE, "")):
            return None
        return PlainTextResponse("This page needs the token of the link that the server has printed.", 401)

    def is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.token.encode())

    def hand_over(self, connection: HTTPConnection) -> Response:
        """Keep the token out of the address that the browser shows, keeps, and perhaps shares."""
        query = urlencode([pair for pair in parse_qsl(connection.url.query) if pair[0] != "token"])
        response = RedirectResponse(connection.url.path + f"?{query}" * bool(query), 303)
        response.set_cookie(COOKIE, self.token, httponly=True, secure=True, samesite="strict")
        return response
