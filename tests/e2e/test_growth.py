"""The study of growth runs real sites, and finds all of their processes."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_two_sites_are_measured(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks" / "growth.py"), tmp_path / "sites.json"
    ran = subprocess.run(
        [sys.executable, script, "sites", "--smoke", "--out", str(out)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    cell = json.loads(out.read_text())["2"]
    assert ran.stdout.splitlines()[-1].startswith("| 2 | ") and cell["accuracy"] == 0.5 and cell["samples"] == 2000
    assert {"SuperLink", "SuperNode", "SuperExec", "proxy", "server", "launchers"} <= cell["largest"].keys()
    assert 20 < cell["memory_of"]["SuperLink"] < cell["memory"] and cell["seconds"] > 0 and cell["joined"] > 0
