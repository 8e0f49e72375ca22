"""The page of a run: what it shows of a run folder, whom it lets in, and that strangers' text stays text."""

import html
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from federation.app.config import defaults
from federation.launch import page as launch
from federation.launch import server_command
from federation.launch.command_line import run_script
from federation.launch.network import LaunchError
from federation.page import curves, shown
from federation.page.app import page
from federation.page.door import Door
from federation.page.folder import RunFolder
from federation.page.view import make_view, shade
from federation.security.certificates import make_authority, make_server
from federation.show import show

HOSTILE = """<script>document.title='run'</script><img src=x onerror="alert(1)">"""
ESCAPED = "&lt;script&gt;document.title=&#39;run&#39;&lt;/script&gt;&lt;img src=x onerror=&#34;alert(1)&#34;&gt;"


def row(number: int, clients: int, **further: Any) -> dict[str, Any]:
    """Return a round of metrics.json in which client k has a loss of k."""
    ours = list(range(clients))
    tested = {"client": ours, "samples": [5] * clients, "loss": [float(k) for k in ours], "seconds": [0.1] * clients}
    return {
        "round": number, "train_loss": 2.0, "clients_loss": 1.5, "server_loss": 1 / (number + 1),
        "server_accuracy": 0.5, "clients": clients, "seconds": 4.0, "waiting_seconds": 1.0, "dropped": 0,
        "bytes_down": 2000, "bytes_up": 1000, "tested": tested, "left_out": [],
    } | further  # fmt: skip


def metrics(length: int = 3, clients: int = 3, **further: Any) -> dict[str, Any]:
    """Return a metrics.json of a run with so many rounds and clients."""
    ours = list(range(clients))
    roster = {"client": ours, "name": [f"host/{k}" for k in ours], "here": [True] * clients, "train": [10] * clients}
    roster |= {"test": [5] * clients, "own_data": [""] * clients, "trained": [length] * clients}
    return {
        "task": "cifar", "dataset": {"name": "/data/images", "train": 100, "test": 20}, "status": "finished",
        "config": defaults() | {"num-server-rounds": length}, "versions": {"flwr": "1.42.0"},
        "partitions": {"train": [[k, 10 * k] for k in ours]}, "rounds": [row(k, clients) for k in range(length + 1)],
        "roster": roster, "now": {}, "left_out": [], "refused": [], "best": None, "final_weights_sha256": "ab" * 32,
    } | further  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def folder(name: str = "run", log: str = "", **further: Any) -> Path:
        (path := tmp_path / name).mkdir(exist_ok=True)
        (path / "metrics.json").write_text(json.dumps(metrics(**further)))
        (path / "log.txt").write_text(log)
        return path

    return folder


def visitor(*folders: Path, token: str = "", host: str = "127.0.0.1:8081") -> TestClient:
    scheme = "https" if token else "http"
    return TestClient(Door(page(folders), token), f"{scheme}://{host}", follow_redirects=False)


def text_of(page: str) -> str:
    """Return what of a page is to be read, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


# ------------------------------------------------------------------------------------------------------- what it shows


def test_a_finished_run_is_shown_whole(folder: Callable[..., Path]) -> None:
    answer = visitor(folder(log="federation: client 0 joined\nfederation# {}\n\x1b[92mINFO\x1b[0m : done\n")).get("/")
    read = text_of(answer.text)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    parts = "cifar on images", "finished", "3 of 3 rounds", "accuracy 0.5000 of the server", "sent to clients 8 kB"
    for part in (*parts, "received 4 kB", "time in all 20 s", "host/2", "took part", "Nobody was left out", "SHA-256"):
        assert part in read, part
    assert "client 0 joined INFO : done" in read and "federation#" not in read and "\x1b" not in answer.text
    assert 'http-equiv="refresh"' not in answer.text, "nothing changes any more"


def test_a_run_that_goes_on_says_what_it_does_and_who_is_missing(folder: Callable[..., Path]) -> None:
    now = {"doing": "training", "since": time.time() - 3, "round_since": time.time() - 3, "asked": 3, "pending": [1]}
    left_out = [{"doing": "training", "reason": "out of memory", "clients": [0]}]
    roster = metrics()["roster"] | {"here": [True, True, False]}
    config = defaults() | {"num-server-rounds": 10}
    run = folder(status="running", now=now, left_out=left_out, roster=roster, config=config)
    whole = visitor(run).get("/").text
    read = text_of(whole)
    assert "Round 4 of 10 : training, 2 of 3 clients have replied" in read
    assert "time left 25 s" in read, "seven rounds of four seconds, less the three that this one has taken"
    assert re.search("0 host/0 left out out of memory .* 2 host/2 gone .* 1 host/1 training", read)
    assert "4 training 0 (host/0) out of memory" in read and 'http-equiv="refresh"' in whole


@pytest.mark.parametrize("place", ["name", "own_data"])
def test_what_strangers_say_is_text(place: str, folder: Callable[..., Path]) -> None:
    roster = metrics()["roster"] | {place: [HOSTILE, "", ""]}
    said = [{"doing": "training", "reason": HOSTILE, "clients": [0]}]
    rounds = [row(0, 3), row(1, 3, left_out=said, **{f"clients_{HOSTILE}": 1.0})]
    run = folder(
        roster=roster, rounds=rounds, left_out=said, task=HOSTILE, refused=[{"name": HOSTILE, "reason": HOSTILE}],
        dataset={"name": HOSTILE}, config={"strategy": HOSTILE}, versions={"flwr": HOSTILE}, log=f"{HOSTILE}\n",
    )  # fmt: skip
    for whole in (visitor(run).get("/").text, visitor(run, folder("other")).get("/").text):
        assert ESCAPED in whole
        assert re.findall(r"<(?:script|img)\b[^>]*>", whole) == [
            '<script src="/static/uPlot.iife.min.js" defer>', '<script src="/static/page.js" defer>',
        ]  # fmt: skip
    assert "innerHTML" not in (Path(launch.__file__).parents[1] / "page" / "static" / "page.js").read_text()


def test_curves_show_the_range_and_the_middle_half_of_the_clients() -> None:
    drawn = curves.charts([row(k, 9) for k in range(3)])
    loss = {curve["role"]: curve["values"] for curve in drawn["charts"][1]["curves"]}
    assert [chart["title"] for chart in drawn["charts"]] == ["accuracy", "loss", "seconds per round", "bytes per round"]
    assert drawn["x"] == [0, 1, 2] and loss["server"] == [1.0, 0.5, 0.33333]
    assert [loss[role][1] for role in ("lowest", "low", "high", "highest")] == [0.0, 2.0, 6.0, 8.0]


def test_a_thousand_rounds_and_clients_make_no_heavy_page(folder: Callable[..., Path]) -> None:
    lean = row(0, 1000) | {"tested": row(0, 20)["tested"]}
    rounds = [lean | {"round": number} for number in range(1000)] + [row(1000, 1000)]
    run = folder(rounds=rounds, clients=1000, partitions={"train": [[k % 7] * 10 for k in range(1000)]})
    drawn = curves.charts(rounds)
    assert len(drawn["x"]) <= curves.POINTS and drawn["x"][-1] == 1000 and drawn["step"] == 3
    whole = visitor(run).get("/").text
    assert len(whole) < 300_000 and "Show all 1,000" in whole and "Show all 1,001" in whole
    assert whole.count("<tr>") < 250 and visitor(run).get("/?all=clients").text.count("host/") == 1000


@pytest.mark.parametrize(
    "found", [{}, {"rounds": []}, {"rounds": [{"round": 0, "server_loss": 1.0}]}, {"rounds": [{}]}, {"status": 3}]
)
def test_metrics_of_others_are_shown_as_far_as_they_go(found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    answer = visitor(tmp_path).get("/")
    assert answer.status_code == 200 and "unknown" in answer.text and "cannot be read" not in answer.text


@pytest.mark.parametrize("text", ["", '{"rounds": [{"rou', "[]", '{"rounds": 3}', "\x00\xff"])
def test_a_damaged_file_is_said_and_what_was_read_before_stays(text: str, folder: Callable[..., Path]) -> None:
    run = folder()
    client = visitor(run)
    assert client.get("/").status_code == 200
    (run / "metrics.json").write_text(text)
    damaged = client.get("/")
    read = text_of(damaged.text)
    assert damaged.status_code == 200 and "metrics.json cannot be read" in read and "3 of 3 rounds" in read
    fresh = RunFolder(run).refresh()
    assert fresh["damage"] and not fresh["rounds"]


def test_a_browser_gets_a_page_again_only_if_something_has_changed(folder: Callable[..., Path]) -> None:
    run = folder()
    client = visitor(run)
    tag = {"If-None-Match": client.get("/").headers["etag"]}
    unchanged = client.get("/", headers=tag)
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert client.get("/?all=rounds", headers=tag).status_code == 200
    (run / "log.txt").write_text("more")
    changed = client.get("/", headers=tag)
    assert changed.status_code == 200 and "more" in changed.text


def test_a_large_file_is_not_read_all_the_time(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(folder())
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now.__setitem__(0, now[0] + 2) or now[0])
    assert run.refresh()["done"] == 3
    folder(rounds=[row(0, 3)])
    assert run.refresh()["done"] == 3, "it took seconds: twenty times as many have to pass"
    now[0] += 100
    assert run.refresh()["done"] == 0


def test_several_runs_are_compared(folder: Callable[..., Path]) -> None:
    one = folder("one")
    other = folder("other", config=defaults() | {"num-server-rounds": 3, "strategy": "fedprox"}, rounds=[row(0, 2)])
    client = visitor(one, other)
    whole = client.get("/").text
    read = text_of(whole)
    assert "2 runs, side by side" in read and 'strategy "fedavg" "fedprox"' in read
    assert "learning-rate" not in read, "in which they do not differ"
    assert "3 of 3" in text_of(client.get("/runs/1").text) and "0 of 3" in text_of(client.get("/runs/2").text)
    assert [client.get(f"/runs/{number}").status_code for number in (0, 3)] == [404, 404]
    drawn = curves.compared([("one", [row(k, 2) for k in range(4)]), ("other", [row(0, 2)])])
    assert [curve["values"] for curve in drawn["charts"][0]["curves"]] == [[0.5] * 4, [0.5, None, None, None]]


def test_numbers_are_shown_as_people_write_them() -> None:
    spans = [0.04, 6.12, 59.4, 61, 3600, 7260, 90_000, None]
    assert [shown.seconds(span) for span in spans] == [
        "0.0 s",
        "6.1 s",
        "59 s",
        "1 min 1 s",
        "1 h",
        "2 h 1 min",
        "1 d 1 h",
        "–",
    ]
    assert [shown.size(count) for count in (0, 999, 1000, 1_254_000, 2e13, None)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.25 MB",
        "20 TB",
        "–",
    ]
    assert [shown.number(value) for value in (0.12345, 1234, 1e-7, None, "x")] == ["0.1235", "1,234", "1e-07", "–", "x"]
    assert [shade(count, 1000) for count in (0, 1, 500, 1000)] == [0, 1, 5, 10]


def test_clients_of_an_earlier_version_are_known_from_what_they_trained(tmp_path: Path) -> None:
    trained = {"client": [4, 7], "samples": [10, 20], "loss": [1.0, 2.0], "seconds": [1.0, 1.0]}
    view = make_view(tmp_path, {"rounds": [row(0, 0), row(1, 2) | {"trained": trained}], "status": "finished"})
    assert [(client["client"], client["train"], client["state"]) for client in view["clients"]] == [
        (4, 10, "took part"), (7, 20, "took part"),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- who may see it


def test_every_answer_forbids_what_a_page_should_not_do(folder: Callable[..., Path]) -> None:
    client = visitor(folder())
    for path in ("/", "/static/page.js", "/nowhere"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert headers["x-content-type-options"] == "nosniff" and "*" not in headers["content-security-policy"]
    assert "style=" not in client.get("/").text, "which the policy would ignore"
    assert client.post("/").status_code == 405


@pytest.mark.parametrize("host", ["127.0.0.1:8081", "localhost", "LOCALHOST:9000", "[::1]:8081", "127.0.0.1"])
def test_this_machine_may_look(host: str, folder: Callable[..., Path]) -> None:
    assert visitor(folder()).get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8081", "localhost:80:80", "[::1", "", "a b"])
def test_a_name_that_somebody_else_resolves_to_this_machine_is_refused(host: str, folder: Callable[..., Path]) -> None:
    answer = visitor(folder()).get("/", headers={"host": host})
    assert answer.status_code == 421 and "cifar" not in answer.text


def test_elsewhere_the_token_of_the_link_is_needed(folder: Callable[..., Path]) -> None:
    client = visitor(folder(), token="secret", host="server.example:8081")
    for path in ("/", "/static/page.js", "/?token=", "/?token=secre", "/?token=secret%C3%A9"):
        assert client.get(path).status_code == 401, path
    client.cookies.set("federation", "wrong")
    assert client.get("/").status_code == 401
    client.cookies.clear()
    welcome = client.get("/?all=rounds&token=secret")
    assert (welcome.status_code, welcome.headers["location"]) == (303, "/?all=rounds")
    assert all(word in welcome.headers["set-cookie"] for word in ("HttpOnly", "Secure", "SameSite=strict"))
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("address", ["0.0.0.0:8081", "[::]:8081", "192.0.2.1:80"])
def test_other_machines_may_look_only_over_tls(address: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(address)} is open to other machines: .*--tls DIR"):
        launch.read_address(address, tls=False)
    assert launch.read_address(address, tls=True)
    assert launch.read_address("127.0.0.1:8081", tls=False) == ("127.0.0.1", 8081)
    assert launch.read_address("off", tls=False) is None


def test_an_open_page_is_refused_before_anything_starts(failed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    for value, named in (("0.0.0.0:8081", "--tls DIR"), ("8081", "'8081' is not HOST:PORT")):
        status, text = failed(server_command.main, "server.py", "--simulate", "2", "--page", value)
        assert status == 2 and text.count("\n") == 1 and "'--page'" in text and named in text
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- serving it


@pytest.fixture
def busy() -> Iterator[int]:
    """Return a port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def test_the_next_port_is_taken_if_one_is_in_use(busy: int, folder: Callable[..., Path], capsys: Any) -> None:
    with launch.page(("127.0.0.1", busy), folder(), None):
        [address] = re.findall(r"^watch it at http://(127\.0\.0\.1:\d+)/$", capsys.readouterr().out, re.M)
        assert busy < int(address.rpartition(":")[2]) <= busy + launch.PORTS
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{address}/", trust_env=False)


def test_a_run_goes_on_without_a_page(
    busy: int, folder: Callable[..., Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "PORTS", 1)
    with launch.page(("127.0.0.1", busy), folder(), None):
        assert f"no page: ports {busy} to {busy} of 127.0.0.1 are in use" in capsys.readouterr().out
    with launch.page(("192.0.2.1", busy), folder(), None):
        assert f"no page: cannot listen on 192.0.2.1:{busy}: " in capsys.readouterr().out
    with launch.page(None, folder(), None):
        assert capsys.readouterr().out == ""
    with pytest.raises(LaunchError, match="choose another --page, or --page off"):
        launch.listen(("127.0.0.1", busy))


def test_the_port_of_the_run_itself_is_left_to_it(busy: int) -> None:
    with launch.listen(("127.0.0.1", busy + 1), taken=busy + 1) as listener:
        assert listener.getsockname()[1] > busy + 1


def test_it_is_served_to_whoever_comes_and_once_more_at_the_end(folder: Callable[..., Path], capsys: Any) -> None:
    earlier = folder()
    with launch.page(("127.0.0.1", 8081), earlier, None):
        [url] = re.findall(r"http://\S+", capsys.readouterr().out)
        read = text_of(httpx.get(url, trust_env=False).text)
        assert "The run has not begun yet" in read and "finished" not in read, "what is there is of another run"
        folder(status="running")
        assert "running" in httpx.get(url, trust_env=False).text
        assert httpx.get(url, headers={"host": "evil.example"}, trust_env=False).status_code == 421
        began = time.monotonic()
    assert launch.LINGER <= time.monotonic() - began < launch.LINGER + 3, "nobody has asked again"
    assert capsys.readouterr() == ("", "")


def test_over_tls_it_is_served_with_a_token(folder: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    make_authority(tmp_path / "keys")
    make_server(tmp_path / "keys", ["localhost", "127.0.0.1"])
    server = launch.PageServer(("0.0.0.0", 8081), [folder()], tmp_path / "keys")
    try:
        [link] = re.findall(r"^watch it at (https://0\.0\.0\.0:\d+/\?token=[\w-]{32})$", capsys.readouterr().out, re.M)
        url = link.replace("0.0.0.0", "127.0.0.1")
        trust = ssl.create_default_context(cafile=tmp_path / "keys" / "ca.crt")
        with httpx.Client(verify=trust, trust_env=False, follow_redirects=True) as client:
            assert client.get(url.partition("?")[0]).status_code == 401
            assert "3 of 3" in text_of(client.get(url).text) and "token" not in str(client.get(url).url)
    finally:
        server.close()


def test_folders_that_are_no_runs_are_named(failed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, text = failed(lambda: run_script(show), "show.py", "empty", "nowhere")
    assert status == 2 and "empty, nowhere: no run folder, which has a metrics.json" in text
