"""Keep TensorFlow out of Flower's Simulation Engine, so that only tasks that use it load it.

The engine imports TensorFlow wherever it is installed, in the server's process and in every Ray worker. That takes
seconds and hundreds of megabytes, and PyTorch's compiler, triton, crashes when it is loaded into the same process
afterwards. So TensorFlow counts as not installed from the start of a process (`sitecustomize.py`) until it loads the
task.
"""

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path

FOLDER = str(Path(__file__).parent)


def environment() -> dict[str, str]:
    """Return the environment variables with which a process, and those that it starts, have TensorFlow hidden."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))}


def from_workers() -> None:
    """Hide TensorFlow from the Ray workers that this process will start, if it has been loaded here already.

    With `flwr run`, an app has no say in the environment of its processes. But Flower imports the ClientApp before it
    starts Ray, and hands sys.path on to the workers.
    """
    if sys.modules.get("tensorflow"):
        sys.path.insert(0, FOLDER)
        if hasattr(os, "RTLD_DEEPBIND"):  # Linux, where PyTorch comes with triton
            _load_triton()


def _load_triton() -> None:
    """Load triton, where it is installed, so that it finds its own LLVM and not the other version in TensorFlow."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
    with suppress(ImportError):
        importlib.import_module("triton")
    sys.setdlopenflags(flags)


def reveal() -> None:
    """Let this process import TensorFlow from now on."""
    if sys.modules.get("tensorflow", ...) is None:
        del sys.modules["tensorflow"]
