"""A model as one array on its way: Flower makes objects of every array, and several calls over HTTP of each object.

With the ten arrays of a small network, most of what SuperLink, SuperNodes and proxy do in a round is to pass on these.
"""

import json

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from federation.app import weights

MOST = 16 * 2**20  # bytes: with more of them, passing them on takes longer than the calls, and a copy takes memory
PACKED = "packed"  # the stype of an array that holds others, one after the other as Flower serialises them


def pack(content: RecordDict) -> RecordDict:
    """Return `content` with the arrays of each record that has several in one, unless they are large."""
    small = {key: arrays for key, arrays in content.array_records.items() if weights.size(arrays) <= MOST}
    records = {key: _pack(arrays) for key, arrays in small.items() if len(arrays) > 1}
    return RecordDict({**content, **records})


def unpack(content: RecordDict) -> RecordDict:
    """Undo `pack`. Raises ValueError where that did not make it."""
    records = {key: _unpack(record) for key, record in content.array_records.items() if _is_packed(record)}
    return RecordDict({**content, **records})


def packed_replies(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let a ClientApp (as a mod of it) read packed messages, and pack its replies."""
    if message.has_content():
        message.content = unpack(message.content)
    reply = call_next(message, context)
    if reply.has_content():
        reply.content = pack(reply.content)
    return reply


def _is_packed(arrays: ArrayRecord) -> bool:
    return [array.stype for array in arrays.values()] == [PACKED]


def _pack(arrays: ArrayRecord) -> ArrayRecord:
    layout = [[name, array.dtype, array.shape, array.stype, len(array.data)] for name, array in arrays.items()]
    data = b"".join(array.data for array in arrays.values())
    return ArrayRecord({json.dumps(layout): Array("uint8", (len(data),), PACKED, data)})


def _unpack(packed: ArrayRecord) -> ArrayRecord:
    ((text, whole),) = packed.items()
    arrays, start = {}, 0
    try:
        for name, dtype, shape, stype, size in json.loads(text):
            arrays[name] = Array(dtype, tuple(shape), stype, whole.data[start : start + size])
            start += size
    except (TypeError, RecursionError) as error:
        raise ValueError(f"an unreadable layout of packed arrays: {error}") from None
    if start != len(whole.data):
        raise ValueError(f"packed arrays of {len(whole.data)} bytes, of which the layout names {start}")
    return ArrayRecord(arrays)
