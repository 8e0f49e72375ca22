"""What metrics.json says within a round: who is here, who works, who was left out, written seldom and cheaply."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

import server
from federation.app import live, run_folder
from federation.app.console import FOLDER
from federation.app.live import Live
from federation.app.metrics_file import MetricsText
from tests.in_memory import InMemoryGrid
from tests.processes import metrics_of
from tests.tasks import TINY

HOSTILE = '<script>alert(1)</script> "status": "running"'


class Clock:
    """A clock that a test moves on; `seconds` is what each writing takes."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.now, self.seconds, self.writings = 0.0, seconds, 0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now

    def write(self) -> None:
        self.writings += 1
        self.now += self.seconds


def ticked(clock: Clock, ours: Live, seconds: float, step: float = 0.1) -> None:
    end = clock.now + seconds
    while clock.now < end:
        ours.tick()
        clock.now += step


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 10), (0.1, 3), (2.0, 1)])
def test_what_changes_is_written_once_a_second_and_less_often_if_that_takes_long(
    seconds: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(live, "time", clock)
    ours = Live(clock.write)
    ours.sources["now"] = lambda: clock.now
    ticked(clock, ours, 11)
    assert most - 1 <= clock.writings <= most and clock.writings >= 1


def test_what_does_not_change_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    ours = Live(clock.write)
    ticked(clock, ours, 10)
    assert clock.writings == 1
    ours.leave_out("training", "it has left", [2, 1])
    ticked(clock, ours, 10)
    assert clock.writings == 2


def test_a_disk_that_is_full_does_not_end_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)

    def fail() -> None:
        clock.write()
        raise RuntimeError("cannot save metrics.json")

    ours = Live(fail)
    ours.sources["now"] = lambda: clock.now
    ticked(clock, ours, 3)
    assert clock.writings >= 2


def test_strangers_cannot_fill_the_file() -> None:
    ours = Live()
    for number in range(1000):
        ours.leave_out("training", f"{number} " + "x" * 10**4, [number])
        ours.refuse("n" * 10**6, f"{number} " + "y" * 10**4)
    assert len(json.dumps(ours.facts())) < 50_000
    assert ours.facts()["refused"][-1]["reason"].startswith("999 ") and ours.facts()["left_out"][0]["clients"] == [0]
    assert len(ours.end_round()) == live.MOST_NOTED and ours.end_round() == []


def test_the_file_says_the_same_as_the_metrics_with_a_round_per_line() -> None:
    text, metrics = MetricsText(), {"status": "running", "rounds": [], "config": {"out": HOSTILE}, "partitions": {}}
    assert json.loads(text.encode(metrics)) == metrics
    for number in range(3):
        metrics["rounds"].append({"round": number, "left_out": [{"reason": HOSTILE}]})
        assert json.loads(text.encode(metrics)) == metrics
    assert sum(line.startswith('    {"round": ') for line in text.encode(metrics).splitlines()) == 3


def test_a_run_that_was_killed_is_marked_whatever_strangers_have_said(tmp_path: Path) -> None:
    metrics = {"status": "running", "rounds": [{"round": 0, "left_out": [{"reason": HOSTILE}]}]}
    (tmp_path / "metrics.json").write_text(MetricsText().encode(metrics))
    with run_folder.run_folder(tmp_path):
        pass
    assert metrics_of(tmp_path) == metrics | {"status": "failed"}


@pytest.mark.usefixtures("in_a_run")
def test_a_run_notes_who_was_left_out_of_which_round_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.setitem(os.environ, FOLDER, str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    config = {"task": "tiny", "out": str(tmp_path / "out"), "num-server-rounds": 2, "num-clients": 2}
    seen: list[dict[str, Any]] = []

    def tamper(reply: Message) -> None:
        seen.append(metrics_of(tmp_path / "out"))
        if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 2 and len(grid.models("train")) < 3:
            reply.content["metrics"]["num-examples"] = 7

    grid = InMemoryGrid(config, {1: {}, 2: {}}, tamper=tamper)
    server.main(grid, Context(1, 0, {}, RecordDict(), config))
    found = metrics_of(tmp_path / "out")
    reason = "num-examples=7 cannot be: it has joined with 31 samples"
    assert [row["left_out"] for row in found["rounds"]] == [
        [], [{"doing": "training", "reason": reason, "clients": [1]}], [],
    ]  # fmt: skip
    assert found["roster"]["client"] == [0, 1] and found["roster"]["here"] == [True, True]
    assert found["roster"]["train"] == [31, 31] and found["roster"]["trained"] == [2, 2]
    assert found["left_out"] == [] and seen[-1]["status"] == "running" and "now" in seen[-1]
