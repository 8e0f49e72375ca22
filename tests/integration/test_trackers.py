"""Real trackers: an MLflow server that comes late, W&B offline, and runs in terminals, with a tracker that hangs."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from federation.app import hide_tensorflow
from federation.app.tracking import command
from federation.launch.network import free_port
from federation.tracking.run import numbers
from tests.conftest import ROOT, Terminals, eventually
from tests.processes import SETTINGS, as_text, assert_all_gone, client, metrics_of, undisturbed
from tests.runs import write_run
from tests.tasks import TINY_NUMPY

pytestmark = pytest.mark.slow
TIMEOUT = 300  # seconds, of which a server of MLflow takes ten to start where nothing else runs


def follower(folder: Path, name: str, **environment: str) -> "subprocess.Popen[str]":
    """Start the process that sends the run in `folder`, in a folder of its own beside it."""
    (elsewhere := folder.parent / "elsewhere").mkdir(exist_ok=True)
    return subprocess.Popen(
        command(folder, [name], since=0), cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"FEDERATION_FOLDER": str(elsewhere), "HOME": str(elsewhere)} | environment,
    )  # fmt: skip


def rounds_sent(folder: Path, name: str) -> int:
    with suppress(OSError):
        return int(json.loads((folder / f"tracking-{name}.json").read_text())["rounds"])
    return 0


def end(process: "subprocess.Popen[str]") -> str:
    """Tell a follower that its run has ended; return the rest of what it prints."""
    text, _ = process.communicate("", timeout=TIMEOUT)
    assert process.returncode == 0
    return text


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Serve a database in `folder`; yield the address."""
    address = f"http://127.0.0.1:{port}"
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options, "--port", str(port), "--workers", "1"],
        cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def is_up() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1) as answer:
            return bool(answer.status == 200)
        return False

    try:
        eventually(is_up, TIMEOUT)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_an_mlflow_server_that_comes_late_gets_all_of_a_run_and_each_round_once(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    run, port = tmp_path / "federated", free_port()
    address = f"http://127.0.0.1:{port}"
    as_simulated = hide_tensorflow.environment()  # MLflow itself imports TensorFlow where it is installed
    process = follower(run, "mlflow", MLFLOW_TRACKING_URI=address, **as_simulated)
    write_run(run, 1)
    assert process.stdout and "tracking=mlflow does not work for now" in process.stdout.readline()
    with mlflow_server(tmp_path, port):
        eventually(lambda: rounds_sent(run, "mlflow") == 2, TIMEOUT)
        write_run(run, 3, "failed")
        assert "does not work" not in (text := end(process)) and f"of experiment 1, {address}" in text
        client = mlflow.MlflowClient(address)
        assert [found.info.status for found in client.search_runs(["1"])] == ["FAILED"]
        process = follower(run, "mlflow", MLFLOW_TRACKING_URI=address)  # after --resume
        metrics = write_run(run, 4, "finished", **{"num-server-rounds": 4})
        end(process)
        (found,) = client.search_runs(["1"])
        identity = found.info.run_id
        for name in numbers(metrics["rounds"][-1]):
            kept = [(one.step, one.value) for one in client.get_metric_history(identity, name)]
            assert sorted(kept) == [(r["round"], numbers(r)[name]) for r in metrics["rounds"] if name in numbers(r)], (
                name
            )
        assert found.info.status == "FINISHED" and found.info.run_name == "federated"
        assert found.data.params["learning-rate"] == "0.0" and found.data.params["dataset"] == "tiny"
        assert (found.data.params["num-server-rounds"], found.data.tags["num-server-rounds"]) == ("3", "4")
        assert client.get_experiment("1").name == "tiny"
        files = {file.path for folder in (None, "model") for file in client.list_artifacts(identity, folder)}
        assert files == {"curves.png", "metrics.json", "model", "model/final_model.pt"}


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a file of W&B, which is a log as LevelDB writes it: pieces in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # the only or last piece
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_keeps_the_rounds_the_config_and_the_model(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "federated"
    write_run(run, 1, "failed")
    assert "tracking=wandb: offline, in " in end(follower(run, "wandb", WANDB_MODE="offline"))
    metrics = write_run(run, 3, "finished")
    end(follower(run, "wandb", WANDB_MODE="offline"))
    files = sorted(
        (tmp_path / "elsewhere" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime
    )
    assert [file.name for file in files] == [f"run-{metrics['run']}.wandb"] * 2, "the same run, twice"
    records = [record for file in files for record in wandb_records(file)]
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            found.setdefault(int(items["_step"]), {}).update({key: json.loads(text) for key, text in items.items()})
    for row in metrics["rounds"]:
        assert found[row["round"]].items() >= numbers(row).items()
    assert len(found) == 4 and found[3]["curves/_type"] == "image-file"
    config = {item.key: item.value_json for record in records for item in record.run.config.update}
    assert config["num-server-rounds"] == "3" and config["dataset"] == '"tiny"'
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]
    (model,) = (record.artifact for record in records if record.HasField("artifact"))
    assert model.type == "model" and [entry.path for entry in model.manifest.contents] == ["final_model.pt"]


@pytest.fixture
def deaf() -> Iterator[int]:
    """Listen at a port, and never answer."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield int(listener.getsockname()[1])


@pytest.mark.usefixtures("in_a_run")
def test_a_tracker_that_never_answers_delays_no_round(
    terminals: Terminals, deaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("tensorboard")
    (terminals.folder / "tiny.py").write_text(TINY_NUMPY)
    port, config = free_port(), SETTINGS | {"tracking": "mlflow tensorboard"}
    start = ("server.py", "--task", "tiny", "--address", f"127.0.0.1:{port}", "--run-config", as_text(config))
    deaf_address = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{deaf}"}
    server = terminals.open(*start, **deaf_address)
    clients = [client(terminals, port) for _ in range(2)]
    assert server.wait(400) == 0, server.text
    assert [one.wait(30) for one in clients] == [0, 0]
    assert "tracking=mlflow lacks the end of the run: federate track" in server.text
    metrics = metrics_of(terminals.folder)
    run = terminals.folder / "runs" / "federated"
    assert metrics["final_weights_sha256"] == undisturbed(terminals.folder, SETTINGS, monkeypatch)
    assert rounds_sent(run, "tensorboard") == len(metrics["rounds"]) == 4 and rounds_sent(run, "mlflow") == 0
    assert_all_gone(terminals)
    server = terminals.open(*start, "--resume", "--rounds", "9", **deaf_address)  # waits for clients
    server.wait_for("waiting for 2 clients")
    server.interrupt()
    assert server.wait(30) == 130, server.text
    assert_all_gone(terminals)
