"""What a run survives: replies that are no good, clients that go, crashes, a full disk, damaged files, a second run.

The server's main() plays each run with real clients, in memory, on a script so small that a run takes no time. A run
that a Killed has broken off is one whose process has died: nothing of it remains but its folder.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict

import server
from federation.app import console, picture, roster, weights
from federation.app.checkpoint import checkpoints
from federation.app.run_folder import lock_run_folder
from tests.conftest import ROOT
from tests.in_memory import InMemoryGrid
from tests.tasks import TINY

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"clients": 4, "fraction-train": 0.5},
    "fedadam": {"clients": 4, "fraction-train": 0.5, "strategy": "fedadam", "partitioner": "dirichlet",
                "min-partition-size": 4},
    "scaffold": {"clients": 4, "fraction-train": 0.5, "strategy": "scaffold"},
    "fedavgm": {"clients": 4, "clients-per-round": 2, "strategy": "fedavgm", "learning-rate": 0.1,
                "learning-rate-schedule": "cosine"},
    "personal": {"clients": 4, "fraction-train": 0.5, "personal": "bias", "local-steps": 2},
    "fedprox": {"clients": 4, "fraction-train": 0.5, "strategy": "fedprox", "partitioner": "shards",
                "learning-rate": 0.1, "learning-rate-schedule": "step", "decay-rounds": 1},
}  # fmt: skip

Tamper = Callable[[Message], object]
Change = Callable[[Message], object]


class Returned(dict[tuple[str, int], list[Message]]):
    """A tamper that keeps all replies as they are after another one, by the kind of question and the node."""

    def __init__(self, tamper: Tamper) -> None:
        super().__init__()
        self.tamper = tamper

    def __call__(self, reply: Message) -> None:
        self.tamper(reply)
        self.setdefault((reply.metadata.message_type, reply.metadata.src_node_id), []).append(reply)


class Killed(BaseException):
    """The end of a process, which nothing in it notices."""


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory, in_a_run: None) -> Iterator[None]:
    """Let the task be found."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "tiny_task.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        for drawing in ("curves", "partitions"):  # they would take longer than all of the training
            patch.setattr(picture, drawing, lambda metrics, path: path.touch())
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that returns the digest of the untroubled run with some settings."""
    digests: dict[str, str] = {}

    def whole(**settings: Any) -> str:
        if repr(settings) not in digests:
            digests[repr(settings)] = play(tmp_path_factory.mktemp("whole"), **settings).metrics["final_weights_sha256"]
        return digests[repr(settings)]

    return whole


def play(folder: Path, tamper: Tamper = id, clients: int = 3, **settings: Any) -> SimpleNamespace:
    """Play a run of three rounds to its end; return what it has left behind, and its Grid."""
    config = {"task": "tiny_task", "num-clients": clients, "seed": 7, "out": str(folder), **settings}
    nodes = {i + 1: {"partition-id": i, "num-partitions": clients} for i in range(clients)}
    grid = InMemoryGrid(config, nodes, tamper=tamper)
    server.main(grid, Context(1, 0, {}, RecordDict(), config))
    return SimpleNamespace(grid=grid, metrics=metrics_of(folder), rounds=metrics_of(folder)["rounds"][1:])


def resume(folder: Path, **settings: Any) -> str:
    """Go on with a run to its end; return the digest of its model."""
    digest = play(folder, resume=True, **settings).metrics["final_weights_sha256"]
    assert list(folder.glob("*.unfinished*")) == []
    return str(digest)


def end_of(folder: Path, tamper: Tamper = id, **settings: Any) -> str:
    """Play a run that does not reach its end; return what is said of that. Nothing of it is kept, as in a process."""
    try:
        play(folder, tamper, **settings)
    except (Killed, Exception) as error:
        return str(error)
    pytest.fail("it went on to its end")


def metrics_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text("utf-8")))


class Trouble:
    """Changes replies of some nodes to one kind of question, in some rounds: to be exact, in some of their attempts."""

    def __init__(
        self, change: Change, nodes: tuple[int, ...] = (2,), when: tuple[int, ...] = (2,), kind: str = "train"
    ):
        self.change, self.nodes, self.when, self.kind = change, nodes, when, kind
        self.seen: Counter[tuple[str, int]] = Counter()

    def __call__(self, reply: Message) -> None:
        kind, node = reply.metadata.message_type, reply.metadata.src_node_id
        self.seen[kind, node] += 1
        if kind == self.kind and node in self.nodes and self.seen[kind, node] in self.when:
            self.change(reply)


def kill_at(training: int) -> Tamper:
    """Return what kills the run while a client, counted over all rounds, returns its model."""
    seen: list[Message] = []

    def tamper(reply: Message) -> None:
        if reply.metadata.message_type == "train":
            seen.append(reply)
        if len(seen) == training:
            raise Killed

    return tamper


# -------------------------------------------------------------------------------------------------------- bad replies


def changed(name: str, values: Array) -> Change:
    return lambda reply: reply.content.array_records["arrays"].update({name: values})


def truncate(reply: Message) -> None:
    array = reply.content.array_records["arrays"]["weight"]
    array.data = array.data[:-1]


NAN = changed("bias", Array(np.full(10, np.nan, np.float32)))
BAD: dict[str, tuple[Change, str]] = {
    "out of memory": (lambda reply: reply.__dict__.update(_error=Error(1, "out of\nmemory")), "out of memory"),
    "no model": (lambda reply: reply.content.pop("arrays"), "its reply has the records ['metrics']"),
    "no number": (lambda reply: reply.content["metrics"].pop("num-examples"), "it reports no num-examples"),
    "more samples": (lambda reply: reply.content["metrics"].update({"num-examples": 10**6}), "num-examples=1000000"),
    "another shape": (changed("bias", Array(np.zeros(11, np.float32))), "bias does not match"),
    "not a number": (NAN, "bias is not finite: 10 of 10 values"),
    "cut off": (truncate, "weight cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_model_is_left_out_and_the_others_are_averaged(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, why = BAD[kind]
    returned = Returned(Trouble(change))
    run = play(tmp_path, returned)
    assert run.metrics["status"] == "finished"
    assert [row["dropped"] for row in run.rounds] == [0, 1, 0] and [row["clients"] for row in run.rounds] == [3, 2, 3]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert line.startswith(f"federation: client 1 is left out: {why}")
    first, third = (returned["train", node][1].content.array_records["arrays"] for node in (1, 3))
    assert run.rounds[1]["samples"] == [21, 20]
    mean = {name: first[name].numpy() * (21 / 41) + third[name].numpy() * (20 / 41) for name in first}
    assert weights.sha256(run.grid.models("evaluate")[3]) == weights.sha256(
        ArrayRecord({name: Array(values) for name, values in mean.items()})
    )


def test_a_bad_test_is_left_out_and_changes_no_model(tmp_path: Path, whole: Callable[..., str]) -> None:
    change: Change = lambda reply: reply.content["metrics"].update({"accuracy": 1.5})  # noqa: E731
    returned = Returned(Trouble(change, kind="evaluate"))
    run = play(tmp_path, returned)
    assert [row["dropped"] for row in run.rounds] == [0, 1, 0]
    assert run.metrics["final_weights_sha256"] == whole()
    good = [returned["evaluate", node][1].content["metrics"] for node in (1, 3)]
    for key in ("loss", "accuracy"):
        mean = np.average([metrics[key] for metrics in good], weights=[metrics["num-examples"] for metrics in good])
        assert run.rounds[1][f"clients_{key}"] == pytest.approx(mean)


def test_tests_that_are_all_bad_end_the_run_which_can_be_resumed(tmp_path: Path, whole: Callable[..., str]) -> None:
    said = end_of(tmp_path, Trouble(lambda reply: reply.content.clear(), (1, 2, 3), kind="evaluate"))
    assert said == "round 2: no client could evaluate the model: its reply has the records [], not ['metrics']"
    assert metrics_of(tmp_path)["status"] == "failed" and len(metrics_of(tmp_path)["rounds"]) == 2
    assert resume(tmp_path) == whole()


@pytest.mark.parametrize("retries", [0, 2])
def test_a_run_without_any_good_model_fails_and_can_be_resumed(
    tmp_path: Path, retries: int, whole: Callable[..., str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(console.MARK, "a launcher's")
    trouble = Trouble(NAN, (1, 2, 3), when=tuple(range(2, 9)))
    said = end_of(tmp_path, trouble, retries=retries)
    assert said == f"round 2: too few good models, even after {retries} retries"
    assert trouble.seen["train", 2] == 1 + 1 + retries
    out = capsys.readouterr().out
    assert out.count("round 2: 0 of 3 models are good, 1 needed") == 1 + retries
    assert out.endswith(f'federation: the run failed: {said}\n{console.CONTROL}{{"end": 1}}\n')
    assert metrics_of(tmp_path)["status"] == "failed" and len(metrics_of(tmp_path)["rounds"]) == 2
    assert checkpoints(tmp_path) == [tmp_path / f"checkpoint-{number}.npz" for number in (0, 1)]
    assert resume(tmp_path, retries=retries) == whole()


@pytest.mark.parametrize(("nodes", "least"), [((1, 2, 3), 1), ((2,), 3), ((1, 3), 2)], ids=["all", "one", "two"])
def test_a_round_that_is_tried_again_is_as_if_nothing_had_been(
    tmp_path: Path, nodes: tuple[int, ...], least: int, whole: Callable[..., str]
) -> None:
    for strategy in ("fedavg", "fedadam"):
        out = tmp_path / strategy
        run = play(out, Trouble(NAN, nodes), strategy=strategy, **{"min-clients": least})
        assert run.metrics["final_weights_sha256"] == whole(strategy=strategy)
        assert [row["dropped"] for row in run.rounds] == [0, len(nodes), 0]
        assert [row["clients"] for row in run.rounds] == [3, 3, 3]


@pytest.mark.parametrize(("least", "waits"), [(2, False), (3, True)])
def test_a_run_waits_where_fewer_clients_are_left_than_it_needs(
    tmp_path: Path, least: int, waits: bool, whole: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    away: set[int] = set()
    untroubled = whole()
    monkeypatch.setattr(roster, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: s and away.clear()))
    monkeypatch.setattr(InMemoryGrid, "get_node_ids", lambda grid: sorted(set(grid.contexts) - away))

    def tamper(reply: Message) -> None:
        if (reply.metadata.message_type, reply.metadata.src_node_id) == ("evaluate", 3):
            away.add(2)  # after each round, unless it comes back while somebody waits

    run = play(tmp_path, tamper, **{"min-clients": least})
    out = capsys.readouterr().out
    assert ("waiting for 3 clients, 2 here" in out) == waits and "may not join" not in out
    assert [row["clients"] for row in run.rounds] == ([3, 3, 3] if waits else [3, 2, 2])
    assert (run.metrics["final_weights_sha256"] == untroubled) == waits
    assert sum(row["dropped"] for row in run.rounds) == 0


# ------------------------------------------------------------------------------------------------------------ crashes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kills", [(1,), (4,), (5,), (3, 3)], ids=["round 1", "round 2", "round 3", "every round"])
def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(
    tmp_path: Path, strategy: str, kills: tuple[int, ...], whole: Callable[..., str]
) -> None:
    """Two clients train in each of three rounds; each process is killed at one of the trainings that it sees."""
    for started, training in enumerate(kills):
        assert end_of(tmp_path, kill_at(training), resume=started > 0, **STRATEGIES[strategy]) == ""
        assert metrics_of(tmp_path)["status"] == "running", "a process that is killed says nothing"
    done = len(metrics_of(tmp_path)["rounds"]) - 1
    assert done == sum((training - 1) // 2 for training in kills)
    assert resume(tmp_path, **STRATEGIES[strategy]) == whole(**STRATEGIES[strategy])
    assert [row["round"] for row in metrics_of(tmp_path)["rounds"]] == [0, 1, 2, 3]


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """Return a function that makes each file end at some size, with an OSError, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before_whole(
    tmp_path: Path, disk: Callable[[int], None], whole: Callable[..., str]
) -> None:
    last = tmp_path / "checkpoint-1.npz"
    before: list[bytes] = []

    def fill(reply: Message) -> None:
        before.append(last.read_bytes())
        disk(8000)  # enough for metrics.json, and too little for a model

    said = end_of(tmp_path, Trouble(fill))
    disk(resource.RLIM_INFINITY)
    assert said.startswith(f"cannot save a checkpoint in {tmp_path}: File too large; ")
    assert said.endswith(f"; {last.name} is whole: make room, and go on by --resume")
    assert checkpoints(tmp_path)[-1] == last and before == [last.read_bytes()]
    assert list(tmp_path.glob("*.unfinished*")) == [] and metrics_of(tmp_path)["status"] == "failed"
    assert resume(tmp_path) == whole()


def test_a_run_folder_that_is_removed_is_named_and_not_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = end_of(folder, Trouble(lambda reply: shutil.rmtree(folder)))
    assert said == f"cannot save a checkpoint in {folder}: No such file or directory"
    assert not folder.exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_end(
    tmp_path: Path, whole: Callable[..., str]
) -> None:
    assert end_of(tmp_path, Trouble(NAN, (1, 2, 3), when=(3,)), retries=0).startswith("round 3: ")
    before, newest = checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    noted = metrics_of(tmp_path)
    said = end_of(tmp_path, resume=True)
    assert said.startswith(f"checkpoint {newest} is damaged (") and newest.name == "checkpoint-2.npz"
    assert said.endswith("; remove it, and --resume will continue from checkpoint-1.npz") and before.exists()
    assert metrics_of(tmp_path) == noted
    newest.unlink()
    assert resume(tmp_path) == whole()


# --------------------------------------------------------------------------------------------------- other processes


def another_process(code: str, folder: Path) -> subprocess.Popen[str]:
    """Start some lines of Python on a run folder."""
    code = f"import os, signal, sys\nfrom pathlib import Path\nfrom federation.app.run_folder import *\n{code}"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True, **pipes)


def test_a_process_that_is_killed_while_it_writes_leaves_no_harm(tmp_path: Path, whole: Callable[..., str]) -> None:
    assert end_of(tmp_path, kill_at(8)) == ""
    kept = {path: path.read_bytes() for path in checkpoints(tmp_path)}
    writer = another_process(
        "def half(path):\n"
        "    path.write_bytes(b'PK')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1], 'checkpoint-3.npz'), half)",
        tmp_path,
    )
    assert writer.wait(30) == -9
    (unfinished,) = tmp_path.glob("*.unfinished*")
    assert unfinished.name == f"checkpoint-3-{writer.pid}.unfinished.npz" and unfinished.read_bytes() == b"PK"
    assert {path: path.read_bytes() for path in checkpoints(tmp_path)} == kept and len(kept) == 2
    assert resume(tmp_path) == whole()


def test_a_run_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    owner = another_process(
        "lock = lock_run_folder(Path(sys.argv[1]))\nprint('mine', flush=True)\nsys.stdin.read()", tmp_path
    )
    assert owner.stdout is not None and owner.stdout.readline() == "mine\n"
    refusal = f"another run is writing to {tmp_path}; stop it, or choose another --out"
    assert end_of(tmp_path) == refusal, "nor a run,"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "which leaves all as it is"
    owner.kill()
    owner.communicate()
    with lock_run_folder(tmp_path):
        second = another_process("lock_run_folder(Path(sys.argv[1]))", tmp_path)
        assert second.communicate()[1].splitlines()[-1] == f"ValueError: {refusal}"
    assert play(tmp_path).metrics["status"] == "finished"
