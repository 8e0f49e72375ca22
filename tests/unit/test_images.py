"""Folders of images, which two of the scripts read alike: what is read, what is kept of it, and what is refused."""

import hashlib
import importlib
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import ROOT, Terminals, eventually

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DOWNLOAD = {
    "cifar_data": "torchvision.datasets.cifar.download_and_extract_archive",
    "examples.cifar_keras": "keras.datasets.cifar10.load_data",
}
DECODE = {"cifar_data": "torchvision.datasets.folder.pil_loader", "examples.cifar_keras": "keras.utils.load_img"}
Split = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Reader:
    """A script with an empty cache folder and no network, which notes the split of each image that it decodes."""

    def __init__(self, name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script: Any = importlib.import_module(name)
        self.patch, self.cache, self.is_torch = monkeypatch, cache, name == "cifar_data"
        self.decoded: list[str] = []
        monkeypatch.setattr(DOWNLOAD[name], self.download)
        module, _, function = DECODE[name].rpartition(".")
        self.decode = getattr(importlib.import_module(module), function)
        monkeypatch.setattr(DECODE[name], self.noted)
        self.cache_in(cache)

    def download(self, *_: Any, **__: Any) -> None:
        raise OSError("no network")

    def noted(self, path: str | Path, **options: Any) -> Any:
        image = self.decode(path, **options)
        self.decoded.append(Path(path).parent.parent.name)
        return image

    def cache_in(self, folder: Path) -> None:
        self.patch.setattr(self.script, "DATA_DIR", folder / "cifar10")

    def cached(self) -> list[Path]:
        return sorted(self.cache.glob("cifar10-*/*"))

    def load(self, root: Path | None) -> tuple[Split, Split]:
        (x_train, y_train), (x_test, y_test) = self.script.load_data(root and str(root))
        return (np.asarray(x_train), np.asarray(y_train)), (np.asarray(x_test), np.asarray(y_test))


@pytest.fixture(params=DOWNLOAD)
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    pytest.importorskip("torch" if request.param == "cifar_data" else "keras")
    return Reader(request.param, tmp_path / "cache", monkeypatch)


def colour(split: str, label: int) -> tuple[int, int, int]:
    return 20 * label, 255 - 20 * label, 7 if split == "train" else 99


def save(
    path: Path, size: tuple[int, int] = (32, 32), rgb: tuple[int, int, int] = (1, 2, 3), mode: str = "RGB"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two training images and one test image per class, each of one colour."""
    root = tmp_path / "my images"
    for label, name in enumerate(NAMES):
        save(root / "train" / name / "a.png", rgb=colour("train", label))
        save(root / "train" / name / "b.png", size=(40, 20), rgb=colour("train", label))
        save(root / "test" / name / "c.png", rgb=colour("test", label))
    return root


# ------------------------------------------------------------------------------------------------------ what is read


def test_image_folder(reader: Reader, folder: Path) -> None:
    assert reader.script.find_data(str(folder)) == str(folder)
    (x_train, y_train), (x_test, y_test) = reader.load(folder)
    assert y_train.tolist() == [label for label in range(10) for _ in range(2)] and y_train.dtype == np.int64
    assert y_test.tolist() == list(range(10))
    assert x_train.shape == (20, 32, 32, 3) and x_train.dtype == x_test.dtype == np.uint8
    for images, labels, split in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        for image, label in zip(images, labels.tolist(), strict=True):
            assert (image == colour(split, label)).all(), "other sizes are scaled"


def test_pixels_of_the_right_size_are_taken_as_they_are(reader: Reader, folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "test" / "cat" / "a.png")
    _, (images, labels) = reader.load(folder)
    assert labels.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert np.array_equal(images[3], pixels)


def test_a_scaled_image_keeps_its_left_and_its_right(reader: Reader, folder: Path) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 64:] = 200
    Image.fromarray(wide).save(folder / "test" / "cat" / "a.png")
    _, (images, _) = reader.load(folder)
    assert (images[3, :, :14] == 0).all() and (images[3, :, 18:] == 200).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "rgb"),
    [
        ("L", "png", (90, 90, 90)), ("L", "jpg", (90, 90, 90)), ("RGBA", "PNG", (10, 20, 30)),
        ("P", "png", (255, 0, 0)), ("1", "png", (255, 255, 255)), ("CMYK", "jpg", (255, 255, 255)),
    ],
)  # fmt: skip
def test_other_kinds_of_images_become_rgb(
    reader: Reader, folder: Path, mode: str, suffix: str, rgb: tuple[int, int, int]
) -> None:
    (folder / "test" / "ship" / "c.png").unlink()
    save(folder / "test" / "ship" / f"c.{suffix}", rgb=rgb, mode=mode)
    _, (images, _) = reader.load(folder)
    assert (images[8] == rgb).all()


@pytest.mark.parametrize("reader", ["cifar_data"], indirect=True)
def test_files_that_are_no_images_are_counted_and_named_in_a_warning(
    reader: Reader, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("train/cat/a.heic", "train/dog/b.HEIC", "train/dog/Thumbs.db", "train/ship/README", "test/cat/c.svg"):
        (folder / file).write_text("no image of a known format")
    (_, y_train), (x_test, _) = reader.load(folder)
    assert y_train.tolist() == [label for label in range(10) for _ in range(2)] and len(x_test) == 10
    train, test = capsys.readouterr().err.splitlines()
    assert train.startswith(f"WARNING: skipped 4 files in {folder / 'train'}: ") and train.endswith(
        " cannot read .HEIC, .db, .heic, README"
    )
    assert test.startswith(f"WARNING: skipped 1 files in {folder / 'test'}: ") and test.endswith(" cannot read .svg")


def test_hidden_files_and_folders_are_no_images_and_no_classes(
    reader: Reader, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder / "train" / ".ipynb_checkpoints" / "a-checkpoint.png")
    save(folder / "test" / "__MACOSX" / "a.png")
    for name in ("._a.png", ".DS_Store"):
        (folder / "train" / "cat" / name).write_text("not for the user")
    (x_train, y_train), (_, y_test) = reader.load(folder)
    assert y_train.tolist() == [label for label in range(10) for _ in range(2)] and y_test.tolist() == [*range(10)]
    assert (x_train[0] == colour("train", 0)).all()
    assert capsys.readouterr().err == ""


def test_a_folder_in_the_usual_place_is_used(reader: Reader, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader.cache.mkdir()
    folder.rename(reader.script.DATA_DIR)
    assert reader.script.find_data() == str(reader.script.DATA_DIR)
    assert len(reader.load(None)[0][1]) == 20
    assert "WARNING" not in capsys.readouterr().err


def test_a_relative_folder_and_one_below_home(
    reader: Reader, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {reader.script.find_data(name) for name in ("my images", "~/my images")} == {str(folder)}


# ------------------------------------------------------------------------------------------------- what is kept of it

ALL = ["train"] * 20 + ["test"] * 10


def test_images_are_decoded_once(reader: Reader, folder: Path) -> None:
    first, second = reader.load(folder), reader.load(folder)
    assert reader.decoded == ALL
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert np.array_equal(one, other) and one.dtype == other.dtype
    assert len(reader.cached()) == 1, "nothing unfinished is left"
    assert 3072 * 30 < sum(path.stat().st_size for path in reader.cached()) < 3080 * 30 + 4000


def test_what_is_done_to_loaded_images_stays_out_of_the_cache(reader: Reader, folder: Path) -> None:
    reader.load(folder)
    images = reader.script.load_data(str(folder))[0][0]
    before = np.asarray(images).copy()
    with suppress(ValueError):  # they may as well be read-only
        images[:] = 0
    assert np.array_equal(reader.load(folder)[0][0], before)


@pytest.mark.parametrize(("side", "later"), [(32, 1), (31, 0), (31, 1)], ids=["time", "size", "both"])
def test_an_edited_image_is_decoded_anew(reader: Reader, folder: Path, side: int, later: int) -> None:
    image = folder / "train" / "bird" / "a.bmp"  # which is as large whatever its colour
    save(image.with_suffix(".png").rename(image))
    reader.load(folder)
    before = image.stat()
    save(image, size=(side, side), rgb=(9, 9, 9))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    assert (image.stat().st_size == before.st_size) == (side == 32)
    (images, _), _ = reader.load(folder)
    assert (images[4] == 9).all() and (images[5] == colour("train", 2)).all()
    assert reader.decoded == ALL * 2


def test_an_added_and_a_removed_image_are_noticed(reader: Reader, folder: Path) -> None:
    reader.load(folder)
    save(folder / "test" / "frog" / "new.png")
    _, (images, labels) = reader.load(folder)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9] and (images[7] == (1, 2, 3)).all()
    (folder / "test" / "frog" / "c.png").unlink()
    _, (images, labels) = reader.load(folder)
    assert labels.tolist() == list(range(10)) and (images[6] == (1, 2, 3)).all()


def test_two_data_sets_do_not_share_a_cache(reader: Reader, folder: Path, tmp_path: Path) -> None:
    reader.load(folder)
    folder.rename(tmp_path / "first")
    for label, name in enumerate(NAMES):
        save(folder / "train" / name / "a.png", rgb=(label, 0, 0))
        save(folder / "test" / name / "a.png", rgb=(0, label, 0))
    (images, labels), _ = reader.load(folder)
    assert labels.tolist() == list(range(10)) and images[:, 0, 0, 0].tolist() == list(range(10))


@pytest.mark.parametrize("reader", ["cifar_data"], indirect=True)
def test_a_cache_that_cannot_be_written_is_only_warned_of(
    reader: Reader, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    reader.cache_in(tmp_path / "file")
    (images, labels), _ = reader.load(folder)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert (images[19] == colour("train", 9)).all()
    assert "WARNING: decoded images are not kept for the next start" in capsys.readouterr().err


WRONG = [0, 3, 50, 128, 1000, -1, b"\x00" * 5000, b"no numpy file", pickle.dumps({"a": 1})]


@pytest.mark.parametrize("reader", ["cifar_data"], indirect=True)
@pytest.mark.parametrize("content", WRONG, ids=[*map(str, WRONG[:6]), "zeros", "text", "pickle"])
def test_a_cache_that_is_truncated_or_something_else_is_replaced(
    reader: Reader, folder: Path, content: int | bytes
) -> None:
    expected = reader.load(folder)
    whole = [path.read_bytes() for path in reader.cached()]
    for file in reader.cached():
        file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
    for one, other in zip(chain(*reader.load(folder)), chain(*expected), strict=True):
        assert np.array_equal(one, other)
    assert reader.decoded == ALL * 2
    assert [path.read_bytes() for path in reader.cached()] == whole
    reader.load(folder)
    assert reader.decoded == ALL * 2, "the cache is whole again"


LOAD = """
import hashlib, pathlib, sys, time
import torchvision.datasets, cifar
root, ready, go = map(pathlib.Path, sys.argv[1:])
ready.touch()
while not go.exists():
    time.sleep(0.001)
data = cifar.load_data(str(root))
print(hashlib.sha256(b"".join(part.numpy().tobytes() for split in data for part in split)).hexdigest())
"""


@pytest.mark.parametrize("reader", ["cifar_data"], indirect=True)
def test_two_processes_that_load_first_at_once_read_the_same(
    reader: Reader, folder: Path, terminals: Terminals
) -> None:
    ready, go = terminals.folder / "ready", terminals.folder / "go"
    other = terminals.open("-c", LOAD, str(folder), str(ready), str(go), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    reader.cache = terminals.folder / "home" / "cache"
    reader.cache_in(reader.cache)
    eventually(lambda: ready.exists() or other.process.poll() is not None, 120)
    go.touch()
    data = reader.load(folder)
    assert other.wait() == 0, other.text
    assert other.text == hashlib.sha256(b"".join(part.tobytes() for part in chain(*data))).hexdigest() + "\n"
    assert len(reader.cached()) == 1, "nothing unfinished is left"


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def refused(reader: Reader, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return a function that checks that a folder is refused in one line that names it, and not replaced."""

    def refused(root: Path, *named: str) -> None:
        with pytest.raises(ValueError) as error:
            reader.load(root)
        assert all(text in str(error.value) for text in (str(root), *named)), error.value
        assert "\n" not in str(error.value)
        assert "EMBEDDED" not in capsys.readouterr().err

    return refused


def test_a_missing_folder(tmp_path: Path, refused: Any) -> None:
    refused(tmp_path / "nowhere", "does not exist")


def test_an_empty_folder_without_a_network(reader: Reader, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "empty").mkdir()
    said = ("has no train/ and test/", "cannot be downloaded", "no network") if reader.is_torch else ("has no train/",)
    refused(tmp_path / "empty", *said)


def test_a_file_instead_of_a_folder(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "does not exist")


def test_a_folder_of_something_else_is_refused_even_if_there_is_a_network(
    reader: Reader, folder: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DOWNLOAD[reader.script.__name__], lambda *_, **__: pytest.fail("it would be replaced"))
    (folder / "train").rename(folder / "training")
    refused(folder, "has no train/<class>/ and test/<class>/ with images")
    assert sorted(path.name for path in folder.iterdir()) == ["test", "training"]


def test_no_test_folder(folder: Path, refused: Any) -> None:
    (folder / "test").rename(folder / "elsewhere")
    refused(folder, "are needed, the same in train/ and test/")


def test_a_train_folder_without_classes(folder: Path, refused: Any) -> None:
    (folder / "train").rename(folder / "elsewhere")
    (folder / "train").mkdir()
    refused(folder, str(folder / "train"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images(reader: Reader, folder: Path, refused: Any, split: str) -> None:
    for image in (folder / split / "deer").iterdir():
        image.unlink()
    said = "has no images of the classes deer" if reader.is_torch else "'cat', 'dog', 'frog', 'horse', 'ship', 'truck']"
    refused(folder, said)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images_of_a_known_format(folder: Path, refused: Any, split: str) -> None:
    for image in (folder / split / "deer").iterdir():
        image.with_suffix(".heic").write_text("no image of a known format")
        image.unlink()
    refused(folder, str(folder / split), "deer")


@pytest.mark.parametrize("classes", [1, 9, 11])
def test_a_number_of_classes(reader: Reader, tmp_path: Path, refused: Any, classes: int) -> None:
    for split in ("train", "test"):
        for label in range(classes):
            save(tmp_path / "images" / split / f"class{label:02}" / "a.png")
    if reader.is_torch and classes > 1:
        assert {int(labels.max()) for _, labels in reader.load(tmp_path / "images")} == {classes - 1}
    else:
        refused(tmp_path / "images", "class00", "are needed, the same in train/ and test/")


@pytest.mark.parametrize("decoded_before", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_that_differ_between_train_and_test(
    reader: Reader, folder: Path, refused: Any, split: str, decoded_before: bool
) -> None:
    if decoded_before:
        reader.load(folder)
    (folder / split / "truck").rename(folder / split / "zebra")
    refused(folder, "the same in train/ and test/")


@pytest.mark.parametrize(("split", "suffix"), [("train", "png"), ("test", "jpg")])
@pytest.mark.parametrize("kept", [0, 30, 0.7])
def test_a_truncated_image_is_named(folder: Path, refused: Any, split: str, kept: float, suffix: str) -> None:
    image = folder / split / "dog" / f"broken.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(image)
    whole = image.read_bytes()
    image.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    refused(folder, f"image {image} is damaged: ")


def test_an_image_with_a_damaged_part_is_named(folder: Path, refused: Any) -> None:
    image = folder / "train" / "dog" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(image)
    content = image.read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    image.write_bytes(content[:second] + b"\x14\x1f\x98." + content[second + 4 :])  # no name that a chunk could have
    refused(folder, f"image {image} is damaged: ")


def test_text_that_calls_itself_an_image_is_named(reader: Reader, folder: Path, refused: Any) -> None:
    image = folder / "test" / "dog" / "c.png"
    image.write_text("no image")
    refused(folder, f"image {image} is damaged: ")
    assert reader.cached() == [], "what is damaged is not kept"
