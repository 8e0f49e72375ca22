"""Trackers: what is sent, that it is sent once, and what happens where a tracker is down, slow or missing."""

import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import ModuleType

import pytest

from federation.app.config import validate
from federation.app.tracking import check_installed, split_names
from federation.tracking import follow, sender
from federation.tracking.run import Run, numbers, read_run
from federation.tracking.sender import Sender
from tests.conftest import eventually
from tests.runs import row, write_run


class Recorder:
    """A tracker that keeps what it is sent, and fails or waits where it is told to."""

    where = "in memory"

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.closed: list[str] = []
        self.opened: list[str | None] = []
        self.down, self.hangs, self.lost = Event(), Event(), 0

    def open(self, run: Run, known: str | None, sent: int) -> tuple[str, int]:
        if self.down.is_set():
            raise ConnectionError("nobody\nis there")
        self.opened.append(known)
        return known or f"id-{run.identity[:2]}", sent - self.lost

    def send(self, number: int, values: dict[str, float], time: float) -> None:
        if self.down.is_set():
            raise ConnectionError("it went away")
        while self.hangs.is_set():
            self.hangs.wait(0.05)
        self.sent.append((self.opened[-1] or "new", number))

    def close(self, run: Run) -> None:
        self.closed.append(run.status)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(sender, "make_tracker", lambda name: recorder)
    monkeypatch.setattr(sender, "POLL", 0.01)
    monkeypatch.setattr(sender, "LONGEST_PAUSE", 0.01)
    return recorder


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def start(tmp_path: Path, lines: list[str]) -> Iterator[Callable[..., Sender]]:
    """Return a function that starts to send the run folder, by default one that will be written now."""
    ended = Event()
    started: list[Sender] = []

    def start(since: float = 0) -> Sender:
        started.append(Sender("mlflow", tmp_path, since, ended, lines.append))
        started[-1].ended = ended
        started[-1].start()
        return started[-1]

    yield start
    ended.set()
    for one in started:
        one.join(10)


def end(one: Sender) -> None:
    one.ended.set()
    one.join(10)
    assert one.complete


def test_several_trackers_are_named_in_one_setting() -> None:
    for text in ("mlflow,tensorboard", "tensorboard mlflow", "mlflow, tensorboard", "mlflow tensorboard mlflow"):
        assert validate({"tracking": text}).tracking == "tensorboard mlflow"
    assert validate({"tracking": ""}).trackers == validate({"tracking": "none"}).trackers == split_names("") == []


def test_an_unknown_tracker_is_refused() -> None:
    message = "run config tracking='mlflow,comet': 'comet' is none of: none, tensorboard, mlflow, wandb"
    with pytest.raises(ValueError, match=f"^{message}$"):
        validate({"tracking": "mlflow,comet"})


def test_a_missing_package_is_refused_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^tracking=wandb needs the package wandb: pip install '\.\[wandb\]'$"):
        check_installed(["wandb"])


def test_the_numbers_of_a_round_are_those_of_metrics_json_and_those_of_each_client() -> None:
    found = numbers(row(3))
    assert found.items() >= {"server_loss": 0.5, "train_loss": 1 / 3, "seconds": 2.0, "clients": 2}.items()
    assert found["trained_loss/client_0"] == 3 and found["trained_loss/client_1"] == pytest.approx(3.1)
    assert found["tested_loss/client_1"] == pytest.approx(3.2) and found["standard_deviation_loss"] == 0.1
    assert numbers(row(0)).keys() == {"round", "server_loss", "server_accuracy", "seconds"}, "what is None is left out"


def test_the_times_of_rounds_lie_as_far_apart_as_the_rounds_took(tmp_path: Path) -> None:
    write_run(tmp_path, rounds=3)
    os.utime(tmp_path / "metrics.json", (1000, 1000))
    run = read_run(tmp_path)
    assert run and run.times == [992.5, 995.0, 997.5, 1000.0]


def test_rounds_are_sent_as_they_come_and_each_once(
    tmp_path: Path, tracker: Recorder, start: Callable[..., Sender]
) -> None:
    one = start()
    for rounds in (0, 1, 4):
        write_run(tmp_path, rounds)
        eventually(lambda rounds=rounds: len(tracker.sent) == rounds + 1, 5)
    write_run(tmp_path, 5, "finished")
    end(one)
    assert [number for _, number in tracker.sent] == [0, 1, 2, 3, 4, 5]
    assert tracker.closed == ["finished"] and len(tracker.opened) == 1


def test_a_resumed_run_goes_on_in_the_same_tracked_run(
    tmp_path: Path, tracker: Recorder, start: Callable[..., Sender]
) -> None:
    write_run(tmp_path, 2, "failed")
    end(start())
    follow.send(tmp_path, ["mlflow"], print)
    assert tracker.opened == [None], "all was sent: it need not be opened"
    write_run(tmp_path, 4, "finished")
    assert follow.send(tmp_path, ["mlflow"], print)
    assert tracker.sent == [("new", 0), ("new", 1), ("new", 2), ("id-55", 3), ("id-55", 4)]
    assert tracker.closed == ["failed", "finished"]


def test_what_the_tracker_does_not_have_is_sent_again(tmp_path: Path, tracker: Recorder) -> None:
    write_run(tmp_path, 2, "failed")
    assert follow.send(tmp_path, ["mlflow"], print)
    tracker.lost = 1
    write_run(tmp_path, 3, "finished")
    assert follow.send(tmp_path, ["mlflow"], print)
    assert [number for _, number in tracker.sent] == [0, 1, 2, 2, 3]


def test_another_run_in_the_same_folder_is_another_tracked_run(tmp_path: Path, tracker: Recorder) -> None:
    for identity in ("a" * 32, "b" * 32):
        write_run(tmp_path, 1, "finished", run=identity)
        assert follow.send(tmp_path, ["mlflow"], print)
    assert tracker.opened == [None, None]
    assert json.loads((tmp_path / "tracking-mlflow.json").read_text())["id"] == "id-bb"


def test_a_run_that_was_in_the_folder_before_is_not_sent(
    tmp_path: Path, tracker: Recorder, start: Callable[..., Sender]
) -> None:
    write_run(tmp_path, 3, "finished")
    os.utime(tmp_path / "metrics.json", (1000, 1000))
    one = start(since=time.time() - 1)
    end(one)
    assert not tracker.opened and not (tmp_path / "tracking-mlflow.json").exists()


def test_a_tracker_that_is_down_is_named_once_and_gets_what_it_missed(
    tmp_path: Path, tracker: Recorder, lines: list[str], start: Callable[..., Sender]
) -> None:
    tracker.down.set()
    one = start()
    write_run(tmp_path, 2)
    eventually(lambda: one.failing, 5)
    first = len(lines)
    tracker.down.clear()
    eventually(lambda: len(tracker.sent) == 3, 5)
    tracker.down.set()
    write_run(tmp_path, 3)
    eventually(lambda: one.failing, 5)
    tracker.down.clear()
    write_run(tmp_path, 4, "finished")
    end(one)
    assert first == 1 and Counter(lines) == {
        "tracking=mlflow does not work for now, and the run goes on without it: nobody is there": 1,
        "tracking=mlflow: in memory": 1,
    }
    assert [number for _, number in tracker.sent] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("trouble", ["down", "hangs"])
def test_the_end_waits_for_a_tracker_for_so_long_and_says_so(
    trouble: str, tmp_path: Path, tracker: Recorder, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    getattr(tracker, trouble).set()
    monkeypatch.setattr(follow, "GIVE_UP" if trouble == "down" else "PATIENCE", 0.2)
    write_run(tmp_path, 2, "finished")
    began = time.monotonic()
    assert not follow.send(tmp_path, ["mlflow"], lines.append)
    assert time.monotonic() - began < 5
    assert lines[-1] == (
        f"tracking=mlflow lacks the end of the run: federate track {tmp_path} --tracking mlflow sends it, and so does "
        "--resume"
    )
    getattr(tracker, trouble).clear()
    eventually(lambda: tracker.closed == ["finished"], 5)


def test_what_cannot_be_tracked_is_refused(
    tmp_path: Path, failed: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert failed(_track, "track.py", ".", "--tracking", "mlflow") == (
        2, "track.py: error: Invalid value for '--tracking': tracking=mlflow needs the package mlflow: "
        "pip install '.[mlflow]'\n",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setattr(sys.modules["mlflow"], "__spec__", importlib.machinery.ModuleSpec("mlflow", None))
    status, text = failed(_track, "track.py", str(tmp_path), "--tracking", "mlflow")
    assert (status, text) == (1, f"track.py: {tmp_path} is no run folder: it has no metrics.json\n")


def _track() -> None:
    from federation.launch.command_line import run_script
    from federation.track import track

    run_script(track)


def test_event_files_of_tensorboard_hold_what_metrics_json_holds(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    importlib.import_module("federation.tracking.to_tensorboard")  # so that TensorBoard does without TensorFlow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines: list[str] = []
    write_run(tmp_path, 2, "failed")
    assert follow.send(tmp_path, ["tensorboard"], lines.append)
    note = json.loads((tmp_path / "tracking-tensorboard.json").read_text())
    (tmp_path / "tracking-tensorboard.json").write_text(json.dumps(note | {"rounds": 2}))  # killed before it was noted
    metrics = write_run(tmp_path, 4, "finished")
    assert follow.send(tmp_path, ["tensorboard"], lines.append)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    found = EventAccumulator(str(folder)).Reload()
    for name in numbers(metrics["rounds"][-1]):
        kept = [(event.step, event.value) for event in found.Scalars(name)]
        rows = [(r["round"], numbers(r)[name]) for r in metrics["rounds"] if name in numbers(r)]
        assert kept == [(number, pytest.approx(value, rel=1e-6)) for number, value in rows], name
    (image,) = found.Images("curves")
    assert (image.step, image.width, image.height) == (4, 30, 20)
    assert image.encoded_image_string == (tmp_path / "curves.png").read_bytes()
    (config,) = found.Tensors("config")[-1].tensor_proto.string_val
    assert b"| num-server-rounds | 3 |" in config
    assert lines == [f"tracking=tensorboard: tensorboard --logdir {tmp_path}"] * 2
