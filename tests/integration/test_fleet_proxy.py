"""The proxy: calls of clients pass it unchanged, nothing else ever reaches the SuperLink, and "not yet" is held."""

import contextlib
import http.client
import logging
import random
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import federation.launch.fleet_proxy
from federation.launch import host
from federation.launch.fleet_proxy import NOT_YET, proxy
from federation.launch.network import LaunchError, free_port, imports_of, is_up
from federation.launch.process_group import process_group
from federation.security.certificates import make_authority, make_server
from tests.conftest import eventually
from tests.proxies import Upstream, ask, proxy_before, serving

Headers = list[tuple[str, str]]
CALL = "/v1/fleet/push-messages"
PULL = "/v1/fleet/pull-messages"
BINARY = "application/x-protobuf"
MIB = 2**20


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Upstream, int]]:
    upstream = Upstream()
    with serving(upstream) as port, proxy_before(f"http://127.0.0.1:{port}") as front:
        yield upstream, front


@pytest.fixture
def upstream(pair: tuple[Upstream, int]) -> Upstream:
    """Return what is behind the proxy, as if it had just been started."""
    pair[0].__init__()  # type: ignore[misc]
    return pair[0]


@pytest.fixture
def port(pair: tuple[Upstream, int]) -> int:
    return pair[1]


# --------------------------------------------------------------------------------------------------- what passes it


@pytest.mark.parametrize("status", [200, 204, 401, 404, 422, 500, 503])
def test_a_call_passes_unchanged_and_so_does_the_answer(upstream: Upstream, port: int, status: int) -> None:
    upstream.status, upstream.headers = status, [(b"content-type", BINARY.encode()), (b"x-flwr", b"\xe9t\xe9")]
    upstream.answer = b"" if status == 204 else b"\0answer\xff"
    sent = [
        ("Content-Type", BINARY),
        ("X-Public-Key", "a+b/c="),
        ("X-Flwr", "\xe9t\xe9"),
        ("Authorization", "Bearer 1"),
    ]
    answered, headers, body = ask(port, "POST", CALL, b"\0question\xff", sent)
    (request,) = upstream.seen
    assert (request.method, request.path, request.query, request.body) == ("POST", CALL, b"", b"\0question\xff")
    assert request.headers.items() >= {name.lower(): value for name, value in sent}.items()
    assert (answered, body) == (status, upstream.answer)
    assert (headers["content-type"], headers["x-flwr"]) == (BINARY, "\xe9t\xe9")


@pytest.mark.parametrize("pieces", [None, 7], ids=["with its length", "chunked"])
@pytest.mark.parametrize("size", [0, 1, 5 * MIB])
def test_a_body_of_any_size_passes(upstream: Upstream, port: int, size: int, pieces: int | None) -> None:
    body = random.Random(size).randbytes(size)
    step = size // (pieces or 1) + 1
    sent = body if pieces is None else [body[start : start + step] for start in range(0, size, step)]
    status, _, answer = ask(port, "POST", CALL, sent)
    assert status == 200
    assert upstream.seen[0].body == body and answer == body


@pytest.mark.parametrize("call", ["register-node", "pull-messages", "push-object", "x"])
def test_every_call_of_clients_passes(upstream: Upstream, port: int, call: str) -> None:
    upstream.answer = b"answer"
    assert ask(port, "POST", f"/v1/fleet/{call}")[0] == 200
    assert [(request.method, request.path) for request in upstream.seen] == [("POST", f"/v1/fleet/{call}")]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_whether_the_superlink_is_well_may_be_asked(upstream: Upstream, port: int, method: str) -> None:
    assert ask(port, method, "/health")[0] == 200
    assert [(request.method, request.path) for request in upstream.seen] == [(method, "/health")]
    assert is_up(("127.0.0.1", port))


def test_clients_may_ask_which_modules_to_import_and_the_superlink_hears_nothing_of_it(upstream: Upstream) -> None:
    with serving(proxy("http://127.0.0.1:9", imports=["torch", "torch.nn"])) as front:
        assert imports_of(("127.0.0.1", front)) == ["torch", "torch.nn"]
        assert ask(front, "POST", "/imports")[0] == 405
    assert not upstream.seen


@pytest.mark.parametrize(
    ("status", "answer"), [(404, b'["torch"]'), (200, b"no JSON"), (200, b'{"a": 1}'), (200, b"[1]")]
)
def test_who_asks_takes_no_other_answer(upstream: Upstream, status: int, answer: bytes) -> None:
    upstream.status, upstream.answer = status, answer
    with serving(upstream) as server:
        assert imports_of(("127.0.0.1", server)) == []
    assert imports_of(("127.0.0.1", free_port())) == []


def test_no_header_that_is_meant_for_one_hop_passes(upstream: Upstream, port: int) -> None:
    hop = ["Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Upgrade", "X-Nominated"]
    sent = [(name, "mine") for name in hop] + [("Connection", "keep-alive, x-nominated"), ("X-End", "to end")]
    upstream.headers = [(name.lower().encode(), value.encode()) for name, value in sent]
    status, headers, _ = ask(port, "POST", CALL, [b"chunked"], sent)
    arrived = upstream.seen[0].headers
    assert status == 200
    assert arrived["x-end"] == headers["x-end"] == "to end"
    for name in [*hop, "Connection", "Transfer-Encoding"]:
        assert arrived.get(name.lower()) not in ("mine", "keep-alive, x-nominated")
        assert headers.get(name.lower()) not in ("mine", "keep-alive, x-nominated")
    assert arrived["host"] != "here", "it is the SuperLink's own, not that of the proxy"


def test_an_answer_is_not_compressed_for_one_who_has_not_asked_for_that(upstream: Upstream, port: int) -> None:
    ask(port, "POST", CALL)
    assert not {"accept-encoding", "accept", "user-agent"} & upstream.seen[0].headers.keys(), "nothing is added"


# ---------------------------------------------------------------------------------------------------- what is held

HELD = pytest.mark.parametrize(("path", "not_yet"), [(f"/v1/fleet/{call}", text) for call, text in NOT_YET.items()])


def test_what_is_held_is_what_flower_answers_when_there_is_nothing_yet() -> None:
    assert NOT_YET["pull-messages"] == PullMessagesResponse().SerializeToString()
    assert NOT_YET["pull-object"] == PullObjectResponse(object_found=True).SerializeToString()
    assert NOT_YET["pull-object"] != PullObjectResponse().SerializeToString(), "an object that will never come"


@HELD
def test_the_answer_not_yet_is_held_until_there_is_another(
    upstream: Upstream, port: int, path: str, not_yet: bytes
) -> None:
    upstream.first, upstream.answer = [not_yet] * 3, b"message"
    assert ask(port, "POST", path, b"question", [("X-Signature", "s")])[::2] == (200, b"message")
    assert [(request.body, request.headers["x-signature"]) for request in upstream.seen] == [(b"question", "s")] * 4


@HELD
def test_no_error_is_held(upstream: Upstream, port: int, path: str, not_yet: bytes) -> None:
    upstream.status, upstream.answer = 401, not_yet
    assert ask(port, "POST", path)[::2] == (401, not_yet)
    assert len(upstream.seen) == 1


def test_nothing_is_held_for_ever(upstream: Upstream, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation.launch.fleet_proxy, "HOLD", 0.3)
    upstream.answer = b""
    assert ask(port, "POST", PULL)[::2] == (200, b"")
    assert len(upstream.seen) > 1


def test_nothing_is_asked_for_a_client_that_has_gone(upstream: Upstream, port: int) -> None:
    upstream.answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"POST {PULL} HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n".encode())
        eventually(lambda: len(upstream.seen) > 1, 10)
    ended = len(upstream.seen)
    for _ in range(10):  # each may take a turn of its own
        assert ask(port, "GET", "/health")[0] == 200
        time.sleep(federation.launch.fleet_proxy.PACE)
    assert len([request for request in upstream.seen[ended:] if request.path == PULL]) <= 1


def test_hundreds_may_wait_and_all_are_answered_once_there_is_something(upstream: Upstream, port: int) -> None:
    upstream.answer = b""
    with ThreadPoolExecutor(100) as clients:
        waiting = [clients.submit(ask, port, "POST", PULL) for _ in range(100)]
        eventually(lambda: len(upstream.seen) > 110, 10)
        started, asked = time.monotonic(), len(upstream.seen)
        eventually(lambda: time.monotonic() > started + 1, 10)
        assert len(upstream.seen) - asked < 2 / federation.launch.fleet_proxy.PACE, "the more, the rarer"
        upstream.answer = b"message"
        assert {future.result(5)[2] for future in waiting} == {b"message"}
    assert len(upstream.seen) < 100 * 4


# ---------------------------------------------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/v1/fleet", "/v1/fleet/", "/v1/control/start-run", "/v1/control/register-node",
        "/v1/runtime/pull-task-input", "/docs", "/redoc", "/openapi.json", "/metrics",
        "//v1/fleet/get-run", "/v1//fleet/get-run", "/v1/fleet//get-run", "/v1/fleet/get-run/", "/v1/fleet/get-run/x",
        "/v1/fleet/../control/start-run", "/v1/fleet/..", "/v1/fleet/.", "/v1/./fleet/get-run", "/../v1/fleet/get-run",
        "/v1/fleet/..%2Fcontrol%2Fstart-run", "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run%00", "/v1/fleet/get-run%0A", "/v1/fleet/get-run%20", "/v1/fleet/get-run%3Fx",
        "/v1/fleet/get_run", "/v1/fleet/get-run1", "/v1/fleet/get-run;x", "/v1/fleet/get.run", "/v1/fleet/\\control",
        "/V1/fleet/get-run", "/v1/FLEET/get-run", "/v1/fleet/Get-Run", "/v1/fleet/%C3%A9", "/v1/fleet/%FF",
        "/health/", "/Health", "//health", "/health/x", "*", "http://here/v1/control/start-run",
    ],
)  # fmt: skip
def test_nothing_else_is_there_and_nothing_else_reaches_the_superlink(upstream: Upstream, port: int, path: str) -> None:
    for method in ("POST", "GET"):
        status = ask(port, method, path)[0]
        assert status in (400, 404) or (method, status) == ("GET", 405)
    assert upstream.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "post"])
def test_a_call_is_made_in_no_other_way(upstream: Upstream, port: int, method: str) -> None:
    assert ask(port, method, CALL)[0] in (400, 404, 405)
    assert ask(port, "GET" if method == "post" else "POST", "/health")[0] in (200, 405)
    assert [request.path for request in upstream.seen] == ["/health"] * (method == "post")


@pytest.mark.parametrize("host", ["here/v1/control/start-run?", "here/v1/control/x#", "[::1", "@there", "a b", ""])
def test_a_hosts_name_leads_nowhere_else(upstream: Upstream, port: int, host: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"POST {CALL} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
    assert response.status in (200, 400)
    assert [request.path for request in upstream.seen] == [CALL] * (response.status == 200)


def test_the_path_does_not_come_from_the_hosts_name(
    upstream: Upstream, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette takes the Host header and the path together for the URL: earlier versions, whatever the header is."""
    url = property(lambda _: SimpleNamespace(path="/v1/control/start-run"))
    monkeypatch.setattr(federation.launch.fleet_proxy.Request, "url", url)
    assert ask(port, "POST", CALL)[0] == ask(port, "GET", "/health")[0] == 200
    assert [request.path for request in upstream.seen] == [CALL, "/health"]


def test_a_query_goes_no_further(upstream: Upstream, port: int) -> None:
    assert ask(port, "POST", f"{CALL}?x=/v1/control/start-run")[0] == 200
    assert (upstream.seen[0].path, upstream.seen[0].query) == (CALL, b"")


@pytest.mark.parametrize("path", [CALL, "/health", "/v1/control/start-run", "/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_websocket_is_opened(upstream: Upstream, port: int, method: str, path: str) -> None:
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
               ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")]  # fmt: skip
    status = ask(port, method, path, headers=upgrade)[0]
    assert 400 <= status < 500
    assert upstream.seen == []


PIECES = [
    "v1", "fleet", "control", "runtime", "pull-messages", "start-run", "health", "", ".", "..", "%2e", "%2e%2e", "%2F",
    "..%2f", "%5c", "\\", "%00", "%0a", "%0D%0A", "%3F", "?", "#", ";", "%", "%zz", "V1", "Fleet", "%66leet", "%C3%A9",
]  # fmt: skip
PATHS = st.builds(
    lambda start, pieces, joint: start + joint.join(pieces),
    st.sampled_from(["/", "//", "", "/v1/", "/v1/fleet/", "/v1/fleet", "/health", "http://here/"]),
    st.lists(st.sampled_from(PIECES) | st.text(st.characters(min_codepoint=33, max_codepoint=126)), max_size=5),
    st.sampled_from(["/", "", "%2F", "//"]),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(["POST", "POST", "GET", "HEAD", "PUT"]), path=PATHS)
def test_whatever_path_is_tried_only_calls_of_clients_arrive(
    upstream: Upstream, port: int, method: str, path: str
) -> None:
    upstream.seen.clear()
    status = ask(port, method, path)[0]
    assert len(upstream.seen) == (status == 200)
    for request in upstream.seen:
        assert request.query == b""
        if request.method == "POST":
            assert re.fullmatch("/v1/fleet/[a-z-]+", request.path)
        else:
            assert request.method in ("GET", "HEAD") and request.path == "/health"


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_that_is_too_large_is_refused(
    upstream: Upstream, port: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation.launch.fleet_proxy, "MAX_REQUEST_BYTES", 1000)
    most, more = ([b"x" * 500] * 2, [b"x" * 500, b"y" * 501]) if chunked else (b"x" * 1000, b"x" * 1001)
    assert ask(port, "POST", CALL, more)[0] == 413
    assert upstream.seen == []
    assert ask(port, "POST", CALL, most)[0] == 200
    assert [len(request.body) for request in upstream.seen] == [1000]


def test_a_length_that_is_not_true_never_makes_a_whole_request(
    upstream: Upstream, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    for sent in (b"", b"half"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(f"POST {CALL} HTTP/1.1\r\nHost: here\r\nContent-Length: 8\r\n\r\n".encode() + sent)
    assert ask(port, "POST", CALL, b"whole")[0] == 200
    assert [request.body for request in upstream.seen] == [b"whole"]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == [], "strangers fill no log"


def test_those_who_never_finish_a_request_keep_nobody_out(upstream: Upstream, port: int) -> None:
    with contextlib.ExitStack() as stalled:
        for _ in range(110):  # httpx opens 100 connections, if it is told nothing else, and then waits
            connection = stalled.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(f"POST {CALL} HTTP/1.1\r\nHost: here\r\nContent-Length: 8\r\n\r\nhalf".encode())
        assert ask(port, "POST", CALL, b"whole")[0] == 200
        assert [request.body for request in upstream.seen] == [b"whole"]


def test_a_superlink_that_is_down_is_told_from_a_call_that_is_not_there() -> None:
    with proxy_before(f"http://127.0.0.1:{free_port()}") as port:
        assert ask(port, "POST", CALL, b"question")[::2] == (502, b"the SuperLink does not answer")
        assert ask(port, "GET", "/health")[0] == 502
        assert ask(port, "POST", "/v1/control/start-run")[0] == 404
        assert not is_up(("127.0.0.1", port))


@pytest.mark.parametrize("authority", ["keys", "other"])
def test_a_superlink_is_asked_only_if_its_certificate_is_of_the_right_authority(tmp_path: Path, authority: str) -> None:
    for name in ("keys", "other"):
        make_authority(tmp_path / name)
    make_server(tmp_path / "keys", ["127.0.0.1"])
    upstream = Upstream()
    with (
        serving(upstream, tmp_path / "keys") as behind,
        proxy_before(f"https://127.0.0.1:{behind}", tmp_path / authority / "ca.crt") as port,
    ):
        assert ask(port, "POST", CALL, b"question")[0] == (200 if authority == "keys" else 502)
    assert [request.body for request in upstream.seen] == [b"question"] * (authority == "keys")


# ----------------------------------------------------------------------------------------------- as a real process


def test_a_gate_is_opened_with_a_certificate_that_is_good_for_other_machines_only(tmp_path: Path) -> None:
    """As with the certificates of public authorities: they name no server localhost, or 127.0.0.1."""
    keys = tmp_path / "keys"
    make_authority(keys)
    make_server(keys, ["server.example"])
    upstream, port = Upstream(), free_port()
    with serving(upstream) as behind, process_group(tmp_path / "log.txt") as ours:
        host.start_proxy(ours, ("0.0.0.0", port), ("127.0.0.1", behind), None, keys, imports=["torch"])
        assert upstream.seen[-1].path == "/health"
        with pytest.raises(LaunchError, match=r"is not valid for '127\.0\.0\.1'"):
            is_up(("127.0.0.1", port), keys / "ca.crt")
    with socket.create_server(("127.0.0.1", port)):
        pass  # nobody holds the port any more
