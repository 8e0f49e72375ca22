"""The images and compose.yaml, built and run for real: where there is an engine for containers."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

import cifar
from tests.conftest import ROOT

ENGINE = os.environ.get("CONTAINER_ENGINE") or next(filter(shutil.which, ("docker", "podman")), "")


def test_no_data_and_no_keys_go_into_an_image() -> None:
    """Everything is left out but what is named, and none of that can be a key, a run or a data set."""
    first, *named = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert first == "*"
    assert all(
        name.startswith("!") and name.endswith((".py", ".txt", ".toml", ".css", ".html", ".js", ".svg"))
        for name in named
    )


def test_every_package_goes_into_the_images() -> None:
    """Each is named: below a folder that is left out, `**` finds nothing."""
    named = (ROOT / ".dockerignore").read_text("utf-8").split()
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "federation").rglob("*.py")}
    assert [folder for folder in sorted(folders) if f"!{folder}/*.py" not in named] == []


@pytest.mark.parametrize(
    ("pins", "requirements", "pinned_elsewhere"),
    [
        (("base", "client", "pictures", "server"), "requirements.txt", {"torch", "torchvision"}),  # in the Dockerfile
        (("base", "pictures"), "requirements-server.txt", set()),
    ],
)
def test_what_is_pinned_suits_what_is_required(
    pins: tuple[str, ...], requirements: str, pinned_elsewhere: set[str]
) -> None:
    lines = [line for name in pins for line in (ROOT / "containers" / f"{name}.txt").read_text("utf-8").splitlines()]
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    required = [
        Requirement(line) for line in (ROOT / requirements).read_text("utf-8").splitlines() if not line.startswith("#")
    ]
    assert {one.name for one in required} - pinned.keys() == pinned_elsewhere
    assert all(pinned[one.name] in one.specifier for one in required if one.name in pinned)


def test_each_image_is_built_once_and_the_server_can_be_reached_from_other_machines() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
    built = sorted(service["image"] for service in services.values() if "build" in service)
    assert built == sorted({service["image"] for service in services.values()})
    assert [port.rpartition(":")[2] for port in services["server"]["ports"]] == ["8080"]
    assert not any("ports" in service for name, service in services.items() if name != "server")


def skip_without_engine(*needed: str) -> None:
    for command in needed:
        if not ENGINE or subprocess.run([ENGINE, *command.split()], capture_output=True, check=False).returncode:
            pytest.skip("there is no docker or podman here, with compose, or it does not answer")


@pytest.mark.slow
def test_a_server_without_the_framework_in_a_container(tmp_path: Path) -> None:
    skip_without_engine("info")
    np.savez(tmp_path / "initial.npz", **{name: value.numpy() for name, value in cifar.Net().state_dict().items()})
    for target, image in (("server-slim", "flower_server_slim"), ("client", "flower_client")):
        subprocess.run([ENGINE, "build", "--target", target, "-t", image, "."], cwd=ROOT, check=True, timeout=1800)
    run, torch = (ENGINE, "run", "--rm", "--entrypoint", "python"), ("-c", "import torch")
    assert (
        b"No module named 'torch'" in subprocess.run([*run, "flower_server_slim", *torch], capture_output=True).stderr
    )
    server, *clients = names = [f"{tmp_path.name}-{i}".replace("_", "-") for i in range(3)]
    options = ("-v", f"{tmp_path / 'initial.npz'}:/initial.npz:ro", "flower_server_slim", "--rounds", "1")
    joins = ("--network", f"container:{server}", "flower_client", "--own-data", "--data", "embedded")
    try:
        start(server, *options, "--insecure", "--initial", "/initial.npz")
        for name in clients:
            start(name, *joins)
        statuses = subprocess.check_output([ENGINE, "wait", *names], text=True, timeout=600).split()
        assert statuses == ["0"] * 3, [subprocess.check_output([ENGINE, "logs", name], text=True) for name in names]
    finally:
        subprocess.run([ENGINE, "rm", "-f", *names], check=False)


def start(name: str, *command: str) -> None:
    subprocess.run([ENGINE, "run", "-d", "--name", name, *command], check=True, timeout=120)


@pytest.mark.slow
def test_a_federation_in_containers_ends_by_itself(tmp_path: Path) -> None:
    skip_without_engine("info", "compose version")
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
