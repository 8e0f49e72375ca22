"""Predict the classes of samples with a saved model, by the script's own load_data() and test()."""

import csv
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from federation.app import samples
from federation.app.run_folder import lock_run_folder, write_atomically
from federation.app.task import find_data, read_data
from federation.inference.images import (
    Images,
    Staged,
    class_names,
    find_images,
    folders_of,
    names_by_label,
    staged,
)
from federation.inference.outputs import close, outputs, probabilities
from federation.inference.saved_model import SavedModel, about, load_model, read_record

PROBED = 64  # images that are read a second time
SHOWN = 20  # of more samples, only the first are printed


class Samples(NamedTuple):
    """What is predicted: a test split, and of the rows that count, their numbers, names and labels (None: unknown).

    `classes` are the names of the classes by label; empty where they have none.
    """

    data: Any
    rows: NDArray[np.int64]
    names: list[str]
    labels: NDArray[np.int64] | None
    classes: list[str]


class Predictions(NamedTuple):
    """The class and the confidence of each sample, by its name, and its true class where that is known."""

    names: list[str]
    classes: list[str]
    predicted: NDArray[np.int64]
    confidence: NDArray[Any]
    labels: NDArray[np.int64] | None

    def table(self) -> list[tuple[str, ...]]:
        """Return the rows of the CSV file, after its header."""
        true = [] if self.labels is None else [[self.classes[label] for label in self.labels]]
        named = [self.classes[label] for label in self.predicted]
        header = ("file", "class", "confidence", *(["label"] if true else []))
        return [header, *zip(self.names, named, (f"{value:.4f}" for value in self.confidence), *true, strict=True)]


def predict(path: Path, data: str, task: str, classes: Sequence[str], out: Path) -> int:
    """Predict, print and save what comes out; return the exit status."""
    record = read_record(path, task)
    root = data or record.data
    out.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(out):
        images = find_images(Path(root).expanduser()) if root else None
        known = list(classes) or class_names(record.data) or class_names(root) or folders_of(images)
        model = load_model(path, record, len(known))
        print(about(model))
        found, scores = computed(model, root, images, known, out)
        report(judge(found, scores), out)
    return 0


# -------------------------------------------------------------------------------------------------------- the samples


def computed(
    model: SavedModel, root: str, images: Images | None, known: list[str], out: Path
) -> tuple[Samples, NDArray[Any]]:
    """Return samples, and what the model computes for each: image files, or else whatever data are at `root`.

    Raises ValueError where the task cannot read them, or in an order of its own.
    """
    if images is None:
        found = open_data(model, root, known)
        return found, outputs(model.task, model.net, samples.take(found.data))
    found, scores = computed_for_images(model, images, known, out)
    few = Images(images.root, images.files[PROBED - 1 :: -1], images.labels and images.labels[PROBED - 1 :: -1])
    _, again = computed_for_images(model, few, known, out)  # in reversed order, which sorting undoes, and nothing else
    if not close(again[::-1], scores[: len(again)]):
        raise ValueError(f"{model.record.task}.load_data() does not read images in the order of their sorted paths, so "
                         "it is unknown which prediction is whose")  # fmt: skip
    return found, scores


def computed_for_images(model: SavedModel, images: Images, known: list[str], out: Path) -> tuple[Samples, NDArray[Any]]:
    """Return images, and what the model computes for each, by the task's own load_data() and test()."""
    folders = known or [f"{label:09d}" for label in range(model.record.classes or 2)]  # tasks want at least two
    with staged(images, folders, out) as stage:
        found = open_images(model, images, stage, bool(known))
        return found, outputs(model.task, model.net, samples.take(found.data))[found.rows]


def open_data(model: SavedModel, root: str, known: list[str]) -> Samples:
    """Return the test split of data that are no image files."""
    test = read_data(model.task, find_data(model.task, root))[1]
    count = samples.count(test)
    labels = np.asarray(samples.labels(test))
    if labels.shape != (count,) or labels.dtype.kind not in "biu" or labels.min() < 0:
        raise ValueError(f"{model.record.task} has labels of type {labels.dtype} and shape {labels.shape}, but classes "
                         "are needed: whole numbers from 0")  # fmt: skip
    classes = known or list(map(str, getattr(test, "classes", ())))
    return Samples(test, np.arange(count), [f"test {row}" for row in range(count)], labels.astype(np.int64), classes)


def open_images(model: SavedModel, images: Images, stage: Staged, named: bool) -> Samples:
    """Return the test split that the task makes of staged images. Raises ValueError if it is not that of all images."""
    try:
        test = read_data(model.task, str(stage.root))[1]
    except ValueError as error:
        raise ValueError(_with_sources(str(error), images, stage)) from None
    labels = np.asarray(samples.labels(test)).astype(np.int64).ravel()
    classes = names_by_label(stage, labels)
    rows = np.flatnonzero(np.asarray(stage.rows) >= 0)
    order = rows[np.argsort(np.asarray(stage.rows)[rows])]  # that of the files
    names = [str(path.relative_to(images.root)) for path in images.files]
    return Samples(test, order, names, labels[order] if images.labels else None, classes if named else [])


def _with_sources(text: str, images: Images, stage: Staged) -> str:
    """Return a message with the user's own files in place of the links to them."""
    for split, (link, source) in product(("train", "test"), stage.sources.items()):
        text = text.replace(str(stage.root / split / link), str(source))
    return text.replace(str(stage.root), str(images.root))


# ---------------------------------------------------------------------------------------------------------- the result


def judge(found: Samples, scores: NDArray[Any]) -> Predictions:
    """Return the class with the highest probability for each sample. Raises ValueError if there are other classes."""
    count = scores.shape[1]
    if found.classes and len(found.classes) != count:
        raise ValueError(f"the model tells {count} classes apart, but {len(found.classes)} are known: "
                         f"{', '.join(found.classes)}; name all of them by --classes")  # fmt: skip
    if found.labels is not None and found.labels.max() >= count:
        raise ValueError(f"there is a label {found.labels.max()}, but the model tells only {count} classes apart")
    shares = probabilities(scores)
    classes = found.classes or list(map(str, range(count)))
    return Predictions(found.names, classes, shares.argmax(1), shares.max(1), found.labels)


def report(found: Predictions, out: Path) -> None:
    """Print the predictions, and save them with a picture of which classes are confused."""
    table = found.table()
    _print_table(table[: SHOWN + 1])
    if len(table) - 1 > SHOWN:
        print(f"and {len(table) - 1 - SHOWN:,} more")
    made = ["predictions.csv"]
    write_atomically(out / made[0], lambda path: _write_csv(table, path))
    if found.labels is not None:
        made.append("confusion.png")
        _report_confusion(found, out / made[1])
    print(f"saved {' and '.join(made)} in {out}")


def _print_table(table: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _write_csv(table: list[tuple[str, ...]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(table)


def _report_confusion(found: Predictions, path: Path) -> None:
    from federation.inference import confusion  # here, since matplotlib takes a second

    assert found.labels is not None
    counts = confusion.confusion(found.labels, found.predicted, len(found.classes))
    accuracy = float((found.labels == found.predicted).mean())
    print(f"accuracy {accuracy:.4f} on {len(found.labels):,} samples")
    if pair := confusion.worst(counts, found.classes):
        print(f"most often confused: {pair}")
    title = f"accuracy {accuracy:.4f} on {len(found.labels):,} samples"
    write_atomically(path, lambda unfinished: confusion.draw(counts, found.classes, title, unfinished))
