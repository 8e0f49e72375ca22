"""The images and compose.yaml, built and run for real: where there is an engine for containers."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

ENGINE = os.environ.get("CONTAINER_ENGINE") or next(filter(shutil.which, ("docker", "podman")), "")


def test_no_data_and_no_keys_go_into_an_image() -> None:
    """Everything is left out but what is named, and none of that can be a key, a run or a data set."""
    first, *named = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert first == "*"
    assert all(name.startswith("!") and name.endswith((".py", ".txt", ".toml")) for name in named)


def test_what_is_pinned_suits_what_is_required() -> None:
    pinned = (ROOT / "containers" / "client.txt").read_text("utf-8") + (ROOT / "containers" / "server.txt").read_text()
    names = {line.split("==")[0] for line in pinned.splitlines() if line and not line.startswith("#")}
    required = (
        line.split(">")[0].split("[")[0] for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    )
    assert {name for name in required if name} - names == {"torch", "torchvision"}, "which the Dockerfile pins"
    assert all("==" in line or line.startswith("#") for line in pinned.splitlines())


@pytest.mark.slow
def test_a_federation_in_containers_ends_by_itself(tmp_path: Path) -> None:
    for needed in ("info", "compose version"):
        if not ENGINE or subprocess.run([ENGINE, *needed.split()], capture_output=True, check=False).returncode:
            pytest.skip("there is no docker or podman here, with compose, or it does not answer")
    name = f"test-{tmp_path.name}".replace("_", "-").lower()
    compose = [ENGINE, "compose", "--project-name", name]
    settings = os.environ | {"ROUNDS": "1"}
    try:
        up = subprocess.run([*compose, "up", "--build"], cwd=ROOT, env=settings, check=False, timeout=1800)
        ids = subprocess.run(
            [*compose, "ps", "-aq"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        states = [json.loads(subprocess.check_output([ENGINE, "inspect", one]))[0]["State"] for one in ids]
        assert (up.returncode, [state["ExitCode"] for state in states]) == (0, [0, 0, 0, 0])
    finally:
        subprocess.run([*compose, "down", "--volumes"], cwd=ROOT, check=False)
