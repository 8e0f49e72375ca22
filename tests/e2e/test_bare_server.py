"""A server where the task's framework is not installed: it averages what clients with the framework have trained."""

import json

import numpy as np
import pytest
import torch

from federation.app.task import client_seed
from federation.launch.network import free_port
from tests.conftest import Terminals
from tests.tasks import TINY

MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n"


@pytest.fixture
def without_torch(terminals: Terminals) -> dict[str, str]:
    """Return the environment of a process that cannot import PyTorch; write a task that needs it."""
    (terminals.folder / "tiny.py").write_text(TINY)
    (terminals.folder / "missing").mkdir()
    (terminals.folder / "missing" / "torch.py").write_text(MISSING)
    return {"PYTHONPATH": str(terminals.folder / "missing")}


@pytest.mark.slow
def test_a_server_without_the_framework(terminals: Terminals, without_torch: dict[str, str]) -> None:
    rng, initial = np.random.default_rng(0), terminals.folder / "initial.npz"
    began = {"weight": rng.normal(size=(10, 256)).astype("f"), "bias": rng.normal(size=10).astype("f")}
    np.savez(initial, **began)
    address = f"127.0.0.1:{free_port()}"
    command = ("server.py", "--task", "tiny", "--address", address, "--rounds", "1", "--initial", str(initial))

    status, text = terminals.run(*command, **without_torch)
    assert status and "No module named 'torch'; install it by: pip install '.'" in text, "since it would evaluate"

    server = terminals.open(*command, "--run-config", "server-evaluation=false", **without_torch)
    clients = [terminals.open("client.py", "--server", address, "--own-data") for _ in range(2)]
    assert [one.wait() for one in (server, *clients)] == [0, 0, 0], server.text
    folder = terminals.folder / "runs" / "federated"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "torch" not in metrics["versions"]
    trained = [train(began, client_seed(0, place, 0)) for place in metrics["clients"].values()]
    for name in ("final_model.npz", "best_model.npz"):
        with np.load(folder / name) as saved:
            assert sorted(saved) == sorted(began)
            for key in began:
                np.testing.assert_allclose(saved[key], np.mean([one[key] for one in trained], axis=0), atol=1e-5)


def train(began: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Train the tiny task from the weights `began`, as one of its clients does; return the new weights."""
    task: dict[str, object] = {}
    exec(TINY, task)
    net = task["Net"]()
    net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in began.items()})
    task["train"](net, task["load_data"]()[0], epochs=1, batch_size=32, seed=seed)
    return {name: value.numpy() for name, value in net.state_dict().items()}
