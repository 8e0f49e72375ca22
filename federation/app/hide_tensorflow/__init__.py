"""Hide TensorFlow from Flower's Simulation Engine, so that it is only loaded for tasks that use it.

If TensorFlow is installed, the engine imports it in the server's process and in every Ray worker. This takes seconds
and hundreds of megabytes, and triton, PyTorch's compiler, crashes if it is loaded into the same process afterwards.
Therefore TensorFlow appears not to be installed from the start of a process (`sitecustomize.py`) until the process
loads the task.
"""

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path

FOLDER = str(Path(__file__).parent)


def environment() -> dict[str, str]:
    """Return environment variables that hide TensorFlow from a process and from the processes that it starts."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))}


def from_workers() -> None:
    """Hide TensorFlow from the Ray workers that this process will start, if it is already loaded here.

    With `flwr run`, an app cannot set the environment of its processes. But Flower imports the ClientApp before it
    starts Ray, and passes sys.path on to the workers.
    """
    if sys.modules.get("tensorflow"):
        sys.path.insert(0, FOLDER)
        if hasattr(os, "RTLD_DEEPBIND"):  # only on Linux does PyTorch come with triton
            _load_triton()


def _load_triton() -> None:
    """Load triton, if it is installed, in such a way that it uses its own LLVM and not TensorFlow's version of it."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
    with suppress(ImportError):
        importlib.import_module("triton")
    sys.setdlopenflags(flags)


def reveal() -> None:
    """Allow this process to import TensorFlow."""
    if sys.modules.get("tensorflow", ...) is None:
        del sys.modules["tensorflow"]
