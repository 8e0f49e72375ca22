"""Clients share the cores of their host, unless they are told how many threads to use."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from federation.app import cores
from tests.conftest import ROOT

FORKS = """
import subprocess
import threading

import numpy

import client

def compute():
    while not over.is_set():
        numpy.linalg.norm(numbers)

numbers, over = numpy.ones(200_000), threading.Event()
thread = threading.Thread(target=compute, daemon=True)
thread.start()
for _ in range(50):
    subprocess.run(["true"], preexec_fn=bool)  # as Ray does, so that Python really forks
over.set()
thread.join(20)
print("waits for ever" if thread.is_alive() else "ends")
"""
NODE, OTHER = {"cmdline": ["python", "flower-supernode", "--insecure"]}, {"cmdline": None}


def threads_of_a_client(monkeypatch: pytest.MonkeyPatch, nodes: int) -> set[int]:
    """Let a client share 8 cores, and return how many threads it has told anything to use."""
    processes = [SimpleNamespace(info=info) for info in [NODE] * nodes + [OTHER]]
    limits, torch = Mock(), Mock()
    monkeypatch.setattr(cores.psutil, "process_iter", lambda _: processes)
    monkeypatch.setattr(cores, "cores", lambda: 8)
    monkeypatch.setattr(cores, "threadpool_limits", limits)
    monkeypatch.setitem(sys.modules, "torch", torch)
    cores.share_cores.__wrapped__()
    told = [int(os.environ[variable]) for variable in cores.THREADS]
    return {*told, limits.call_args.args[0], torch.set_num_threads.call_args.args[0]}


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in cores.THREADS:
        monkeypatch.setenv(variable, "1")  # so that it is put back
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("nodes, threads", [(0, 8), (1, 8), (2, 4), (3, 2), (20, 1)])
def test_clients_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch, nodes: int, threads: int) -> None:
    assert threads_of_a_client(monkeypatch, nodes) == {threads}


def test_whoever_says_how_many_threads_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_a_client(monkeypatch, nodes=2) == {3}


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")
def test_the_server_of_a_simulation_computes_while_ray_forks() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True)
    assert ran.stdout == "ends\n", ran.stderr
