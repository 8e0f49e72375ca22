"""Hide TensorFlow. Python runs this file when a process starts that has this folder on its path."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

sys.modules["tensorflow"] = None  # type: ignore[assignment]  # makes `import tensorflow` a ModuleNotFoundError


def run_next() -> None:
    """Run the sitecustomize that this one replaces: Python runs only the first that it finds."""
    here = sys.path.index(str(Path(__file__).parent))
    spec = PathFinder.find_spec("sitecustomize", sys.path[here + 1 :])
    if spec and spec.loader:
        spec.loader.exec_module(module_from_spec(spec))


run_next()
