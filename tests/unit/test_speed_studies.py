"""The studies of speed compare equal work, go on where they stopped, and show what they have measured."""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from PIL import Image

import cifar
from benchmarks import (
    harness,
    in_process,
    input_pipeline,
    seconds,
    sides,
    simulated_rounds,
    timed_cifar,
    training_profile,
)
from benchmarks.quickstart import quickstart
from cifar_data import embedded_data
from tests.images import write_images
from tests.in_memory import InMemoryGrid, in_a_run

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = sides.Run([2.0, 4.0], 9.0, 0.5, 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a few images, ten classes in both splits."""
    return write_images(tmp_path_factory.mktemp("images"), 96, 40)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cifar_data.DATA_DIR", tmp_path / "cache" / "cifar10")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of other processes


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(10**6) or [] if isinstance(colour, tuple)}


def rgb(names: Iterable[str]) -> set[tuple[int, ...]]:
    return {tuple(bytes.fromhex(name[1:])) for name in names}


# ----------------------------------------------------------------------------------------------------- systems compared


def arguments(**others: Any) -> argparse.Namespace:
    given = {"sides": sides.SIDES, "repeats": 2, "cases": [(10, 3), (1000, 3), simulated_rounds.WHOLE], "rounds": 3}
    return argparse.Namespace(**given | others)


def test_sides_alternate_and_slow_ones_are_measured_with_few_clients() -> None:
    done = {simulated_rounds.key((10, 3), "plain", 0): {}}
    every = [*simulated_rounds.missing({}, arguments())]
    assert [*simulated_rounds.missing(done, arguments())] == every[1:]
    assert [side for case, side, repeat in every if (case, repeat) == ((10, 3), 1)] == [*sides.SIDES]
    of_many = {side for case, side, _ in every if case[0] == 1000}
    assert of_many == {"plain", "pfl", "simulated", "terminals"}
    assert [repeat for *_, repeat in every] == sorted(repeat for *_, repeat in every)


def test_what_is_measured_is_shown_and_not_measured_again(
    run_main: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds_of = {"plain": 1.0, "pfl": 2.0}
    monkeypatch.setattr(
        simulated_rounds, "measure",
        lambda side, case, args: sides.Run([seconds_of.get(side, 3.0)] * (case[1] - 1), 9.0, 0.5, 1.5),
    )  # fmt: skip
    monkeypatch.setattr(simulated_rounds, "is_usable", lambda side, args: side != "nvflare")
    options = ["--data", "embedded", "--repeats", "2", "--clients", "10", "100", "--out", str(tmp_path / "runs.json")]
    first = run_main(simulated_rounds.main, *options)
    assert len(json.loads((tmp_path / "runs.json").read_text())) == 2 * 3 * 5
    assert "| 100 | 3 | server.py --simulate | 3.00 (3.00 to 3.00) | 9.0 (9.0 to 9.0) | 1.50 | 0.500 | 2 |" in first
    assert "simulated / pfl: 10 clients, a round: 1.50 (1.50 to 1.50), bound 1.25" in first
    assert "from the command to its exit: 1.00" in first and "memory: at most 1.50 GB" in first
    styles = {side: style for side, style in simulated_rounds.STYLES.items() if side != "nvflare"}
    assert rgb(style[1] for style in styles.values()) <= colours(tmp_path / "runs.png")
    monkeypatch.setattr(simulated_rounds, "measure", lambda *_: pytest.fail("it was measured again"))
    assert run_main(simulated_rounds.main, *options) == first[first.index("| clients") :]


@pytest.mark.slow
def test_the_plain_loop_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sides, "FOLDER", tmp_path)
    found = sides.measure(
        "plain", (3, 2), argparse.Namespace(data=str(folder), workers=1, pfl_python="", nvflare_python="")
    )
    assert len(found.rounds) == 1 and 0 < found.rounds[0] < found.whole
    assert found.accuracy * 40 == pytest.approx(round(found.accuracy * 40)) and found.memory > 0.1


def test_a_side_that_leaves_clients_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"clients": 2, "seconds": 1.0, "server_accuracy": 0.5}
    monkeypatch.setattr(sides, "play", lambda *_: [row, row | {"clients": 1}])
    with pytest.raises(sides.LaunchError, match="plain: not all of the 2 clients trained in each of the 2 rounds"):
        sides.measure("plain", (2, 2), argparse.Namespace())


def test_terminals_share_the_clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []

    class Started(Exception):
        pass

    def programs(*commands: list[str]) -> None:
        started.extend(commands)
        raise Started

    monkeypatch.setattr(harness, "programs", programs)
    monkeypatch.setattr(harness, "FOLDER", tmp_path)
    with pytest.raises(Started):
        sides.play("terminals", (5, 3), argparse.Namespace(data="here"))
    server, *clients = started
    assert server[server.index("--clients") + 1] == "5" and server[server.index("--rounds") + 1] == "3"
    assert [client[-2:] for client in clients] == [["--clients", "3"], ["--clients", "2"]]


class Nodes(InMemoryGrid):
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def test_the_quickstart_trains_on_all_samples_where_the_others_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sides.QUICKSTART_CONFIG | {"data": str(folder), "num-server-rounds": 2, "min-nodes": 3}
    trained = []
    nodes = {node: {"partition-id": node, "num-partitions": 3} for node in range(3)}
    grid = Nodes(
        config,
        nodes,
        app=quickstart.client,
        tamper=lambda reply: trained.append(reply.content["metrics"]["num-examples"]),
    )
    with in_a_run():
        quickstart.main(grid, Context(1, 0, {}, RecordDict(), config))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(harness.RESULT)]
    result = json.loads(line.removeprefix(harness.RESULT))
    assert trained == [32] * 6 and result["clients"] == [3, 3]
    assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
    assert {message.metadata.message_type for message in grid.messages} == {"train"}


# ---------------------------------------------------------------------------------------------------- one training loop


def test_all_pipelines_make_the_same_of_an_image(folder: Path) -> None:
    source = input_pipeline.Source(folder)
    images, labels = source.data
    expected = cifar.normalise(images)
    for transform in (input_pipeline.CLASSIC, input_pipeline.OF_IMAGES):
        subset = source.files(transform, 32).dataset
        assert all(torch.allclose(image, one, atol=1e-6) for (image, _), one in zip(subset, expected, strict=True))
        assert [label for _, label in subset] == labels.tolist()
    planes = source.batches(32).dataset.tensors[0]
    assert torch.allclose(input_pipeline.OF_BATCHES(planes), expected, atol=1e-6)
    assert len(source.same_batch(32)) == 3 and torch.equal(source.same_batch(32)[2][0], expected[:32])


def test_pipelines_are_measured_once_and_compared(
    run_main: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "cells.json"
    options = ["--data", str(folder), "--batch", "32", "--repeats", "1", "--threads", "1", "--out", str(out)]
    first = run_main(input_pipeline.main, *options, "--accuracy", "0.01")
    cells = json.loads(out.read_text())
    rates = {way: cells[f"50000 samples, 1 threads, batch 32, {way}, 0"] for way in input_pipeline.WAYS}
    for way, rate in rates.items():
        assert f"| {way} | {rate:,.0f} ({rates['cifar.py'] / rate:.2f} ×) |" in first
    assert "| cifar.py | 1 |" in first and len(cells["to 0.01, 1 threads, cifar.py, 0"]["seconds"]) == 1
    for name in ("rate", "until"):
        monkeypatch.setattr(input_pipeline, name, lambda *_: pytest.fail("it was measured again"))
    assert run_main(input_pipeline.main, *options, "--accuracy", "0.01") == first[first.index("| samples/s") :]


def test_an_accuracy_that_is_not_reached_is_not_claimed(
    run_main: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(input_pipeline, "MOST_EPOCHS", 2)
    monkeypatch.setattr(input_pipeline, "WAYS", ("cifar.py",))
    options = ["--data", str(folder), "--batch", "32", "--repeats", "1", "--out", str(tmp_path / "cells.json")]
    shown = run_main(input_pipeline.main, *options, "--accuracy", "1.1")
    assert shown.count("| not reached | - |") == 2


def test_all_parts_together_are_what_cifar_py_does() -> None:
    data, results = embedded_data(70, seed=0), []
    for level in (training_profile.SUM, training_profile.ALL):
        torch.manual_seed(0)
        net = cifar.Net()
        training_profile.train(level, net, data, 32)
        results.append(net.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_shares_of_a_training_make_it_whole(run_main: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.json"
    options = ["--data", str(folder), "--samples", "96", "--batch", "32", "--repeats", "1", "--threads", "1"]
    table = run_main(training_profile.main, *options, "--out", str(out))
    rows = [line.split(" | ") for line in table[table.index("| share") :].splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [*training_profile.PARTS]
    assert sum(float(row[1].removesuffix(" |")) for row in rows) == pytest.approx(100, abs=0.3)
    times = [*json.loads(out.read_text()).values()]
    assert float(rows[0][1].removesuffix(" |")) == pytest.approx(100 * times[0] / times[-1], abs=0.06)


# --------------------------------------------------------------------------------------------------- seconds of a round


def note(what: str, begin: float, end: float, number: int | None = None, **process: float) -> seconds.Note:
    times = {"pid": 1, "started": 0.0, "importing": 0.0, "imported": 0.0} | process
    return {"what": what, "round": number, "begin": begin, "end": end, **times}


def round_of(number: int, start: float) -> list[seconds.Note]:
    """Return the notes of a round of 10 s, in which the training takes a new process, and the test an old one."""
    new = {"pid": 2, "started": start + 1, "importing": start + 1.5, "imported": start + 2}
    return [
        note("configure train", start, start, number),
        note("train", start + 1, start + 2, pid=3), note("load", start + 2.1, start + 2.2, **new),
        note("net", start + 2.2, start + 2.3, **new), note("train", start + 2.5, start + 4, **new),
        note("aggregate train", start + 4.5, start + 5, number),
        note("configure evaluate", start + 5.5, start + 6, number),
        note("net", start + 6, start + 6.1), note("test", start + 6.5, start + 7), note("test", start + 7, start + 8),
        note("aggregate evaluate", start + 8.5, start + 9, number), note("test", start + 9, start + 9.5),
    ]  # fmt: skip


def test_the_parts_of_a_round_are_those_of_the_last_client_and_make_it_whole() -> None:
    notes = [*round_of(1, 0), *round_of(2, 100), *round_of(3, 110), note("configure train", 120, 120, 4)]
    assert seconds.parts(notes) == pytest.approx({
        "waiting": 1 + 0.5, "start": 0.5, "import": 0.5, "load": 0.5 + 0.5, "train": 1.5, "test": 1.5,
        "push": 0.5 + 0.5, "aggregate": 1 + 1, "central test": 0.5,
    })  # fmt: skip
    assert sum(seconds.parts(notes).values()) == pytest.approx(10)


def test_a_timed_run_is_the_same_run_and_its_notes_are_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    config = {"data": str(folder), "num-clients": 2, "num-server-rounds": 3}
    plain = in_process.play(config)
    monkeypatch.setenv(timed_cifar.FILE, str(tmp_path / "notes"))
    timed = in_process.play({**config, "task": seconds.TASK, "strategy": seconds.STRATEGY})
    assert timed["status"] == "finished" and timed["final_weights_sha256"] == plain["final_weights_sha256"]
    found = seconds.parts([json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()])
    assert found["train"] > 0 and found["test"] > 0 and found["central test"] > 0
    assert found["start"] == found["import"] == 0, "nothing is started here"
    assert sum(found.values()) == pytest.approx(timed["rounds"][2]["seconds"], abs=0.3)


def test_the_start_of_a_process_is_known() -> None:
    assert timed_cifar.FILE == seconds.FILE
    age = timed_cifar.now() - timed_cifar.started()
    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


def test_before_and_after_are_drawn(
    run_main: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = {"before": 2.0, "after": 1.0}
    monkeypatch.setattr(seconds, "run", lambda where, way, args: dict.fromkeys(seconds.COLOURS, ways[way]))
    shown = run_main(seconds.main, "--data", "embedded", "--repeats", "2", "--out", str(tmp_path / "parts.json"))
    assert f"| terminals, before {'| 2.00 ' * 9}| 18.00 |" in shown
    assert f"| simulation, after {'| 1.00 ' * 9}| 9.00 |" in shown
    assert rgb(seconds.COLOURS.values()) <= colours(tmp_path / "parts.png")
    monkeypatch.setattr(seconds, "run", lambda *_: pytest.fail("it was run again"))
    again = run_main(seconds.main, "--data", "embedded", "--repeats", "2", "--out", str(tmp_path / "parts.json"))
    assert again == shown[shown.index("| seconds") :]
