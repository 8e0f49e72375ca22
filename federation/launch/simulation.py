"""The nodes of a simulation: how many play the clients, and which part of the machine each of them gets."""

import os
import shutil
import subprocess
from math import ceil
from typing import Any

from federation.app.config import parse
from federation.app.cores import cores

NODES_PER_GPU = 4  # each has a CUDA context of its own, of half a gigabyte, and its own copy of the data
Settings = dict[str, Any]  # of Flower's `--federation-config`
LEAST: dict[str, float | None] = {  # what each of them has to be at least; None for one that is no number
    "num-supernodes": 1, "client-resources-num-cpus": 1, "client-resources-num-gpus": 0, "init-args-num-cpus": 1,
    "init-args-num-gpus": 0, "init-args-logging-level": None, "init-args-log-to-driver": None, "backend": None,
    "verbose": None,
}  # fmt: skip


def plan(clients: int, gpus_per_client: float | None = None, overrides: str = "") -> Settings:
    """Return Flower's settings for a simulation on this machine.

    `overrides` has the syntax of `flwr run --federation-config`. Raises ValueError for settings that Flower does not
    have or take, and as `federation_config` does.
    """
    return federation_config(clients, cores(), count_gpus(), gpus_per_client, _read(overrides))


def _read(text: str) -> Settings:
    try:
        settings = parse(text)
    except ValueError:
        raise ValueError(f'--federation-config {text!r} is not of the form key=value key="text"') from None
    for key, value in settings.items():
        if key not in LEAST:
            raise ValueError(f"--federation-config has no setting {key!r}; its settings are: {', '.join(LEAST)}")
        if (least := LEAST[key]) is not None and not (_is_number(key, value) and value >= least):
            raise ValueError(f"--federation-config {key}={value!r}: a number, {least:g} or more, is needed")
    return settings


def _is_number(key: str, value: Any) -> bool:
    """Tell whether a value is one that Flower takes: only GPUs can be given in parts."""
    return type(value) is int or (key == "client-resources-num-gpus" and type(value) is float)


def federation_config(
    clients: int, cpus: int, gpus: int, gpus_per_client: float | None, overrides: Settings
) -> Settings:
    """Return Flower's settings for a simulation of `clients` clients on a machine with so many cores and GPUs.

    A node trains one client at a time, on a core of its own and, where there are GPUs, on its share of one. So there
    are as many nodes as cores, or as fit on the GPUs, and each plays several clients. Raises ValueError for a
    `gpus_per_client` that the machine does not have.
    """
    if gpus_per_client is None:
        nodes = min(clients, cpus, NODES_PER_GPU * gpus or cpus)
        share = _share(nodes, gpus) if gpus else 0.0
    else:
        share = gpus_per_client
        nodes = min(clients, cpus, _slots(share, gpus) if share else cpus)
    config: Settings = {
        "num-supernodes": nodes, "client-resources-num-cpus": 1, "client-resources-num-gpus": share,
        "init-args-num-cpus": nodes, "init-args-log-to-driver": False,
    }  # fmt: skip
    if "client-resources-num-cpus" in overrides:
        del config["init-args-num-cpus"]  # the number of nodes that fit is then Ray's to find out
    return config | overrides


def _share(nodes: int, gpus: int) -> float:
    """Return the part of a GPU, or how many GPUs, a node gets. Ray gives no node parts of two GPUs."""
    return float(gpus // nodes) if nodes <= gpus else 1 / ceil(nodes / gpus)


def _slots(share: float, gpus: int) -> int:
    """Return how many nodes fit on the GPUs."""
    if not 0 < share <= gpus or (share > 1 and share % 1):
        raise ValueError(f"--gpus-per-client {share:g}: this machine has {gpus} {'GPU' if gpus == 1 else 'GPUs'}; "
                         "give a part of one, or a whole number of them")  # fmt: skip
    return int(1 / share) * gpus if share <= 1 else gpus // int(share)


def describe(clients: int, config: Settings) -> str:
    """Say in one line who plays the clients of a simulation, and on which device they train."""
    nodes, share = config["num-supernodes"], config["client-resources-num-gpus"]
    device = f"{share:.3g} GPU" if share else f"{config['client-resources-num-cpus']} CPU core"
    return f"simulating {clients} clients on {nodes} {'node' if nodes == 1 else 'nodes'}, with {device} each"


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
