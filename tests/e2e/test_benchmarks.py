"""Every benchmark runs from its command to its table, at a size of seconds. What it measures is tested elsewhere."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cifar
from tests.conftest import ROOT, Terminals, eventually
from tests.images import write_images

SHORT = "--data embedded --seeds 1 --rounds 1"
COMMANDS = {  # each with what its output must have; {data} is a folder of a few images, {out} one for results
    "attacks": (f"{SHORT} --partition IID --attack none --strategy fedavg --out {{out}}/a.json", r"\| fedavg \| \d"),
    "chaos": ("--data {data} --clients 2 --rounds 2 --out {out}/chaos", r"none: 2 rounds, accuracy 0\.\d"),
    "growth": ("sites --smoke --out {out}/sites.json", r"\| 2 \| \d+ \| \d"),
    "heterogeneity": (
        f"{SHORT} --setting '10 of 10 clients' --partition IID --strategy fedavg --out {{out}}/h.json",
        r"\| fedavg \| \d",
    ),
    "input_pipeline": (
        "--data {data} --samples 96 --batch 32 --repeats 1 --accuracy 0 --out {out}/i.json",
        r"\| cifar\.py \| [\d,]+ \(1\.00 ×\)",
    ),
    "mcmahan": ("--smoke --out {out}/m.json", r"\| 2NN, shards \| 97 % \|"),
    "niid_bench": (
        "--data {data} --partitioner iid --clients 2 --rounds 1 --local-epochs 1 --out {out}/niid",
        r"\| iid \| fedavg \| 1 \| \d",
    ),
    "pfl_cifar": ("--smoke --out {out}/p.json", r"\| this project \| 2 \| \d"),
    "privacy": ("--data embedded --seeds 1 --rounds 1 --multipliers 0 2 --out {out}", r"\| none \| - \| 0\.\d"),
    "round_overhead": ("--data {data} --rounds 2 --clients 1", r"ours / idle: 0\.\d"),
    "rounds": (f"{SHORT} --row 'one epoch a round' --out {{out}}/r.json", r"\| one epoch a round \| \d"),
    "seconds": ("--help", "usage"),  # on Flower's engine without this project's, it takes minutes
    "side_by_side": ("--data {data}", r"federated +\d"),
    "simulated_rounds": (
        "--data {data} --sides plain --clients 2 --rounds 2 --repeats 1 --no-whole --out {out}/sr.json",
        r"plain",
    ),
    "threads": ("--data {data} --repeats 1", r"default +[\d,]+ samples/s per process"),
    "topologies": (f"{SHORT} --out {{out}}/t.json --picture {{out}}/t.png", r"\| Dirichlet 0\.5 \| ring \| \d"),
    "training_profile": ("--data embedded --samples 960 --batch 32 --repeats 1 --out {out}/tp.json", r"\|.*%"),
    "uploads": (f"{SHORT} --out {{out}}/u.json", r"\| top-k 0\.01 \| \d"),
    "whole_run": ("--baseline {root} --data {data} --rounds 1 --repeats 1", r"ours / baseline: \d\.\d\d"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a few images, ten classes in both splits."""
    return write_images(tmp_path_factory.mktemp("images"), 192, 40)


def test_no_benchmark_is_left_out() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert scripts == COMMANDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_it_ends_with_its_result(
    name: str, data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options, result = COMMANDS[name]
    if name == "side_by_side":
        for model in ("centralized/model.pt", "federated/final_model.pt"):
            (tmp_path / "runs" / model).parent.mkdir(parents=True)
            torch.save(cifar.Net().state_dict(), tmp_path / "runs" / model)
    given = options.format(data=data, out=tmp_path, root=ROOT)
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *shlex.split(given)]
    cache = tmp_path_factory.getbasetemp() / "cache"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment | {"XDG_CACHE_HOME": str(cache)}, capture_output=True, text=True,
        start_new_session=True,  # or it would share with the tests what Linux gives to their session
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(result, ran.stdout), ran.stdout
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text("utf-8")), path


@pytest.mark.slow
def test_processes_make_the_model_of_one_and_end_when_their_command_is_killed(terminals: Terminals) -> None:
    options = shlex.split("--partitioner dirichlet --strategy scaffold --clients 3 --local-epochs 1 --data embedded")

    def command(processes: int, rounds: int) -> list[str]:
        given = {"processes": processes, "rounds": rounds, "out": terminals.folder / str(processes)}
        return ["benchmarks/niid_bench.py", *options, *(f"--{name}={value}" for name, value in given.items())]

    for processes in (1, 2):
        status, output = terminals.run(*command(processes, 1))
        assert status == 0 and re.search(r"\| dirichlet \| scaffold \| 1 \| \d", output), output
    found = [json.loads(path.read_text("utf-8")) for path in terminals.folder.glob("*/*/metrics.json")]
    assert len(found) == 2 and found[0]["final_weights_sha256"] == found[1]["final_weights_sha256"]

    for stop, status in (("terminate", 130), ("kill", -9)):
        running = terminals.open(*command(2, 99))
        running.wait_for("resuming after round")
        eventually(
            lambda: len([one for one in terminals.processes() if "spawn_main" in " ".join(one.cmdline())]) == 2, 60
        )
        getattr(running.process, stop)()
        assert running.wait() == status and "Traceback" not in running.text
        eventually(lambda: not terminals.processes(), 60)
