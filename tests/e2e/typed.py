"""What the tests of the pages' commands share."""

import shutil
from pathlib import Path

from tests.conftest import Terminals


def put_in_its_usual_place(data: Path, terminals: Terminals) -> None:
    """Let a folder of images be found without --data: fewer than the embedded ones, where these take longer."""
    shutil.copytree(data, Path(terminals.environment["XDG_CACHE_HOME"]) / "cifar10", dirs_exist_ok=True)
