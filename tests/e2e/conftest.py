"""A copy of the project in which commands are typed as the pages show them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Terminals


@pytest.fixture
def checkout(terminals: Terminals) -> Path:
    """A copy of the project, with a folder of images DIR in it."""
    folder = terminals.folder / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    random = np.random.default_rng(0)
    for split, samples in (("train", 20), ("test", 10)):
        for label in range(10):
            (folder / "DIR" / split / str(label)).mkdir(parents=True)
            for i in range(samples):
                pixels = random.integers(0, 25, (32, 32, 3), np.uint8) + np.uint8(23 * label)
                Image.fromarray(pixels).save(folder / "DIR" / split / str(label) / f"{i}.png")
    return folder
