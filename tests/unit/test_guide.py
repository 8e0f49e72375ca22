"""The scripts of the guide "Federate your own script" are run and checked; the check prints what the guide shows."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

GUIDE = (ROOT / "docs" / "your_own_script.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of the guide and flowers.csv, which has 150 rows of four numbers and a class."""
    folder = tmp_path_factory.mktemp("guide")
    for block in BLOCKS:
        if name := re.match(r"# (\w+\.py)\n", block):
            (folder / name[1]).write_text(block, "utf-8")
    names = [block for block in BLOCKS if not block.startswith("# ")]
    header = "from pathlib import Path\nimport numpy\nimport torch\n"
    (folder / "smallest.py").write_text(header + "\n".join(names), "utf-8")
    random = np.random.default_rng(0)
    x = random.normal(size=(150, 4))
    y = (x @ random.normal(size=(4, 3))).argmax(1)
    np.savetxt(folder / "flowers.csv", np.column_stack([x, y]), delimiter=",")
    return folder


def test_before_and_after_are_the_same_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    results = []
    for script in ("before.py", "after.py"):
        monkeypatch.setattr(sys, "argv", [script])
        runpy.run_path(script, run_name="__main__")
        weights = torch.load(folder / "model.pt", weights_only=True).values()
        results.append((capsys.readouterr().out, [weight.tolist() for weight in weights]))
        (folder / "model.pt").unlink()
    assert results[0] == results[1]
    assert float(results[0][0].split()[1]) > 0.8


CHECKS = """
import contextlib, io, json, runpy, sys
outcomes = {}
for script in sys.argv[1:]:
    sys.argv = ["check.py", script]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module("federation.check", run_name="__main__")
        except SystemExit as end:
            outcomes[script] = printed.getvalue(), end.code
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def checks(folder: Path) -> dict[str, Any]:
    """What the check prints for each script, and its exit status. It runs in a new process, as it watches all files."""
    command = [sys.executable, "-c", CHECKS, "before", "after", "smallest"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_check_prints_what_the_guide_shows(folder: Path, checks: dict[str, Any]) -> None:
    printed, error = checks["before"]
    [stated] = re.findall(r"lists the problems:\n\n```\n(.*?)```", GUIDE, re.DOTALL)
    said = f"{printed}{error}\n".replace(f"{folder}{os.sep}", "")
    said = re.sub("accuracy .*\n", "", said)  # which the script itself prints
    assert said == stated


@pytest.mark.parametrize("script", ["after", "smallest"])
def test_the_scripts_of_the_guide_pass_without_warnings(checks: dict[str, Any], script: str) -> None:
    assert checks[script] == [f"{script} can be federated\n", 0]
