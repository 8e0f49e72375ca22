"""A bundle holds the contents of several messages, gives back each as it was, and does not grow in objects."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.app import bundle
from federation.app.weights import encoded

SCALARS = st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False))
CONFIGS = st.dictionaries(st.text(max_size=5), st.one_of(SCALARS, st.text(), st.booleans(), st.binary(max_size=9)))
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
ARRAYS = st.builds(
    lambda shape, dtype, fill: encoded(np.full(shape, fill, dtype)),
    SHAPES, st.sampled_from(["float32", "float64", "int64", "uint8", "bool", "bfloat16"]), st.integers(0, 100),
)  # fmt: skip
CONTENTS = st.builds(
    lambda arrays, metrics, config: RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics), "config": ConfigRecord(config)}
    ),
    st.dictionaries(st.text(max_size=5), ARRAYS, max_size=3),
    st.dictionaries(st.text(max_size=5), st.one_of(SCALARS, st.lists(st.integers(0, 9), min_size=1)), max_size=3),
    CONFIGS,
)


def plain(content: bundle.Content) -> Any:
    """Return all that a content holds, in its order, as values that can be compared."""
    if isinstance(content, str):
        return content
    return [
        (name, type(record), [(key, _value(value)) for key, value in record.items()])
        for name, record in content.items()
    ]


def _value(value: Any) -> Any:
    return (value.dtype, value.shape, value.stype, value.data) if isinstance(value, Array) else (type(value), value)


def reply(seed: int, **metrics: Any) -> RecordDict:
    values = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    return RecordDict(
        {"arrays": ArrayRecord({"w": Array(values)}), "metrics": MetricRecord({"loss": 0.5 * seed} | metrics)}
    )


@given(st.lists(st.one_of(CONTENTS, st.text()), max_size=6))
@settings(deadline=None, max_examples=60)
def test_every_content_comes_out_as_it_went_in(contents: list[bundle.Content]) -> None:
    assert [plain(content) for content in bundle.unpack(bundle.pack(contents))] == [plain(c) for c in contents]


def test_contents_that_look_alike_are_stacked_whatever_their_number() -> None:
    for count in (2, 50):
        packed = bundle.pack([reply(seed) for seed in range(count)])
        assert set(packed) == {"bundle", "0/stacked/arrays", "0/stacked/metrics"}
        assert packed.array_records["0/stacked/arrays"]["w"].shape == (count, 2, 3)
        assert packed.metric_records["0/stacked/metrics"]["loss"] == [0.5 * seed for seed in range(count)]


def test_what_all_share_is_in_it_once() -> None:
    model = reply(1)["arrays"]
    contents = [RecordDict({"arrays": model, "client": ConfigRecord({"position": i})}) for i in range(3)]
    packed = bundle.pack(contents)
    assert packed["0/shared/arrays"] is model and packed["0/stacked/client"] == {"position": [0, 1, 2]}
    assert all(content["arrays"] is model for content in bundle.unpack(packed))


def test_one_that_differs_is_kept_apart() -> None:
    other = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(4))}), "metrics": MetricRecord({"loss": 1})})
    contents: list[bundle.Content] = [reply(0), other, "it failed", reply(2), reply(3, extra=[1, 2])]
    packed = bundle.pack(contents)
    assert "0/stacked/arrays" in packed and "1/shared/arrays" in packed and "2/shared/metrics" in packed
    assert [plain(content) for content in bundle.unpack(packed)] == [plain(content) for content in contents]


def index(text: str) -> ConfigRecord:
    return ConfigRecord({"json": text})


@pytest.mark.parametrize(
    "change",
    [
        {"bundle": index("not JSON")}, {"bundle": index("[]")}, {"bundle": index('{"groups": [[0, 1]], "errors": 5}')},
        {"bundle": index('{"groups": [[0, 2]], "errors": {}}')},
        {"bundle": index('{"groups": [[0, 0]], "errors": {}}')},
        {"bundle": index('{"groups": [[0, 1, 2]], "errors": {}}')}, {"bundle": index('{"groups": [], "errors": {}}')},
        {"bundle": index('{"groups": [["x", 1]], "errors": {}}')}, {"no slashes": ConfigRecord()},
        {"7/shared/arrays": ConfigRecord()}, {"0/stacked/metrics": MetricRecord({"loss": [1.0]})},
        {"0/stacked/metrics": MetricRecord({"loss": 1.0})},
        {"0/stacked/arrays": ArrayRecord({"w": Array(np.zeros((2, 3)))})},
        {"0/stacked/arrays": ArrayRecord({"w": Array("float32", (3, 2), "joined numpy.ndarray", bytes(100))})},
        {"0/stacked/arrays": ArrayRecord({"w": Array("float32", (0,), "joined numpy.ndarray", b"")})},
        {"0/stacked/arrays": ArrayRecord({"w": Array("float32", (), "joined numpy.ndarray", b"")})},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_bundle_is_a_value_error(change: dict[str, Any]) -> None:
    packed = bundle.pack([reply(0), reply(1)])
    for name, record in change.items():
        packed[name] = record
    with pytest.raises(ValueError):
        bundle.unpack(packed)
