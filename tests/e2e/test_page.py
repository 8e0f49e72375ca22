"""The page of a run in a real browser: from the first round to the last, with a client killed and another that fails.

Set PAGE_SCREENSHOTS to a folder to look at what the browser shows.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from federation.launch.network import free_port
from tests.conftest import ROOT, Terminals
from tests.processes import assert_all_gone, client
from tests.tasks import held_by
from tests.unit.test_page import HOSTILE, metrics, row

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
PHONE, DESK = {"width": 390, "height": 800}, {"width": 1200, "height": 900}
STRANGER = "STRANGER"  # the environment variable of a client whose training fails


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("there is no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="there is no Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Tab:
    """A tab of the browser, which notes what a page should never do: scripts of strangers, errors, other hosts."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.context = browser.new_context(**{"viewport": DESK} | settings)
        self.page, self.wrong, host = self.context.new_page(), [], re.findall("https?://[^/]+/", url)[0]
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append("a dialog"))
        self.page.on("request", lambda request: self.wrong.extend([request.url] * (not request.url.startswith(host))))
        self.page.goto(url)

    def wait_for(self, selector: str, text: str, seconds: float = 240) -> None:
        """Wait until a part of the page has this text; an error tells what the page says instead."""
        found = self.page.locator(selector).filter(has_text=text).first
        try:
            found.wait_for(timeout=seconds * 1000)
        except Exception as error:  # of a kind that Playwright, which may be missing, defines
            raise AssertionError(f"{error}\n{self.text()}") from None

    def text(self, selector: str = "body") -> str:
        return " ".join(self.page.locator(selector).inner_text().split())

    def picture(self, name: str) -> None:
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_run_is_watched_from_its_first_round_to_its_last(browser: Any, terminals: Terminals) -> None:
    gate, port = terminals.folder / "gate", free_port()
    fails = f"    if os.environ.get({STRANGER!r}):\n        raise ValueError({HOSTILE!r})\n"
    (terminals.folder / "tiny.py").write_text(held_by(gate).replace("    while os.path", f"{fails}    while os.path"))
    config = "--run-config", "round-timeout=15 fraction-evaluate=0.0"  # seconds: a killed client costs as many a round
    options = ["--task", "tiny", "--clients", "3", "--rounds", "2", *config, "--page", f"127.0.0.1:{free_port()}"]
    server = terminals.open("server.py", "--address", f"127.0.0.1:{port}", *options)
    server.wait_for("watch it at ")
    tab = Tab(browser, re.findall(r"watch it at (\S+)", server.text)[0])
    assert "The run has not begun yet" in tab.text("#head")
    tab.wait_for("#head", "waiting for 3 clients")  # and the server has tried the task, which would wait at the gate
    gate.touch()
    clients = [client(terminals, port) for _ in range(2)]
    clients.append(terminals.open("client.py", "--server", f"127.0.0.1:{port}", "--threads", "1", **{STRANGER: "1"}))
    tab.wait_for("#head", "Round 1 of 2: training, 1 of 3 clients have replied")
    tab.wait_for("#clients .training", "training")
    clients[0].process.kill()
    gate.unlink()
    tab.wait_for("#left-out", "no reply within 15 s")
    tab.wait_for("#left-out", HOSTILE)
    tab.wait_for("#head", "Round 2 of 2")
    tab.picture("running")
    assert tab.page.locator("#charts canvas").count() >= 2 and tab.page.title() == "round 2/2 · tiny"
    assert server.wait(120) == 0, server.text
    tab.wait_for("#head", "finished", 5)
    assert "2 of 2 rounds" in tab.text("#head") and tab.page.title() == "finished · tiny"
    assert tab.page.locator("#rounds tbody th").all_inner_texts() == ["2", "1", "0"], "without a reload"
    assert tab.page.locator("#clients .left-out, #clients .gone").count() == 2
    tab.picture("finished")
    assert tab.wrong == []
    assert [client.wait(60) for client in clients[1:]] == [0, 0]
    assert_all_gone(terminals)


@pytest.fixture
def shown(terminals: Terminals) -> Iterator[str]:
    """Show two runs, one of them of strangers; return the address."""
    said = [{"doing": "training", "reason": HOSTILE, "clients": [0]}]
    roster = metrics()["roster"] | {"name": [HOSTILE, "paris", "rome"], "own_data": [HOSTILE, "", ""]}
    hostile = {"roster": roster, "refused": [{"name": HOSTILE, "reason": HOSTILE}], "dataset": {"name": HOSTILE}}
    hostile |= {"rounds": [row(k, 3, left_out=said, **{f"server_{HOSTILE}": 1.0}) for k in range(4)]}
    for name, further in (("ours", {}), ("theirs", hostile)):
        (folder := terminals.folder / name).mkdir()
        (folder / "metrics.json").write_text(json.dumps(metrics(**further)))
        (folder / "log.txt").write_text(f"{HOSTILE}\n" * 50)
    runs = [str(terminals.folder / name) for name in ("ours", "home", "theirs")]
    command = terminals.open("-m", "federation.show", *runs, "--page", f"127.0.0.1:{free_port()}", PYTHONPATH=str(ROOT))
    command.wait_for("watch it at ")
    assert f"skipped {runs[1]}: it has no metrics.json" in command.text
    yield re.findall(r"watch it at (\S+)", command.text)[0]
    command.interrupt()
    assert command.wait(10) == 130
    assert_all_gone(terminals)


def test_what_strangers_say_does_not_run(browser: Any, shown: str) -> None:
    for name, path in (("compare", ""), ("strangers", "runs/2")):
        tab = Tab(browser, shown)
        tab.page.goto(shown + path)
        assert HOSTILE in tab.text() and tab.page.title() != "run"
        assert tab.page.locator("img").count() == 0 and tab.page.locator("script").count() == 2
        tab.picture(name)
        assert tab.wrong == []


def test_it_is_read_on_a_phone_in_the_dark_by_keyboard_and_without_scripts(browser: Any, shown: str) -> None:
    phone = Tab(browser, shown + "runs/1", viewport=PHONE, color_scheme="dark")
    phone.picture("phone")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "nothing sticks out"
    dark = phone.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150
    phone.page.keyboard.press("Tab")
    phone.page.keyboard.press("Enter")
    assert phone.page.url.endswith("#content")
    plain = Tab(browser, shown + "runs/1", java_script_enabled=False)
    plain.picture("plain")
    read = plain.text()
    assert all(part in read for part in ("finished", "3 of 3 rounds", "host/1", "server’s accuracy", "need JavaScript"))
    assert phone.wrong == plain.wrong == []
