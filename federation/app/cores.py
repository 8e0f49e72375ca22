"""How many cores a client takes: its share of those of its host."""

import functools
import os
import sys

import psutil
from threadpoolctl import threadpool_limits

THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "PJRT_NPROC")  # PyTorch, Keras, JAX


@functools.cache
def share_cores() -> None:
    """Give this process its share of the cores, before a framework does any work: one of C clients here gets 1/C.

    Frameworks take all cores by default, and clients that share a host then slow each other down several times.
    Those that are imported already, for this process was forked, may have read their variables: they are told.
    """
    if THREADS[0] not in os.environ:
        commands = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
        clients = sum("flower-supernode" in command for command in commands)
        os.environ[THREADS[0]] = str(max(1, cores() // max(1, clients)))
    for variable in THREADS:
        os.environ.setdefault(variable, os.environ[THREADS[0]])
    threads = int(os.environ[THREADS[0]])
    threadpool_limits(threads)  # of NumPy's linear algebra, too
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def use_one_blas_thread() -> None:
    """Let NumPy's linear algebra use one thread, until `share_cores` has more for this process.

    In a simulation, the ServerApp computes in a thread while Flower starts Ray in another. Ray forks, and OpenBLAS ends
    its threads before each fork: a computation that uses them at that moment would wait for ever.
    """
    threadpool_limits(1, user_api="blas")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
