"""Where the project's own files are: beside the package `federation` in a checkout, inside of it once installed."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "scripts"  # where pyproject.toml has a wheel put them
SCRIPTS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent  # of client.py, server.py, cifar.py and pyproject.toml
