"""The guide "Federate your own script" keeps its word: its scripts are run, checked and compared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

GUIDE = (ROOT / "docs" / "your_own_script.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of the guide and flowers.csv, which has 150 rows of four figures and a class."""
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


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_before_and_after_are_the_same_training(folder: Path) -> None:
    results = []
    for script in ("before.py", "after.py"):
        outcome = python(folder, script)
        assert outcome.returncode == 0, outcome.stderr
        weights = torch.load(folder / "model.pt", weights_only=True).values()
        results.append((outcome.stdout, [weight.tolist() for weight in weights]))
        (folder / "model.pt").unlink()
    assert results[0] == results[1]
    assert float(results[0][0].split()[1]) > 0.8


def test_the_check_says_of_before_what_the_guide_says(folder: Path) -> None:
    check = python(folder, "-m", "federation.check", "before")
    assert check.returncode == 1
    [stated] = re.findall(r"says what is in the way:\n\n```\n(.*?)```", GUIDE, re.DOTALL)
    said = (check.stdout + check.stderr).replace(f"{folder}{os.sep}", "")
    said = re.sub("accuracy .*\n", "", said)  # which the script itself prints
    assert said == stated


@pytest.mark.parametrize("script", ["after", "smallest"])
def test_the_scripts_of_the_guide_pass_without_a_word(folder: Path, script: str) -> None:
    check = python(folder, "-m", "federation.check", script)
    assert check.stdout == f"{script} can be federated\n", check.stderr
