"""What a client sends of its new model where that is not all of it: what training has changed, maybe compressed.

The server adds that to the model that it has sent, before anything else of it looks at a reply.
"""

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from federation.app.compression import Layout, by_entry, compression
from federation.app.config import RunConfig, validate
from federation.app.console import one_line
from federation.app.job import order_of
from federation.app.weights import check_compatible, encoded, stored_dtype

ENTRY = "entry "  # before the name of an entry that is sent as it is
RESIDUAL = "residual"  # the record of a client's state that has what it has not sent
OVERHEAD = 1024  # bytes at most, of an array's dtype and shape before its values


class Flat:
    """The floating-point entries of a model as one vector, in the model's own order. Other entries stay apart."""

    def __init__(self, model: ArrayRecord) -> None:
        self.model = model
        dtypes = {name: stored_dtype(array.dtype) for name, array in model.items()}
        self.real = [name for name, dtype in dtypes.items() if dtype.kind == "f"]
        self.others = [name for name in model if name not in self.real]
        self.shapes = [tuple(model[name].shape) for name in self.real]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.dtype = np.result_type(np.float16, *(dtypes[name] for name in self.real))  # that holds all of them
        self.exact = np.result_type(self.dtype, np.float32)  # to compute in

    def vector(self, model: ArrayRecord) -> NDArray[Any]:
        """Return the values of a model with the same entries."""
        values = [model[name].numpy().astype(self.exact).ravel() for name in self.real]
        return np.concatenate([np.zeros(0, self.exact), *values])

    def record(self, vector: NDArray[Any], others: dict[str, Array]) -> ArrayRecord:
        """Return the model with the values of `vector`, in its own dtypes, and the `others` by name."""
        parts = zip(self.real, by_entry(vector, self.sizes), self.shapes, strict=True)
        shaped = {name: part.reshape(shape) for name, part, shape in parts}
        real = {name: encoded(np.asarray(part, self.model[name].dtype)) for name, part in shaped.items()}
        return ArrayRecord({name: (real | others)[name] for name in self.model})


def send_changes(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let a ClientApp (as a mod of it) send what training has changed in the place of a new model."""
    config = validate(context.run_config)
    reply = call_next(message, context)
    if config.upload == "weights" or message.metadata.message_type != MessageType.TRAIN:
        return reply
    before, after = (one.content.array_records["arrays"] for one in (message, reply))
    flat = Flat(before)
    change = flat.vector(after) - flat.vector(before)
    parts = _compressed(change, flat, config, context, order_of(message))
    others = {ENTRY + name: after[name] for name in flat.others}
    reply.content["arrays"] = ArrayRecord({**{name: Array(part) for name, part in parts.items()}, **others})
    return reply


def _compressed(
    change: NDArray[Any], flat: Flat, config: RunConfig, context: Context, order: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    """Return what is sent of a change. With top-k, what is not sent is added to the next one: error feedback.

    That is algorithm 1 of Stich et al. 2018, and of Karimireddy et al. 2019, with a round's training as the step.
    """
    how, seed = compression(config), (config.seed, order["position"], order["server-round"])
    if config.compression == "top-k" and RESIDUAL in context.state:
        change = change + context.state.array_records[RESIDUAL]["values"].numpy()
    with np.errstate(all="ignore"):  # what is not finite is the guard's business
        parts = dict(how.encode(change, flat.sizes, flat.dtype, seed))
        if config.compression == "top-k":
            left = change - how.decode(parts, flat.sizes)
            context.state[RESIDUAL] = ArrayRecord({"values": Array(left)})
    return parts


def restore_model(question: Message, reply: Message, config: RunConfig) -> None:
    """Put the new model into a reply to train that tells only what has changed.

    Raises ValueError, which says why in one line, where that cannot be.
    """
    if config.upload == "weights" or question.metadata.message_type != MessageType.TRAIN or reply.has_error():
        return
    try:
        sent = reply.content.array_records["arrays"]
        reply.content["arrays"] = _restored(question.content.array_records["arrays"], sent, config)
    except Exception as error:  # an untrusted reply must never stop the run
        raise ValueError(f"what its model has changed cannot be read: {one_line(error):.200}") from None


def _restored(before: ArrayRecord, sent: ArrayRecord, config: RunConfig) -> ArrayRecord:
    flat, how = Flat(before), compression(config)
    layout = how.layout(flat.sizes, flat.dtype)
    expected = {name: Array(str(np.dtype(dtype)), shape, "", b"") for name, (dtype, shape) in layout.items()}
    check_compatible(sent, ArrayRecord({**expected, **{ENTRY + name: before[name] for name in flat.others}}))
    with np.errstate(all="ignore"):
        parts = {name: _read(name, sent[name], layout) for name in layout}
        values = flat.vector(before) + how.decode(parts, flat.sizes)
        return flat.record(values, {name: sent[ENTRY + name] for name in flat.others})


def _read(name: str, array: Array, layout: Layout) -> NDArray[Any]:
    """Return the values of an array, if they are what it says that they are, and no larger."""
    dtype, shape = layout[name]
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size <= len(array.data) <= size + OVERHEAD:
        raise ValueError(f"{name} has {len(array.data)} bytes for {size} of values")
    values = array.numpy()
    if (values.dtype, values.shape) != (np.dtype(dtype), shape):
        raise ValueError(f"{name} holds {values.dtype} of shape {values.shape}, not {np.dtype(dtype)} of {shape}")
    return values
