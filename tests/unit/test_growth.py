"""A model is not copied where it need not be; and the study of growth measures what it says that it does."""

import io
import subprocess
import sys
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from benchmarks import growth, watch, wide_mlp
from federation.app import bundle, weights
from federation.app.archive import write_archive
from federation.app.replies import check_reply
from federation.app.strategy import check_finite
from tests.conftest import ROOT

SIZE = 32_000_000  # bytes of the model
VALUES = [
    np.zeros((0, 3), np.float32), np.array(3.5), np.asfortranarray(np.arange(12.0).reshape(3, 4)), np.array(True),
    np.arange(5, dtype=">i4"), np.ones((2, 2), np.complex64), np.array([1.5], np.float16), np.zeros(0), np.arange(3),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the copies


def copies(call: Callable[[], object]) -> float:
    """Return how many times the model's size a call allocates at its peak."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / SIZE
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def model() -> ArrayRecord:
    return ArrayRecord({"w": weights.encoded(np.ones((2000, SIZE // 8000), np.float32))})


def test_checking_restoring_and_digesting_a_model_copies_nothing(model: ArrayRecord) -> None:
    assert copies(lambda: weights.restore_dtypes(model, model)) < 0.01
    assert copies(lambda: weights.sha256(model)) < 0.01
    assert copies(lambda: check_finite(model)) < 0.26  # a byte for each number
    assert copies(lambda: bundle.unpack(bundle.pack([RecordDict({"arrays": model})]))) < 0.01


def test_a_reply_is_checked_without_a_copy(model: ArrayRecord, a_run: None) -> None:
    question = Message(RecordDict({"arrays": model, "config": ConfigRecord()}), 1, "train")
    question.metadata.__dict__["_message_id"] = "1"
    counts = {"num-examples": 3, "train-loss": 1.0, "seconds": 1.0}
    reply = Message(RecordDict({"arrays": model, "metrics": MetricRecord(counts)}), reply_to=question)
    assert copies(lambda: check_reply(question, reply, {"train": 3, "test": 1}, exactly=True)) < 0.26


@pytest.fixture
def a_run() -> Any:
    from tests.in_memory import in_a_run

    with in_a_run():
        yield


def test_a_net_and_a_file_take_one_copy(model: ArrayRecord, tmp_path: Path) -> None:
    net = {"w": np.zeros((2000, SIZE // 8000), np.float32)}
    assert copies(lambda: weights.to_net(model, net)) < 1.01
    assert (net["w"] == 1).all()
    assert copies(lambda: write_archive(tmp_path / "a.npz", {}, {"arrays": model})) < 1.7  # and 16 MB on the way


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value.dtype} {value.shape}")
def test_a_view_is_what_numpy_reads_but_cannot_be_written(value: Any) -> None:
    array = Array(value)
    view, read = weights.view(array), array.numpy()
    assert (view.dtype, view.shape, view.flags.f_contiguous) == (read.dtype, read.shape, read.flags.f_contiguous)
    assert np.array_equal(view, read) and not view.flags.writeable


def test_bytes_of_a_stranger_are_refused_as_numpy_does() -> None:
    np.save(pickled := io.BytesIO(), np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        weights.view(Array("object", (1,), "numpy.ndarray", pickled.getvalue()))
    short = Array(np.zeros(8)).data[:-8]
    with pytest.raises(TypeError, match="too small"):
        weights.view(Array("float64", (8,), "numpy.ndarray", short))
    with pytest.raises(ValueError):
        weights.view(Array("float64", (8,), "numpy.ndarray", b"junk"))


def test_an_entry_with_bytes_that_do_not_belong_to_it_is_encoded_anew() -> None:
    plain = Array(np.arange(3.0))
    padded = Array(plain.dtype, plain.shape, plain.stype, plain.data + bytes(100))
    old = ArrayRecord({"w": plain})
    assert weights.restore_dtypes(old, ArrayRecord({"w": padded}))["w"].data == plain.data
    assert weights.restore_dtypes(old, old)["w"].data is plain.data


# ----------------------------------------------------------------------------------------------------------- the study


def test_the_slope_is_that_of_most_points() -> None:
    line = [(float(x), 3 + 0.5 * x) for x in range(20)]
    assert watch.slope([*line[:5], (5.0, 900.0), *line[6:]]) == pytest.approx(0.5)
    assert watch.slope([(1.0, 2.0)]) == 0


def test_a_process_is_watched_with_its_children() -> None:
    child = "import time; held = bytes(range(256)) * 200_000; print('ready', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        with watch.Watcher([process.pid], 0.05, lambda: 7) as watcher:
            while len(watcher.samples) < 3:
                time.sleep(0.05)
        for one in [*watcher._processes()][::-1]:
            one.kill()
    assert 51 < watcher.peak_sum() < 150 and watcher.peak_of().keys() == {"other"}
    assert watcher.peaks["other"] > 51, "the child alone"
    assert [point[0] for point in watcher.series("other", "pss")][:3] == [7, 7, 7]
    assert watcher.series("other", "pss", first=8) == []


@pytest.mark.parametrize("wanted", growth.SIZES)
def test_the_perceptron_has_as_many_parameters_as_asked_for(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    width = wide_mlp.width_of(wanted)
    exact = width**2 + (wide_mlp.INPUTS + wide_mlp.CLASSES + 2) * width + wide_mlp.CLASSES
    assert abs(exact - wanted) < 0.02 * wanted
    if wanted < 100_000:
        monkeypatch.setenv("PARAMETERS", str(wanted))
        assert sum(weight.numel() for weight in wide_mlp.Net().parameters()) == exact


CELL = {
    "seconds": 3.0, "samples": 50_000, "accuracy": 0.4321, "bytes": 4_000_000, "sha256": "same", "memory": 2000.0,
    "memory_of": {"SuperLink": 60.0, "proxy": 30.0, "SuperNode": 140.0, "client": 60.0},
    "largest": {"server": 500.0, "client": 300.0}, "cpu": {"SuperLink": 0.5, "SuperNode": 1.0, "client": 0.25},
    "growth": {"server": 0.4, "SuperLink": 6.0}, "joined": 20.0,
}  # fmt: skip
ROWS = {
    "clients": "| 1,000 | 50,000 | 3.00 | 0.060 | 2.00 | 0.432 |",
    "sites": "| 25 | 20 | 20.0 | 2.0 | 8 | 60 | 30 | 0 | 0.50 | 0.00 | 0.00 | 1.2 |",
    "models": "| 62,000 parameters, terminals | 4.0 | 3.00 | 2000 | 500 | 300 | – | – | – | – |",
    "rounds": "| terminals | SuperLink | 60 | +6.00 | **no** |",
}


@pytest.mark.parametrize("part", growth.PARTS)
def test_the_table_shows_what_was_measured_and_nothing_is_measured_twice(
    part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []
    cell = CELL | {"memory_of": CELL["memory_of"] | {"server": 100.0}} if part == "rounds" else CELL  # type: ignore[operator]
    monkeypatch.setattr(growth, "measure", lambda case, out: measured.append(case) or cell)
    monkeypatch.setattr(sys, "argv", ["growth.py", part, "--out", str(tmp_path / "cells.json")])
    assert growth.command() == 0
    first, count = capsys.readouterr().out, len(measured)
    assert ROWS[part] in first.splitlines() and count == len({str(case) for case in measured}) > 1
    assert growth.command() == 0
    assert first.endswith(capsys.readouterr().out) and len(measured) == count


def test_two_versions_are_compared_only_if_they_agree() -> None:
    ours = CELL | {"seconds": 1.5, "largest": {"server": 250.0, "client": 300.0}}
    said = growth.compared("x", ours, CELL)
    assert said == "x, divided by the baseline: seconds 0.50, memory 1.00, largest server 0.50, largest client 1.00; " \
                   "same SHA-256"  # fmt: skip
    with pytest.raises(growth.LaunchError, match="different weights"):
        growth.compared("x", ours | {"sha256": "other"}, CELL)


def test_each_version_runs_its_own_scripts(tmp_path: Path) -> None:
    args = Namespace(smoke=False, baseline=tmp_path)
    cases = dict(growth.models(args))
    assert len(cases) == 4 * len(growth.SIZES)
    assert cases["25,000,000 parameters, terminals"].checkout == ROOT
    assert cases["baseline, 25,000,000 parameters, terminals"].checkout == tmp_path
