"""The guard in front of every strategy: which replies of clients can be aggregated."""

import math
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType

from federation.app import metrics
from federation.app.console import one_line
from federation.app.weights import check_compatible, stored_dtype, view

LOSS = {MessageType.TRAIN: "train-loss", MessageType.EVALUATE: "loss"}  # as a reply calls it
MOST_METRICS = 100  # of a client
GROWTH = 10  # by what a client's own data may have grown since it joined
TRAINED = ("arrays", "variates")  # the records of a question that its reply has, too: a model, control variates


def check_reply(question: Message, reply: Message, samples: dict[str, int], exactly: bool) -> None:
    """Raise ValueError, which says why in one line, unless a reply can be aggregated.

    `samples` is how many the client has by split, `exactly` so many or, with data of its own, about so many.
    """
    try:
        _check(question, reply, samples, exactly)
    except Exception as error:  # an untrusted reply must never stop the run
        raise ValueError(f"{one_line(error):.300}") from None


def _check(question: Message, reply: Message, samples: dict[str, int], exactly: bool) -> None:
    if reply.has_error():
        raise ValueError(one_line(reply.error.reason))
    training = question.metadata.message_type == MessageType.TRAIN
    trained = [name for name in TRAINED if training and name in question.content]
    records = {*trained, "metrics"}
    if set(reply.content) != records:
        raise ValueError(f"its reply has the records {sorted(reply.content)}, not {sorted(records)}")
    _check_numbers(dict(reply.content.metric_records.get("metrics") or {}), LOSS[question.metadata.message_type])
    held = samples["train" if training else "test"]
    counted = reply.content.metric_records["metrics"]["num-examples"]
    if type(counted) is not int or not (counted == held if exactly else 0 < counted <= GROWTH * held):
        raise ValueError(f"num-examples={counted} cannot be: it has joined with {held} samples")
    for name in trained:
        _check_arrays(reply.content.array_records.get(name) or ArrayRecord(), question.content.array_records[name])


def _check_numbers(found: dict[str, Any], loss: str) -> None:
    for name in sorted({*metrics.COUNTS, loss} - set(found)):
        raise ValueError(f"it reports no {name}")
    if len(found) > MOST_METRICS:
        raise ValueError(f"it reports {len(found)} metrics, more than {MOST_METRICS}")
    for name, value in found.items():
        if not metrics.NAME.fullmatch(name):
            raise ValueError(f"it reports a metric called {name!r:.60}")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    if not 0 <= found.get("accuracy", 0) <= 1:
        raise ValueError(f"accuracy is {found['accuracy']}, not in 0 to 1")


def _check_arrays(arrays: ArrayRecord, expected: ArrayRecord) -> None:
    check_compatible(arrays, expected)
    if list(arrays) != list(expected):  # that of the first reply would become the global model's, and change its digest
        raise ValueError(f"its arrays come in the order {list(arrays)}, not {list(expected)}")
    for name, array in arrays.items():
        try:
            values = view(array)
            found = values.shape, values.dtype  # an archive of arrays has neither
        except Exception as error:  # whatever the bytes of a stranger bring about
            raise ValueError(f"{name} cannot be read: {one_line(error)}") from None
        ours = tuple(expected[name].shape), stored_dtype(expected[name].dtype)
        if found != ours:
            raise ValueError(f"{name} holds {values.dtype} of shape {values.shape}, not {ours[1]} of {ours[0]}")
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite: {np.count_nonzero(~np.isfinite(values))} of {values.size} values")
