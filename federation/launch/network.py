"""Addresses and ports, and whether a server answers at an address."""

import ipaddress
import re
import secrets
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx

from federation.launch.log import say

Address = tuple[str, int]  # host and port
PORTS = range(20_000, 32_000)
NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")  # in errors of OpenSSL


class LaunchError(Exception):
    """A failure that is explained in one line. It ends the program with status 1."""


def address(text: str) -> Address:
    """Split HOST:PORT, where HOST is a name, an IPv4 address or an IPv6 address in brackets. Raises ValueError."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if (
        not re.fullmatch(r"[\w.:%-]+" if bracketed else r"[\w.-]+", host)
        or not port.isdecimal()
        or not 0 < int(port) < 65536
    ):
        raise ValueError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    return host, int(port)


def shown(address: Address) -> str:
    """Return an address in the form HOST:PORT."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens at `host`."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):  # UnicodeError: not a valid host name
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def check_exposed(address: Address, tls: bool, insecure: bool) -> None:
    """Raise ValueError if other machines could connect without TLS and --insecure was not given."""
    if tls and insecure:
        raise ValueError("--insecure and --tls exclude each other")
    if tls or is_loopback(address[0]):
        return
    if not insecure:
        raise ValueError(f"--address {shown(address)} is open to other machines: use --tls DIR, or --insecure")
    say(f"WARNING: {shown(address)} is open to everyone who can connect, without TLS")


def free_port() -> int:
    """Return a free port outside the range of outgoing connections, which could take it before it is used."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", secrets.choice(PORTS))) as listener:
            return int(listener.getsockname()[1])


def check_free(address: Address) -> None:
    """Raise LaunchError if the server cannot listen there."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise LaunchError(f"cannot listen on {shown(address)}: {error.strerror}; choose another --address") from None


def is_up(server: Address, ca: Path | None = None, timeout: float = 2, any_name: bool = False) -> bool:
    """Return whether a server answers there, over TLS if `ca` is given: a file with the certificates to trust.

    With `any_name`, the server's certificate may have any name. Raises LaunchError if only one side uses TLS, or if the
    server's certificate is not trusted.
    """
    trusted = _trusted(ca, any_name)
    url = f"http{'s' * bool(ca)}://{shown(server)}/health"
    try:
        return httpx.get(url, verify=trusted, timeout=timeout, trust_env=False).status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        _explain(server, error, bool(ca))
        return False


def _trusted(ca: Path | None, any_name: bool = False) -> ssl.SSLContext | bool:
    """Return what a server's certificate is checked with, False without TLS: to load the system's takes 50 ms."""
    if not ca:
        return False
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = not any_name
    return context


def imports_of(server: Address, ca: Path | None = None) -> list[str]:
    """Return the framework modules that the server's task imports, or none if the server does not say."""
    try:
        trusted = _trusted(ca)
        answer = httpx.get(f"http{'s' * bool(ca)}://{shown(server)}/imports", verify=trusted, trust_env=False)
        named = answer.json() if answer.status_code == 200 else []
    except (httpx.HTTPError, OSError, ValueError):
        return []
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _explain(server: Address, error: Exception, secure: bool) -> None:
    """Raise LaunchError if a request failed because of TLS."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise LaunchError(f"the server at {shown(server)} is not trusted: {cause.verify_message}")
        if isinstance(cause, ssl.SSLError) and cause.reason in NO_TLS:
            raise LaunchError(
                f"the server at {shown(server)} does not use TLS; start it with --tls, or omit --tls here"
            )
    if not secure and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and speaks_tls(server):
        raise LaunchError(f"the server at {shown(server)} uses TLS; add --tls DIR, with its authority's ca.crt")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def speaks_tls(server: Address) -> bool:
    """Return whether a TLS handshake succeeds there, with any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        suppress(OSError),
        socket.create_connection(server, timeout=2) as connection,
        context.wrap_socket(connection, server_hostname=server[0]),
    ):
        return True
    return False
