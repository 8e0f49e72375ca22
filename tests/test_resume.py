"""A run that is resumed ends as one that was never interrupted: with the very same weights."""

import json
from typing import Any

import pytest

from tests.conftest import Terminals, eventually

pytestmark = pytest.mark.slow
SKEWED = "partitioner='dirichlet' learning-rate=0.01 seed=3 fraction-train=0.5"  # whatever a round may depend on


def metrics_of(terminals: Terminals, out: str) -> dict[str, Any]:
    return json.loads((terminals.folder / out / "metrics.json").read_text("utf-8"))


def simulate(terminals: Terminals, out: str, *options: str) -> str:
    """Play two clients, and return what the server says, once it has ended well."""
    status, text = terminals.run("server.py", "--simulate", "2", "--out", out, *options)
    assert status == 0, text
    return text


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(terminals: Terminals) -> None:
    options = ("--data", "embedded", "--run-config", SKEWED)
    simulate(terminals, "whole", "--rounds", "2", *options)
    simulate(terminals, "halves", "--rounds", "1", *options)
    half = metrics_of(terminals, "halves")
    assert len(half["rounds"]) == 2 and half["status"] == "finished"

    text = simulate(terminals, "halves", "--rounds", "2", "--resume")  # all else is as it was begun
    assert "resuming after round 1" in text
    whole, resumed = metrics_of(terminals, "whole"), metrics_of(terminals, "halves")
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"] != half["final_weights_sha256"]
    assert resumed["status"] == "finished" and resumed["partitions"] == whole["partitions"] == half["partitions"]
    assert [row["round"] for row in resumed["rounds"]] == [0, 1, 2]
    assert resumed["rounds"][:2] == half["rounds"]
    for key in ("server_loss", "server_accuracy", "train_loss", "clients_accuracy", "clients", "bytes_up"):
        assert [row[key] for row in resumed["rounds"]] == [row[key] for row in whole["rounds"]]
    changed = {key for key, value in resumed["config"].items() if value != whole["config"][key]}
    assert changed == {"resume", "out"}
    models = [(terminals.folder / out / "final_model.pt").read_bytes() for out in ("whole", "halves")]
    assert models[0] == models[1]
    eventually(lambda: terminals.processes() == [] and terminals.leftovers() == [], 2)

    for other, named in (("seed=4", "seed=4"), ("learning-rate=0.02", "learning-rate=0.02")):
        status, text = terminals.run(
            "server.py", "--simulate", "2", "--out", "halves", "--resume", "--run-config", other
        )
        assert (status, "Traceback" in text) == (2, False) and named in text.splitlines()[-1], text
    assert metrics_of(terminals, "halves") == resumed, "who is refused changes nothing"
