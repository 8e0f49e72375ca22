"""Serving the page of a run: a socket from the start, and a web server once somebody looks.

A run that nobody looks at pays for a socket and a thread that sleeps. The page is served by the launcher, which has
nothing to do while a run goes on; whatever goes wrong with it, the run goes on.
"""

import errno
import secrets
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from federation.app.run_folder import METRICS
from federation.launch.network import Address, LaunchError, address, is_loopback, shown
from federation.page.version import version_of

if TYPE_CHECKING:
    import uvicorn

DEFAULT = "127.0.0.1:8081"
PORTS = 20  # how many are tried, one after the other
CONNECTIONS = 64
LINGER = 1.5  # seconds that a browser which is looking has, at the end of a run, to ask once more


def read_address(text: str, tls: bool) -> Address | None:
    """Return where to serve the page, None for "off". Raises ValueError if others could look without TLS."""
    if text == "off":
        return None
    found = address(text)
    if not tls and not is_loopback(found[0]):
        raise ValueError(f"{text} is open to other machines: that takes --tls DIR, and the token in the printed link")
    return found


@contextmanager
def page(where: Address | None, folder: Path, tls: Path | None, taken: int = 0) -> Iterator[None]:
    """Serve the page of a run that begins now in a folder, but not on the port that is `taken` by the run itself.

    If it cannot be served, a line says why.
    """
    server = where and _open(where, folder, tls, taken)
    try:
        yield
        if server:
            server.linger()
    finally:
        if server:
            server.close()


def _open(where: Address, folder: Path, tls: Path | None, taken: int) -> "PageServer | None":
    try:
        return PageServer(where, [folder], tls, taken, stale=version_of(folder / METRICS))
    except LaunchError as error:
        print(f"no page: {error}", flush=True)
        return None


class PageServer:
    """A socket at which the page can be had, over TLS with a token where other machines can reach it."""

    def __init__(
        self, where: Address, folders: Sequence[Path], tls: Path | None, taken: int = 0, stale: str | None = None
    ) -> None:
        self.folders, self.stale = folders, stale
        self.is_open = not is_loopback(where[0])
        self.tls = tls if self.is_open else None
        self.token = secrets.token_urlsafe(24) if self.is_open else ""
        self.listener = listen(where, taken)
        self.address = where[0], int(self.listener.getsockname()[1])
        self.end, self.ended = socket.socketpair()
        self.looked, self.last_look = Event(), 0.0
        self.server: uvicorn.Server | None = None
        self.thread = Thread(target=self._serve, daemon=True)
        self.thread.start()
        print(f"watch it at {self.link}", flush=True)

    @property
    def link(self) -> str:
        token = f"?token={self.token}" if self.token else ""
        return f"http{'s' * bool(self.tls)}://{shown(self.address)}/{token}"

    def _serve(self) -> None:
        """Wait until somebody connects, or the run ends; then load what it takes to answer."""
        visitors, *_ = select.select([self.listener, self.ended], [], [])
        if self.ended in visitors:
            return
        try:
            self._load().run(sockets=[self.listener])
        except Exception as error:
            print(f"no page any more: {type(error).__name__}: {error}", flush=True)

    def _load(self) -> "uvicorn.Server":
        import uvicorn

        from federation.launch.fleet_proxy import certificate, served
        from federation.launch.limits import Connections
        from federation.page.app import page as app
        from federation.page.door import Door

        connections = Connections(CONNECTIONS, certificate(self.tls) if self.tls else None)
        connections.full = True  # it need not be said: it is no client that is kept out
        door = Door(app(self.folders, self._note, self.stale), self.token, [self.address[0]])
        self.server = uvicorn.Server(served(door, connections, *self.address, "critical"))
        return self.server

    def _note(self) -> None:
        self.last_look = time.monotonic()
        self.looked.set()

    def linger(self) -> None:
        """If somebody has just looked, wait until they have seen how the run has ended, but not long."""
        if time.monotonic() - self.last_look < 2 * LINGER:
            self.looked.clear()
            self.looked.wait(LINGER)

    def wait(self) -> int:
        """Serve until Ctrl-C; return the exit status if it ends before."""
        try:
            while self.thread.is_alive():  # a wait without a limit could not be interrupted on Windows
                self.thread.join(1)
            return 1
        finally:
            self.close()

    def close(self) -> None:
        if self.server:
            self.server.should_exit = True
        self.end.close()
        self.thread.join(2)
        self.listener.close()
        self.ended.close()


def listen(where: Address, taken: int = 0) -> socket.socket:
    """Return a socket at this address or, if its port is in use, at one of the next. Raises LaunchError."""
    host, first = where
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, min(first + PORTS, 65_536)):
        try:
            if port != taken:
                return socket.create_server((host, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise LaunchError(f"cannot listen on {shown((host, port))}: {error.strerror}") from None
    raise LaunchError(f"ports {first} to {port} of {host} are in use; choose another --page, or --page off")
