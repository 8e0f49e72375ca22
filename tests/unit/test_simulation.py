"""How many nodes play the clients of a simulation, and what each gets: what is handed to Flower."""

import sys
from pathlib import Path

import pytest

from federation.launch.simulation import count_gpus, describe, federation_config

CPU = {"client-resources-num-cpus": 1, "client-resources-num-gpus": 0.0, "init-args-log-to-driver": False}


@pytest.mark.parametrize(
    ("clients", "cores", "nodes"), [(10, 2, 2), (1000, 2, 2), (1, 2, 1), (3, 16, 3), (100, 16, 16)]
)
def test_without_gpus_there_is_a_node_per_core(clients: int, cores: int, nodes: int) -> None:
    expected = CPU | {"num-supernodes": nodes, "init-args-num-cpus": nodes}
    assert federation_config(clients, cores, 0, None, {}) == expected


@pytest.mark.parametrize(
    ("clients", "cores", "gpus", "nodes", "share"),
    [(10, 16, 1, 4, 0.25), (2, 16, 1, 2, 0.5), (1, 16, 1, 1, 1), (10, 2, 1, 2, 0.5), (100, 64, 4, 16, 0.25),
     (3, 16, 2, 3, 0.5), (5, 16, 2, 5, 1 / 3), (2, 16, 4, 2, 2), (3, 16, 8, 3, 2)],
)  # fmt: skip
def test_gpus_are_shared_among_the_nodes(clients: int, cores: int, gpus: int, nodes: int, share: float) -> None:
    config = federation_config(clients, cores, gpus, None, {})
    assert (config["num-supernodes"], config["client-resources-num-gpus"]) == (nodes, share)
    fitting = int(1 / share) * gpus if share <= 1 else gpus // share
    assert fitting >= nodes, "or Flower would wait for ever for a node that fits on no GPU"


@pytest.mark.parametrize(
    ("share", "gpus", "nodes"), [(0.0, 1, 16), (0.5, 1, 2), (0.1, 1, 10), (1.0, 2, 2), (2.0, 4, 2), (0.3, 2, 6)]
)
def test_the_share_of_a_client_can_be_chosen(share: float, gpus: int, nodes: int) -> None:
    config = federation_config(100, 16, gpus, share, {})
    assert (config["num-supernodes"], config["client-resources-num-gpus"]) == (nodes, share)


@pytest.mark.parametrize(
    ("share", "gpus"), [(0.5, 0), (2.0, 1), (1.5, 4), (-0.5, 1), (float("nan"), 1), (float("inf"), 1)]
)
def test_a_share_that_the_machine_does_not_have_is_refused(share: float, gpus: int) -> None:
    with pytest.raises(ValueError, match=f"--gpus-per-client {share:g}: this machine has {gpus} GPU"):
        federation_config(10, 16, gpus, share, {})


def test_flowers_own_settings_have_the_last_word() -> None:
    config = federation_config(
        10, 16, 1, None, {"num-supernodes": 10, "client-resources-num-gpus": 0.1, "backend": "ray"}
    )
    assert config["num-supernodes"] == 10 and config["client-resources-num-gpus"] == 0.1 and config["backend"] == "ray"
    config = federation_config(10, 2, 0, None, {"client-resources-num-cpus": 2})
    assert config["client-resources-num-cpus"] == 2 and "init-args-num-cpus" not in config


def test_a_line_says_who_trains_where() -> None:
    assert (
        describe(10, federation_config(10, 2, 0, None, {})) == "simulating 10 clients on 2 nodes, with 1 CPU core each"
    )
    assert describe(3, federation_config(3, 8, 1, None, {})) == "simulating 3 clients on 3 nodes, with 0.333 GPU each"
    assert describe(1, federation_config(1, 8, 0, None, {})) == "simulating 1 clients on 1 node, with 1 CPU core each"


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1", 2), ("GPU-1234, GPU-5678", 2)])
def test_only_gpus_that_are_visible_count(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


@pytest.mark.skipif(sys.platform == "win32", reason="the driver is a script for sh")
def test_gpus_are_counted_as_the_driver_lists_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus() == 0
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    driver.chmod(0o755)
    assert count_gpus() == 2
