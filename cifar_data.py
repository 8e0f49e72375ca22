"""The images for cifar.py: a folder of images, CIFAR-10 itself, or a small generated data set.

Images are decoded once and kept in ~/.cache/cifar10-decoded, so that a second start takes less than a second.
"""

import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Data = tuple[Tensor, Tensor]  # images (n, 32, 32, 3) uint8, labels (n,) int64

CLASSES = 10  # of the embedded data set, as in CIFAR-10
DATA_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cifar10"
ORIGINAL = "cifar-10-batches-py"  # the folder in the archive of CIFAR-10
EMBEDDED = "embedded"  # the name of the generated data set


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)`; images are read from the disk when they are used."""
    source = find_data(root)
    if source == EMBEDDED:
        return embedded_data(10_000, seed=1), embedded_data(2_000, seed=2)
    folders = [at for name in ("train", "test", ORIGINAL) for at, _, _ in os.walk(Path(source, name), followlinks=True)]
    files = [(file.path, file.stat().st_size, file.stat().st_mtime_ns) for at in folders for file in os.scandir(at)]
    digest = hashlib.sha256(repr(sorted(files)).encode()).hexdigest()  # changes with every change of a file
    cache = DATA_DIR.with_name("cifar10-decoded") / f"{digest[:16]}.pt"
    try:
        data: tuple[Data, Data] = torch.load(cache, mmap=True)
    except (OSError, RuntimeError):  # missing or damaged
        data = decode(Path(source), "train"), decode(Path(source), "test")
        try:
            save(data, cache)
        except OSError as error:
            print(f"WARNING: decoded images are not kept for the next start: {error}", file=sys.stderr)
    return data


def find_data(root: str | None = None) -> str:
    """Return the folder that has the data, or EMBEDDED if there is none. Raises ValueError if `root` has none."""
    if root == EMBEDDED:
        return EMBEDDED
    folder = Path(root or DATA_DIR).expanduser().absolute()
    if (folder / "train").is_dir() or (folder / ORIGINAL).is_dir():
        return str(folder)
    if root and not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")
    if root and {path.name for path in folder.iterdir()} - {"cifar-10-python.tar.gz"}:  # the user's own files
        raise ValueError(f"data folder {folder} has no train/<class>/ and test/<class>/ with images, nor CIFAR-10")
    try:
        from torchvision.datasets import CIFAR10  # imported here because that takes as long as importing torch

        CIFAR10(folder, download=True)
        return str(folder)
    except Exception as error:  # without a network, many kinds are possible
        if root:
            raise ValueError(f"{folder} has no train/ and test/, and CIFAR-10 cannot be downloaded: {error}") from None
    print(f"WARNING: {DATA_DIR} has no CIFAR-10, and it cannot be downloaded. Using a small EMBEDDED data set,\n"
          "WARNING: not CIFAR-10. To train on your own images, use --data DIR.", file=sys.stderr)  # fmt: skip
    return EMBEDDED


def decode(root: Path, split: str) -> Data:
    """Read the images of a split, resized to 32×32. Raises ValueError if an image is damaged or a class is missing."""
    from torchvision.datasets import CIFAR10, folder

    if not (root / "train").is_dir():
        try:
            original = CIFAR10(root, train=split == "train")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{root / ORIGINAL} is damaged; remove it to download it again ({error})") from None
        return torch.from_numpy(original.data.copy()), torch.tensor(original.targets)
    samples = list_images(root / split)
    images = np.empty((len(samples), 32, 32, 3), np.uint8)
    for row, (path, _) in enumerate(tqdm(samples, f"reading {split} images", leave=False, disable=None)):
        try:
            images[row] = folder.pil_loader(path).resize((32, 32))
        except Exception as error:  # each format raises its own
            raise ValueError(f"image {path} is damaged: {error}") from None
    return torch.from_numpy(images), torch.tensor([label for _, label in samples])


def list_images(folder: Path) -> list[tuple[str, int]]:
    """Return the path and label of each image in `folder/<class>/`. Hidden files and folders are ignored."""
    from torchvision.datasets.folder import is_image_file, make_dataset

    splits = folder, folder.with_name("train")
    classes, expected = (sorted(path.name for path in split.glob("*/") if visible(path)) for split in splits)
    if len(classes) < 2 or classes != expected:
        raise ValueError(f"{folder} has {len(classes)} classes ({', '.join(classes)}); "
                         "two or more are needed, the same in train/ and test/")  # fmt: skip
    labels = {name: label for label, name in enumerate(classes)}
    files = make_dataset(folder, labels, is_valid_file=visible, allow_empty=True)
    samples = [(path, label) for path, label in files if is_image_file(path)]
    if skipped := [Path(path) for path, _ in files if not is_image_file(path)]:
        formats = ", ".join(sorted({path.suffix or path.name for path in skipped}))
        print(f"WARNING: skipped {len(skipped)} files in {folder}: torchvision cannot read {formats}", file=sys.stderr)
    if empty := sorted({*classes} - {classes[label] for _, label in samples}):
        raise ValueError(f"{folder} has no images of the classes {', '.join(empty)}")
    return samples


def visible(path: str | Path) -> bool:
    return not Path(path).name.startswith((".", "__"))  # such as .DS_Store, .ipynb_checkpoints and __MACOSX


def embedded_data(samples: int, seed: int) -> Data:
    """Generate noisy images of ten coarse patterns, each shifted by up to four pixels."""
    patterns = np.random.default_rng(0).integers(0, 60, (CLASSES, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    moved = np.stack([np.roll(patterns, (i // 9 - 4, i % 9 - 4), (1, 2)) for i in range(81)], axis=1)
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    images = moved[labels, random.integers(81, size=samples)] + random.integers(0, 196, (samples, 32, 32, 3), np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


def save(value: object, path: Path) -> None:
    """Write `value` to a file that is never seen half written. Raises OSError if the disk is full."""
    torch.save(value, content := io.BytesIO())  # to a file, it would raise RuntimeError
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        Path(folder, path.name).write_bytes(content.getbuffer())
        Path(folder, path.name).replace(path)
