"""Image files for load_data(): whichever way they lie in a folder, a task finds them as its own train/ and test/.

A task reads, resizes and normalises images in its own way. So they are not read here: a folder of links is made, in the
layout that a task with images expects, train/<class>/ and test/<class>/, and its own load_data() reads that one.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LINKS = ".staged-images"  # the folder of links


class Images(NamedTuple):
    """Image files, and the name of the class of each, where they lie in folders by class."""

    root: Path
    files: list[Path]
    labels: list[str] | None


class Staged(NamedTuple):
    """A folder of links. `rows` are the numbers of the images in the order of the test split, -1 for a copy of one.

    `folders` is the class folder in which each row of the test split lies.
    """

    root: Path
    rows: list[int]
    folders: list[str]
    sources: dict[str, Path]  # the image behind each link, by its path in either part


def find_images(root: Path) -> Images | None:
    """Return the images of an image file, DIR/test/<class>/, DIR/<class>/ or DIR, or None where there are none.

    Raises ValueError if some lie in folders by class and others do not, or if the folder is empty.
    """
    if _is_image(root):
        return Images(root.parent, [root], None)
    if not root.is_dir():
        return None
    part = root / "test" if (root / "test").is_dir() else root
    classes = class_folders(part)
    by_class = [(path, folder.name) for folder in classes for path in _images_in(folder)]
    loose = sorted(path for path in part.iterdir() if _is_image(path))
    if by_class and loose:
        raise ValueError(f"{part} has images in folders by class, and others such as {loose[0].name} outside of them")
    if not any(root.iterdir()):
        raise ValueError(f"{root} has no images: it is empty")
    if by_class:
        return Images(part, [path for path, _ in by_class], [name for _, name in by_class])
    return Images(part, loose, None) if loose else None


def class_folders(part: Path) -> list[Path]:
    """Return the folders in a folder, without hidden ones, sorted by name."""
    return sorted(path for path in part.iterdir() if path.is_dir() and _visible(path)) if part.is_dir() else []


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and _visible(path) and path.is_file()


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__"))


def class_names(root: str) -> list[str]:
    """Return the names of the classes in a data folder with DIR/train/<class>/; none where it is no such folder."""
    return [folder.name for folder in class_folders(Path(root).expanduser() / "train")] if root else []


def folders_of(images: Images | None) -> list[str]:
    """Return the names of the folders in which images lie by class."""
    return sorted({*images.labels}) if images and images.labels else []


@contextmanager
def staged(images: Images, names: Sequence[str], folder: Path) -> Iterator[Staged]:
    """Make the folder of links below `folder`, with a class folder for each of `names`, and remove it at the end.

    A class without an image gets a copy of another one, since tasks refuse to read a class without images. Images
    without labels are spread over the classes. Raises ValueError if there are images of other classes.
    """
    if unknown := sorted({*(images.labels or ())} - {*names}):
        raise ValueError(f"{images.root} has images of {', '.join(unknown)}, but the model's classes are "
                         f"{', '.join(names)}; see --classes")  # fmt: skip
    shutil.rmtree(root := folder / LINKS, ignore_errors=True)  # of a process that was killed
    places = images.labels or [names[row % len(names)] for row in range(len(images.files))]
    chosen = [*zip(places, range(len(places)), strict=True), *((name, -1) for name in {*names} - {*places})]
    chosen.sort()
    shuffled = random.Random(0).sample(chosen, len(chosen))  # so that no task finds them in order without sorting
    try:
        sources = {_link(images, root, name, row): images.files[max(row, 0)] for name, row in shuffled}
        yield Staged(root, [row for _, row in chosen], [name for name, _ in chosen], sources)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _link(images: Images, root: Path, name: str, row: int) -> str:
    """Make the link to an image in the test part; and in the training part, which needs one of each class."""
    source = images.files[max(row, 0)].absolute()
    test, train = (root / split / name / f"{row:09d}{source.suffix}" for split in ("test", "train"))
    for link in (test,) if train.parent.is_dir() else (test, train):
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(source)
        except OSError:  # on Windows, links need a right of their own
            shutil.copyfile(source, link)
    return str(Path(name, test.name))


def names_by_label(stage: Staged, labels: Any) -> list[str]:
    """Return the class of each label, as the task has numbered the folders.

    Raises ValueError if the task has not read all images in the order of their paths: which is which is unknown then.
    """
    found = [int(label) for label in np.asarray(labels).ravel()]
    pairs = {*zip(found, stage.folders, strict=False)}
    if len(found) != len(stage.rows) or len(pairs) != len({*stage.folders}) or len({*found}) != len(pairs):
        raise ValueError(f"load_data() has not read the {len(stage.rows)} images of the test part, sorted by path and "
                         "with a number for each class folder, so it is unknown which prediction is whose")  # fmt: skip
    names = {label: name for label, name in pairs}
    return [names.get(label, str(label)) for label in range(max(names) + 1)]
