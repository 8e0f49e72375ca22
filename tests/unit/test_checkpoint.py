"""The state of a run on disk: what is saved comes back bit by bit, and what is damaged or does not fit is refused."""

import gc
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from federation.app import weights
from federation.app.checkpoint import RESUMABLE_KEYS, check_same, checkpoints, load_checkpoint, save_checkpoint
from federation.app.config import RunConfig, defaults, validate
from federation.app.report import Report
from federation.app.weights import decoded, encoded, sha256

Weights = dict[str, NDArray[Any]]

SAME_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # each overwrites it
TYPES = ["float32", "float64", "float16", "int64", "uint8", "bool"]
NAMES = st.sampled_from(["file", "arr_0", "arr_1", "allow_pickle", "conv1.weight", "a/b", "../a", "ü 日本", "", "a\0"])
ARRAYS = st.sampled_from(TYPES).flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=3, min_side=0)))
NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text())
METRICS = st.dictionaries(st.text(), st.one_of(NUMBERS, st.lists(NUMBERS), st.dictionaries(st.text(), NUMBERS)))
CHECKPOINT = "checkpoint-0.npz"  # the one that a run with one round in its metrics makes
ONE = {"rounds": [0.5]}
SMALL = {"conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7)}


def record_of(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in weights.items()})


def save(metrics: dict[str, Any], weights: Weights, folder: Path) -> Path:
    save_checkpoint(metrics, {"arrays": record_of(weights)}, folder)
    return folder / f"checkpoint-{len(metrics['rounds']) - 1}.npz"


def load(folder: Path) -> ArrayRecord:
    """Return the model of a checkpoint that holds nothing else."""
    _, records = load_checkpoint(folder)
    assert list(records) == ["arrays"]
    return records["arrays"]


def check_equal(record: ArrayRecord, weights: Weights) -> None:
    assert list(record) == list(weights), "in the model's own order"
    for array, expected in zip((array.numpy() for array in record.values()), weights.values(), strict=True):
        assert array.dtype == expected.dtype and array.shape == expected.shape
        assert array.tobytes() == expected.tobytes()


def check_refused(folder: Path, *named: str) -> None:
    """Check that a checkpoint is refused in one line, with the file, the reason and what to do about it."""
    with pytest.raises(ValueError, match=r"; .*start without --resume$") as error:
        load_checkpoint(folder)
    said = str(error.value)
    assert len(said.splitlines()) == 1 and str(folder) in said
    assert all(text in said for text in named), said
    assert "damaged ()" not in said


# ---------------------------------------------------------------------------------------------------- there and back


@given(st.dictionaries(st.one_of(NAMES, st.text()), ARRAYS, max_size=5))
@SAME_FOLDER
def test_names_shapes_types_and_bytes_come_back(tmp_path: Path, weights: Weights) -> None:
    save(ONE, weights, tmp_path)
    check_equal(load(tmp_path), weights)


@given(METRICS)
@SAME_FOLDER
def test_metrics_come_back_exactly(tmp_path: Path, metrics: dict[str, Any]) -> None:
    metrics |= ONE
    save(metrics, SMALL, tmp_path)
    assert repr(load_checkpoint(tmp_path)[0]) == repr(metrics), "to the last digit, whether inf or nan"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)], ids=str)
def test_every_type_and_shape(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    weights = {"file": np.ones(shape, kind), "arr_0": np.zeros(shape, kind), "transposed": np.ones(shape, kind).T}
    save(ONE, weights, tmp_path)
    check_equal(load(tmp_path), weights)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3)], ids=str)
def test_bfloat16_comes_back_as_such(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.linspace(-3, 1e30, int(np.prod(shape)), dtype=np.float32).reshape(shape).astype("bfloat16")
    record = ArrayRecord({"half": encoded(values), "whole": Array(np.ones(2, np.float32)), "more": encoded(values)})
    save_checkpoint(ONE, {"arrays": record}, tmp_path)
    loaded = load(tmp_path)
    assert {name: array.dtype for name, array in loaded.items()} == {
        "half": "bfloat16", "whole": "float32", "more": "bfloat16"
    }  # fmt: skip
    assert {tuple(loaded[name].shape) for name in ("half", "more")} == {shape}
    assert decoded(loaded["half"]).tobytes() == decoded(loaded["more"]).tobytes() == values.tobytes()
    assert sha256(loaded) == sha256(record)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_comes_back_as_such(tmp_path: Path, dtype: str) -> None:
    record = ArrayRecord({"w": encoded(np.array([0.5, -3, 0], np.float32).astype(dtype))})
    save_checkpoint(ONE, {"arrays": record}, tmp_path)
    loaded = load(tmp_path)
    assert (loaded["w"].dtype, decoded(loaded["w"]).astype(float).tolist()) == (dtype, [0.5, -3, 0])
    assert sha256(loaded) == sha256(record)


def test_the_strategys_state_comes_back_beside_the_model(tmp_path: Path) -> None:
    state = {"m_t": {"w": np.arange(3.0), "arr_0": np.array(2, np.float32)}, "v_t": {"w": np.ones((2, 0))}, "none": {}}
    save_checkpoint(ONE, {name: record_of(held) for name, held in ({"arrays": SMALL} | state).items()}, tmp_path)
    records = load_checkpoint(tmp_path)[1]
    assert list(records) == ["arrays", "m_t", "v_t", "none"]
    for name, held in ({"arrays": SMALL} | state).items():
        check_equal(records[name], held)


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    others = {"checkpoint-old.npz", "checkpoint-7-123.unfinished.npz", "model.npz"}
    for name in others:
        (tmp_path / name).touch()
    for last in range(12):
        save({"rounds": list(range(last + 1))}, {"w": np.array(last)}, tmp_path)
        kept = [tmp_path / f"checkpoint-{number}.npz" for number in (last - 1, last) if number >= 0]
        assert checkpoints(tmp_path) == kept, "by their numbers: 10 comes after 9"
        assert {path.name for path in tmp_path.iterdir()} == others | {path.name for path in kept}
        check_equal(load(tmp_path), {"w": np.array(last)})
    save(ONE, SMALL, tmp_path)
    assert checkpoints(tmp_path) == [tmp_path / CHECKPOINT], "those of an earlier run are gone once a new one has begun"


# --------------------------------------------------------------------------------------------------- what is no good


def test_the_one_before_a_damaged_checkpoint_is_offered_and_read(tmp_path: Path) -> None:
    before, newest = (save({"rounds": list(range(rounds))}, {"w": np.array(rounds)}, tmp_path) for rounds in (9, 10))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged") as error:
        load_checkpoint(tmp_path)
    assert str(error.value).startswith(f"checkpoint {newest} is damaged (")
    assert str(error.value).endswith(f"); remove it, and --resume will continue from {before.name}")
    newest.unlink()
    check_equal(load(tmp_path), {"w": np.array(9)})


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    check_refused(tmp_path, "cannot resume", "it has no checkpoint")
    check_refused(tmp_path / "no" / "folder", "cannot resume")


def test_a_checkpoint_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    path = save(ONE, SMALL, tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        check_refused(tmp_path, CHECKPOINT, "is damaged")


def test_a_damaged_checkpoint_is_closed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Or else Windows would not let it be removed. NumPy itself leaves it open."""
    path = save(ONE, SMALL, tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    check_refused(tmp_path, CHECKPOINT, "is damaged")
    gc.collect()
    assert [warning for warning in recwarn if str(path) in str(warning.message)] == []


@given(st.data())
@SAME_FOLDER
def test_a_bit_that_has_flipped_is_noticed_or_does_no_harm(tmp_path: Path, data: st.DataObject) -> None:
    path = save(ONE, SMALL, tmp_path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        metrics, records = load_checkpoint(tmp_path)
    except ValueError:
        check_refused(tmp_path, CHECKPOINT, "is damaged")
    else:
        assert metrics == ONE and list(records) == ["arrays"]
        check_equal(records["arrays"], SMALL)


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\3\4", b"PK\5\6", b"\x93NUMPY\1\0", b"\x80\4"]))
@SAME_FOLDER
def test_bytes_that_are_no_checkpoint(tmp_path: Path, content: bytes, start: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(start + content)
    check_refused(tmp_path, CHECKPOINT, "is damaged")


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).mkdir()
    check_refused(tmp_path, CHECKPOINT, "is damaged", "Is a directory")


class Bomb:
    """An object that shows that it has been unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


HEADER = np.array(json.dumps({"metrics": {}, "dtypes": {"arrays": {"w": "float64"}}}))


@pytest.mark.parametrize(
    "content",
    [
        (np.array(Bomb(), object), np.ones(2)),
        (HEADER, np.array([Bomb()], object)),
        (np.ones(3), np.ones(2)),
        (HEADER,),
        (HEADER, np.ones(2), np.ones(2)),
        (np.array("[]"), np.ones(2)),
        (np.array("{}"), np.ones(2)),
        (np.array('{"metrics": {}}'), np.ones(2)),
        (np.array('{"metrics": {}, "dtypes": 3}'), np.ones(2)),
        (np.array('{"metrics": {}, "dtypes": ["w"]}'), np.ones(2)),
        (np.array('{"metrics": {}, "dtypes": {"arrays": 3}}'), np.ones(2)),
        (np.array('{"metrics": {}, "dtypes": {"arrays": {"w": 3}}}'), np.ones(2)),
        (np.array('{"metrics": {}, "dtypes": {"arrays": {"w": "float99"}}}'), np.ones(2)),
        (np.array('{"metrics": {}, "dtypes": {"m_t": {"w": "float64"}}}'), np.ones(2)),
        (np.array('{"metrics": {}, "dtypes": {}}'),),
        (np.array('{"dtypes": {"arrays": {"w": "float64"}}}'), np.ones(2)),
        (HEADER, np.ones(2, [(f"a field of a long name {i}", int) for i in range(500)])),  # NumPy says so in two lines
        (),
    ],
    ids=["pickled header", "pickled array", "numbers as header", "too few", "too many", "list", "empty", "no dtypes",
         "number as dtypes", "list as dtypes", "number as record", "number as dtype", "unknown dtype",
         "state without a model", "no records", "no metrics", "large header", "nothing"],
)  # fmt: skip
def test_an_archive_of_something_else(tmp_path: Path, content: tuple[NDArray[Any], ...]) -> None:
    np.savez(tmp_path / CHECKPOINT, *content)
    check_refused(tmp_path, CHECKPOINT, "is damaged")


def test_a_single_array(tmp_path: Path) -> None:
    with (tmp_path / CHECKPOINT).open("wb") as file:
        np.save(file, HEADER)
    check_refused(tmp_path, CHECKPOINT, "is damaged")


# --------------------------------------------------------------------------------------------------- the same config


def another(value: Any) -> Any:
    return not value if isinstance(value, bool) else "other" if isinstance(value, str) else value + 1


def changed(*keys: str) -> RunConfig:
    """Return the defaults with other values for some keys."""
    return validate({}).changed(**{key.replace("-", "_"): another(defaults()[key]) for key in keys})


@pytest.mark.parametrize("key", sorted(defaults().keys() - RESUMABLE_KEYS))
def test_a_changed_key_is_named_with_both_values(key: str, tmp_path: Path) -> None:
    begun = defaults()
    value = another(begun[key])
    config = changed(key)
    said = f"cannot resume {tmp_path} with {key}={value!r}: it was begun with {begun[key]!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_same(begun, config, tmp_path)
    del begun[key]  # of a version that had no such key
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}: it was begun with None")):
        check_same(begun, config, tmp_path)


def test_keys_that_no_past_round_depends_on_may_change(tmp_path: Path) -> None:
    assert {
        "resume",
        "out",
        "num-server-rounds",
        "round-timeout",
        "min-clients",
        "retries",
        "patience",
        "dp-target-epsilon",
        "tracking",
    } == RESUMABLE_KEYS
    assert defaults().keys() >= RESUMABLE_KEYS
    check_same(defaults(), changed(*RESUMABLE_KEYS), tmp_path)


# -------------------------------------------------------------------------------------------------- a run and its end

DATA = (np.zeros((6, 2)), np.arange(6)), (np.zeros((4, 2)), np.arange(4))


def report(folder: Path, **values: Any) -> Report:
    config = validate({"out": str(folder), **{key.replace("_", "-"): value for key, value in values.items()}})
    return Report(config, SimpleNamespace(root="here", data=DATA, suffix=".npz", save=weights.save_arrays))


def play(run: Report, rounds: int) -> None:
    for number in range(rounds):
        arrays = ArrayRecord({"w": Array(np.full(3, run.next_round + 0.1))})
        run.round(arrays, {}, {}, train_loss=1 / 3 + number, server_accuracy=0.5)


def leave(run: Report) -> None:
    """Let go of the run folder, as the end of a process does."""
    assert run.lock is not None
    run.lock.release()


def test_a_report_goes_on_where_it_was_left(tmp_path: Path) -> None:
    first = report(tmp_path)
    assert first.next_round == 0 and first.arrays is None
    play(first, 3)
    leave(first)
    second = report(tmp_path, resume=True, num_server_rounds=9)
    assert second.next_round == 3 and second.metrics["rounds"] == first.metrics["rounds"]
    assert second.arrays is not None
    check_equal(second.arrays, {"w": np.full(3, 2.1)})
    play(second, 1)
    rounds = json.loads((tmp_path / "metrics.json").read_text())["rounds"]
    assert [row["round"] for row in rounds] == [0, 1, 2, 3] and rounds[:3] == first.metrics["rounds"]
    assert load_checkpoint(tmp_path)[0]["rounds"] == rounds
    names = {"metrics.json", "checkpoint-2.npz", "checkpoint-3.npz", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} == names, "nothing unfinished is left"


def test_a_new_run_does_not_go_on(tmp_path: Path) -> None:
    first = report(tmp_path)
    play(first, 2)
    leave(first)
    assert report(tmp_path).next_round == 0


def test_a_report_refuses_another_config_or_other_data_and_keeps_what_is_there(tmp_path: Path) -> None:
    first = report(tmp_path)
    play(first, 2)
    leave(first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="with seed=5: it was begun with 0"):
        report(tmp_path, resume=True, seed=5)
    for name, data in (("there", DATA), ("here", (DATA[0], DATA[0]))):
        with pytest.raises(ValueError, match=f"cannot resume {tmp_path}: it was begun with other data, here"):
            Report(validate({"out": str(tmp_path), "resume": True}), SimpleNamespace(root=name, data=data))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
