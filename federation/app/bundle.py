"""The contents of several clients' messages in one, for a node that plays several clients.

Flower transfers each record and each array as an object of its own. So what all contents share is in a bundle once, and
what differs is stacked: numbers become lists, and arrays are joined along a new first axis. The number of objects
therefore does not grow with the number of clients, and every byte comes out as it went in.
"""

import json
from collections.abc import Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Content = RecordDict | str  # of one client's message; text says why there is none
INDEX = "bundle"  # the record that tells a bundle from other contents
JOINED = "joined "  # before the serialisation type of arrays that are joined


def pack(contents: Sequence[Content]) -> RecordDict:
    """Return one content that holds all of `contents`, in their order. `unpack` reverses this."""
    groups: dict[object, list[int]] = {}  # the places of contents that can be stacked
    for place, content in enumerate(contents):
        if isinstance(content, RecordDict):
            groups.setdefault(_layout(content), []).append(place)
    errors = {place: content for place, content in enumerate(contents) if isinstance(content, str)}
    index = {"groups": list(groups.values()), "errors": errors}
    bundle = RecordDict({INDEX: ConfigRecord({"json": json.dumps(index)})})
    for number, places in enumerate(groups.values()):
        _pack_group(bundle, number, [contents[place] for place in places])
    return bundle


def _pack_group(bundle: RecordDict, number: int, contents: list[Any]) -> None:
    for name, record in contents[0].items():
        records = [content[name] for content in contents]
        shared = all(other is record for other in records)
        bundle[f"{number}/{'shared' if shared else 'stacked'}/{name}"] = record if shared else _stack(records)


def _layout(content: RecordDict) -> tuple[object, ...]:
    """Return what two contents have to have in common for their records to be stacked."""
    return tuple((name, type(record), _entries(record)) for name, record in content.items())


def _entries(record: Any) -> tuple[object, ...]:
    if isinstance(record, ArrayRecord):
        return tuple((name, a.dtype, a.shape, a.stype, len(a.data)) for name, a in record.items())
    if any(isinstance(value, list) for value in record.values()):
        return (id(record),)  # lists cannot be stacked
    return tuple((name, type(value)) for name, value in record.items())


def _stack(records: list[Any]) -> ArrayRecord | MetricRecord | ConfigRecord:
    if isinstance(records[0], ArrayRecord):
        return ArrayRecord({name: _join([record[name] for record in records]) for name in records[0]})
    kind = type(records[0])
    stacked: ArrayRecord | MetricRecord | ConfigRecord = kind(
        {name: [record[name] for record in records] for name in records[0]}
    )
    return stacked


def _join(arrays: list[Array]) -> Array:
    first = arrays[0]
    data = b"".join(array.data for array in arrays)
    return Array(first.dtype, (len(arrays), *first.shape), JOINED + first.stype, data)


def unpack(bundle: RecordDict) -> list[Content]:
    """Return the contents that a bundle holds. Raises ValueError if it is none that `pack` has made."""
    try:
        return _unpack(bundle)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"damaged bundle of messages: {error!r}") from None


def _unpack(bundle: RecordDict) -> list[Content]:
    index = json.loads(str(bundle.config_records[INDEX]["json"]))
    contents: dict[int, Content] = {int(place): str(error) for place, error in index["errors"].items()}
    for places in index["groups"]:
        contents |= {place: RecordDict() for place in places}
    if sorted(contents) != list(range(sum(map(len, index["groups"])) + len(index["errors"]))):
        raise ValueError("damaged bundle of messages: its index has gaps")
    for full_name, record in bundle.items():
        if full_name != INDEX:
            number, how, name = full_name.split("/", 2)
            places = index["groups"][int(number)]
            records = [record] * len(places) if how == "shared" else _unstack(record, len(places))
            for place, own in zip(places, records, strict=True):
                contents[place][name] = own  # type: ignore[index]
    return [contents[place] for place in range(len(contents))]


def _unstack(record: Any, count: int) -> list[Any]:
    """Split a stacked record into `count` records."""
    split = _split if isinstance(record, ArrayRecord) else list
    columns = {name: split(value) for name, value in record.items()}
    if any(len(column) != count for column in columns.values()):
        raise ValueError(f"damaged bundle of messages: {count} clients, and columns of another length")
    return [type(record)({name: column[row] for name, column in columns.items()}) for row in range(count)]


def _split(array: Array) -> list[Array]:
    count, *shape = array.shape
    size = len(array.data) // max(1, count)
    if size * count != len(array.data) or not array.stype.startswith(JOINED):
        raise ValueError(f"damaged bundle of messages: {len(array.data)} bytes for {count} arrays")
    stype = array.stype.removeprefix(JOINED)
    if count == 1:
        return [Array(array.dtype, tuple(shape), stype, array.data)]  # a model may be large
    data = memoryview(array.data)
    return [Array(array.dtype, tuple(shape), stype, bytes(data[i * size : (i + 1) * size])) for i in range(count)]
