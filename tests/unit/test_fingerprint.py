"""Data sets are told apart by value: the same values, however they are held, and no others, are a copy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from federation.app.fingerprint import difference, fingerprint

X, Y = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32), np.arange(500) % 10
IMAGES = np.random.default_rng(1).integers(0, 256, (500, 4, 4, 3), np.uint8)


def compare(one: tuple[Any, Any], other: tuple[Any, Any]) -> str:
    """Return in what two sets of training data differ; the test data are the same."""
    return difference(fingerprint((one, (X, Y))), fingerprint((other, (X, Y))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((IMAGES, Y), (torch.from_numpy(IMAGES), torch.from_numpy(Y))),
        ((IMAGES, Y), (np.asfortranarray(IMAGES), Y.astype(">i8"))),
        ((X, Y.tolist()), (X.astype(">f4"), Y)),
        ((IMAGES, np.array(["cat", "horse"] * 250)), (IMAGES, np.array(["cat", "horse"] * 250, object))),
        ((IMAGES, ["cat", "horse"] * 250), (IMAGES, np.array(["cat", "horse"] * 250, "U99"))),
        ((X * np.float32(1 + 1e-7), X.sum(1)), (X, X[:, ::-1].sum(1))),
        ((torch.from_numpy(X).bfloat16(), Y), (torch.from_numpy(X).bfloat16(), Y)),
        ((np.array([X[0], X[1, :3]], object), Y[:2]), (np.array([X[0].copy(), X[1, :3].copy()], object), Y[:2])),
    ],
    ids=["tensors", "strides and byte order", "a list", "objects", "text", "rounding", "bfloat16", "lengths"],
)
def test_a_copy_is_a_copy_whatever_holds_it(one: Any, other: Any) -> None:
    assert compare(one, other) == compare(other, one) == ""


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ((IMAGES[::-1], Y), "as many training samples as the server, but different ones; if it should be a copy"),
        ((IMAGES, Y[::-1]), "as many training labels as the server, but different ones"),
        ((IMAGES[:400], Y[:400]), "400 training samples, the server 500"),
        ((IMAGES[:, :2], Y), "training samples of type uint8 (2, 4, 3), the server's uint8 (4, 4, 3)"),
        ((IMAGES.astype(np.int16), Y), "training samples of type int16 (4, 4, 3), the server's uint8 (4, 4, 3)"),
    ],
)
def test_what_differs_is_named(other: Any, said: str) -> None:
    assert compare(other, (IMAGES, Y)).startswith(said)


def test_test_data_count_as_well() -> None:
    assert difference(fingerprint(((X, Y), (X, Y))), fingerprint(((X, Y), (X, Y[::-1])))).startswith("as many test lab")


@pytest.mark.parametrize("rows", [500, 200_000])
def test_other_numbers_are_found_however_many_there_are(rows: int) -> None:
    x = np.random.default_rng(2).normal(size=(rows, 8)).astype(np.float32)
    other = x.copy()
    other[::50] = np.random.default_rng(3).normal(size=other[::50].shape)
    y = np.zeros(rows, int)
    assert compare((other, y), (x, y)).startswith("as many training samples as the server, but different ones")


@given(stn.arrays(np.uint8, (20, 3)), st.integers(0, 19), st.integers(0, 2), st.integers(1, 255))
def test_one_changed_value_of_a_small_set_is_found(x: Any, row: int, column: int, change: int) -> None:
    other = x.copy()
    other[row, column] = (int(x[row, column]) + change) % 256
    y = np.zeros(20, int)
    assert compare((x.copy(), y), (x, y)) == ""
    assert "as many training samples" in compare((other, y), (x, y))


@pytest.mark.parametrize("value", [None, {}, object()])
def test_labels_without_a_value_are_refused(value: Any) -> None:
    labels = np.array([value] * 500)
    with pytest.raises(ValueError, match=f"training labels are Python objects of type {type(value).__name__}"):
        fingerprint(((X, labels), (X, Y)))


def test_a_fingerprint_is_small_and_holds_no_sample() -> None:
    text = fingerprint(((X, X[:, 0]), (X, Y)))
    assert len(text) < 1000
    numbers = [number for part in json.loads(text) for number in part[3]]
    assert len(numbers) == 27 and not np.isin(np.float32(numbers), X).any()


def test_only_a_part_of_a_large_file_is_read(tmp_path: Path) -> None:
    class Watched(np.memmap):
        rows = 0

        def __getitem__(self, key: Any) -> Any:
            Watched.rows += len(key) if isinstance(key, np.ndarray) else 0
            return np.asarray(super().__getitem__(key))

    x = Watched(tmp_path / "x", np.uint8, "w+", shape=(20_000, 3072))
    text = fingerprint(((x, np.zeros(20_000, int)), (X, Y)))
    assert 0 < Watched.rows < 1500
    x[~np.isin(np.arange(20_000), [5])] = 1
    assert fingerprint(((x, np.zeros(20_000, int)), (X, Y))) != text
