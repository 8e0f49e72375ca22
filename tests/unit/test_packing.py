"""Arrays that travel as one come out as they went in, and what a stranger packed badly is refused."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from federation.app.packing import PACKED, pack, packed_replies, unpack

VALUES = st.sampled_from(["<f4", "<f8", "<i8", "u1", "?"]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0))
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_arrays_come_out_as_they_went_in(values: dict[str, np.ndarray]) -> None:
    model = ArrayRecord({name: Array(value) for name, value in values.items()})
    content = RecordDict({"arrays": model, "config": ConfigRecord({"round": 1})})
    sent = pack(content)
    assert len(sent.array_records["arrays"]) == min(len(values), 1)
    assert unpack(sent) == content == unpack(content)
    assert list(unpack(sent).array_records["arrays"]) == list(values)


def packed(layout: object, data: bytes) -> RecordDict:
    text = layout if isinstance(layout, str) else json.dumps(layout)
    return RecordDict({"arrays": ArrayRecord({text: Array("uint8", (len(data),), PACKED, data)})})


@pytest.mark.parametrize(
    ("layout", "data"),
    [
        ("no JSON", b""), ("[" * 10_000, b""), (3, b""), ([3], b""), ([["w", "<f4", [1], "numpy.ndarray"]], b""),
        ([["w", "<f4", 1, "numpy.ndarray", 4]], b"1234"), ([["w", 4, [1], "numpy.ndarray", 4]], b"1234"),
        ([["w", "<f4", [1], "numpy.ndarray", "4"]], b"1234"), ([["w", "<f4", [1], "numpy.ndarray", 4]], b"12345"),
        ([["w", "<f4", [1], "numpy.ndarray", 8]], b"1234"), ([["w", "<f4", [1], "numpy.ndarray", 8]] * 2, b"1234"),
    ],
)  # fmt: skip
def test_what_is_packed_badly_is_refused(layout: object, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"packed arrays|JSON|unpack|value"):
        unpack(packed(layout, data))


@pytest.mark.usefixtures("in_a_run")
def test_a_client_app_sees_the_arrays_and_answers_with_one() -> None:
    model = ArrayRecord({"w": Array(np.arange(3.0)), "b": Array(np.zeros(()))})
    seen: list[RecordDict] = []

    def handle(message: Message, context: Context) -> Message:
        seen.append(message.content)
        return Message(RecordDict({"arrays": model, "metrics": MetricRecord({"n": 1})}), reply_to=message)

    message = Message(pack(RecordDict({"arrays": model})), 1, "train")
    reply = packed_replies(message, Context(1, 1, {}, RecordDict(), {}), handle)
    assert seen == [RecordDict({"arrays": model})]
    assert [array.stype for array in reply.content.array_records["arrays"].values()] == [PACKED]
    assert unpack(reply.content).array_records["arrays"] == model
