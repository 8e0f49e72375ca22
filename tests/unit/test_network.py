"""Addresses, and what a server that answers, or does not, is taken for: TLS that fails is explained in one line."""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest

from federation.launch.network import LaunchError, address, free_port, is_loopback, is_up, shown
from federation.security.certificates import make_authority, make_server

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


# ---------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("localhost:1", ("localhost", 1)),
        ("flower.example.org:65535", ("flower.example.org", 65535)),
        ("0.0.0.0:8080", ("0.0.0.0", 8080)),
        ("[::1]:8080", ("::1", 8080)),
        ("[::]:8080", ("::", 8080)),
        ("[fe80::1%eth0]:8080", ("fe80::1%eth0", 8080)),
    ],
)
def test_a_good_address_is_split_and_shown_as_it_was(text: str, expected: tuple[str, int]) -> None:
    assert address(text) == expected
    assert shown(expected) == text


def test_an_address_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match=r"'here' is not HOST:PORT, such as 127\.0\.0\.1:8080"):
        address("here")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("no-such-host.invalid", False),
        ("a..b", False),
    ],
)
def test_only_an_address_that_no_other_machine_reaches_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_name_with_any_address_that_others_reach_is_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    assert not is_loopback("both.example")


# ------------------------------------------------------------------------------------------------- is a server there?


@contextmanager
def listener(answer: bytes, tls: Path | None = None) -> Iterator[tuple[str, int]]:
    """Answer whatever comes in with these bytes, over TLS if a folder of a certificate is given, and hang up."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if tls:
        context.load_cert_chain(tls / "server.crt", tls / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    plain, _ = server.accept()
                except OSError:
                    return
                with suppress(OSError), context.wrap_socket(plain, server_side=True) if tls else plain as connection:
                    connection.settimeout(5)
                    if answer:
                        connection.recv(1000)
                        connection.sendall(answer)
                plain.close()

        thread = Thread(target=serve)
        thread.start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)  # ends accept()
        thread.join()


def made(folder: Path, *names: str, days: int = 1) -> Path:
    """Make an authority, if there is none yet, and a server's certificate for `names`."""
    if not (folder / "ca.crt").exists():
        make_authority(folder)
    make_server(folder, list(names), days)
    return folder


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(OK, True), (NOT_FOUND, False), (b"SSH-2.0-OpenSSH_9.6\r\n", False), (b"", False)],
    ids=["a server", "another web server", "no web server", "hangs up"],
)
def test_only_a_server_is_taken_for_one(answer: bytes, expected: bool) -> None:
    with listener(answer) as server:
        started = time.monotonic()
        assert is_up(server) is expected
        assert time.monotonic() - started < 2, "nobody is waited for in vain"


@pytest.mark.parametrize("answer", [OK, NOT_FOUND, b"garbage", b""], ids=["a server", "another", "garbage", "hangs up"])
def test_only_a_server_is_taken_for_one_over_tls(answer: bytes, tmp_path: Path) -> None:
    tls = made(tmp_path, "127.0.0.1")
    with listener(answer, tls) as server:
        assert is_up(server, tls / "ca.crt") is (answer == OK)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_where_nothing_listens_there_is_no_server(secure: bool, tmp_path: Path) -> None:
    ca = made(tmp_path, "127.0.0.1") / "ca.crt" if secure else None
    started = time.monotonic()
    assert not is_up(("127.0.0.1", free_port()), ca)
    assert not is_up(("no-such-host.invalid", 80), ca)
    assert not is_up(("a..b", 80), ca)
    assert time.monotonic() - started < 2


def test_a_server_that_hangs_up_before_the_handshake_is_none_and_has_no_fault_of_tls(tmp_path: Path) -> None:
    with listener(b"") as server:
        assert not is_up(server, made(tmp_path, "127.0.0.1") / "ca.crt")


def of_another_authority(folder: Path) -> Path:
    return made(folder.with_name("other"), "127.0.0.1")


def expired(folder: Path) -> Path:
    return made(folder, "127.0.0.1", days=-1)


def of_another_name(folder: Path) -> Path:
    return made(folder, "server.example", "10.0.0.1")


@pytest.mark.parametrize(
    ("serving", "reason"),
    [
        (of_another_authority, "is not trusted: unable to get local issuer certificate"),
        (expired, "is not trusted: certificate has expired"),
        (of_another_name, "is not trusted: IP address mismatch, certificate is not valid for '127.0.0.1'."),
        (None, "does not use TLS; start it with --tls, or omit --tls here"),
    ],
    ids=["another authority", "expired", "another name", "no TLS"],
)
def test_a_certificate_that_fails_is_explained(
    serving: Callable[[Path], Path] | None, reason: str, tmp_path: Path
) -> None:
    trusted = made(tmp_path / "keys", "127.0.0.1")
    ca = tmp_path / "ca.crt"
    ca.write_bytes((trusted / "ca.crt").read_bytes())
    with listener(OK, serving and serving(trusted)) as server, pytest.raises(LaunchError) as error:
        is_up(server, ca)
    assert str(error.value) == f"the server at 127.0.0.1:{server[1]} {reason}"


def test_without_tls_no_certificates_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 50 ms, and a client that waits for its server asks five times a second."""
    with listener(OK) as server:
        monkeypatch.setattr(ssl, "create_default_context", lambda **_: pytest.fail("certificates are loaded"))
        assert is_up(server)


@pytest.mark.parametrize("answer", [OK, b""], ids=["a server", "hangs up"])
def test_tls_where_none_was_asked_for_is_explained(answer: bytes, tmp_path: Path) -> None:
    with listener(answer, made(tmp_path, "127.0.0.1")) as server, pytest.raises(LaunchError) as error:
        is_up(server)
    reason = "uses TLS; add --tls DIR, with its authority's ca.crt"
    assert str(error.value) == f"the server at 127.0.0.1:{server[1]} {reason}"
