"""The log of a server or a client: times, levels, JSON, and the line that says why something failed."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from federation.app.console import CONTROL, PREFIX
from federation.launch import log
from federation.launch.log import Log, read, say
from federation.launch.process_group import open_private
from tests.screen import printed_on_a_terminal, screen

STARTED = "\x1b[92mINFO \x1b[0m:      Starting Flower SuperLink\n"
RELAYS = f"""
from types import SimpleNamespace
from federation.launch.log import Log
from federation.launch.process_group import open_private, relay

doing = '{CONTROL}{{"progress": [%d, 3], "doing": "testing"}}'
for lines in ["{PREFIX}waiting"], ["{PREFIX}round 1", doing % 1, doing % 2, "{PREFIX}round 2"]:
    relay(SimpleNamespace(stdout=lines), Log(open_private("log.txt")))
"""


@pytest.fixture(autouse=True)
def style(monkeypatch: pytest.MonkeyPatch) -> Iterator[log.Style]:
    usual = log.Style()
    monkeypatch.setattr(log, "style", usual)
    yield usual


@pytest.fixture
def ours(tmp_path: Path) -> Log:
    return Log(open_private(tmp_path / "log.txt"))


def lines(ours: Log) -> list[str]:
    ours.flush()
    return Path(ours.name).read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        (STARTED, "INFO", "Starting Flower SuperLink"),
        ("\x1b[93mWARNING \x1b[0m:   no TLS\n", "WARNING", "no TLS"),
        ("2026-11-26T05:54:02.935Z INFO [uvicorn.error] Started\n", "INFO", "[uvicorn.error] Started"),
        ("ERROR:    Cancel 0 running task(s)\n", "ERROR", "Cancel 0 running task(s)"),
        ("ValueError: no such data\n", "ERROR", "ValueError: no such data"),
        ("  1 | import x\n", "INFO", "  1 | import x"),
        ("INFORMATION\n", "INFO", "INFORMATION"),
        (f"{PREFIX}client 0 joined\n", "INFO", "client 0 joined"),
        (f"{PREFIX}WARNING: it is open\n", "WARNING", "WARNING: it is open"),
        (f"{PREFIX}the run failed: no clients\n", "ERROR", "the run failed: no clients"),
        (f'{CONTROL}{{"progress": [1, 2]}}\n', "DEBUG", f'{CONTROL}{{"progress": [1, 2]}}'),
    ],
)
def test_a_line_has_the_level_that_its_program_gave_it(line: str, level: str, message: str) -> None:
    assert (read(line).levelname, read(line).getMessage()) == (level, message)


def test_a_line_of_the_log_has_a_time_in_iso_8601_with_milliseconds(ours: Log) -> None:
    before = datetime.now().astimezone()
    ours.write(STARTED)
    ours.write("\n")
    (line,) = lines(ours)
    time, level, message = line.split(" ", 2)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", time)
    assert abs((datetime.fromisoformat(time) - before).total_seconds()) < 10
    assert (level, message) == ("INFO", "Starting Flower SuperLink")


def test_percent_signs_are_no_placeholders(ours: Log) -> None:
    ours.write("100%s of it\n")
    assert lines(ours)[0].endswith(" INFO 100%s of it")


def test_json_is_an_object_per_line_in_the_log_and_on_the_terminal(
    ours: Log, style: log.Style, capsys: pytest.CaptureFixture[str]
) -> None:
    style.set("json", verbose=False)
    ours.write(STARTED)
    say("WARNING: übrigens\n")
    for text in (lines(ours)[0], capsys.readouterr().out):
        found = json.loads(text)
        assert list(found) == ["time", "level", "message"] and datetime.fromisoformat(found["time"])
    assert (found["level"], found["message"]) == ("WARNING", "WARNING: übrigens")


def test_verbose_shows_other_lines_too_and_none_twice(
    ours: Log, style: log.Style, capsys: pytest.CaptureFixture[str]
) -> None:
    ours.write(STARTED)
    assert capsys.readouterr().out == ""
    style.set("text", verbose=True)
    for line in (STARTED, f"{PREFIX}for people\n", f"{CONTROL}{{}}\n"):
        ours.write(line)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and shown.endswith(" INFO Starting Flower SuperLink\n")
    assert not style.shows_progress


def test_on_a_terminal_a_bar_appears_with_the_first_count_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "relays.py").write_text(RELAYS)
    printed = printed_on_a_terminal(tmp_path, "relays.py")
    assert printed.startswith("waiting\r\n"), "nothing is drawn before"
    assert re.findall(r"testing .*?(\d+/\w+)", printed) == ["1/3", "2/3"]
    assert screen(printed) == ["waiting", "round 1", "round 2", ""]


def test_people_see_a_line_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say("    1      0.5\n")
    assert capsys.readouterr().out == "    1      0.5\n"


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ([], "it printed nothing"),
        ([STARTED], "Starting Flower SuperLink"),
        (["\x1b[91mERROR \x1b[0m:     port 8000 is taken\n", STARTED], "port 8000 is taken"),
        (["╭─ Error ─╮\n", "│ ValueError: no such file │\n", "╰───╯\n", STARTED], "ValueError: no such file"),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_last_error_is_named_without_what_is_around_it(
    printed: list[str], reason: str, log_format: str, ours: Log, style: log.Style
) -> None:
    style.set(log_format, verbose=False)
    for line in printed:
        ours.write(line)
    assert ours.last_error() == f"{reason} (all is in {ours.name})"


def test_a_log_that_is_cleared_forgets_its_errors(ours: Log) -> None:
    ours.write("ValueError: of an earlier attempt\n")
    ours.clear()
    assert lines(ours) == [] and ours.last_error().startswith("it printed nothing")
    ours.write(STARTED)
    assert len(lines(ours)) == 1


def test_a_full_disk_stops_nothing_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    file = full.open("w", buffering=1)
    ours = Log(file)
    ours.write(STARTED)
    ours.flush()
    assert capsys.readouterr() == ("", "") and "Starting" in ours.last_error()
    with suppress(OSError):
        file.close()
