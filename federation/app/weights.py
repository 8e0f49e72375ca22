"""Convert models of PyTorch, Keras and Flax NNX to ArrayRecords and back, without importing any of these frameworks.

Values of types that NumPy does not have (bfloat16, the float8 types) are sent as float32, with the name of their own
type: Flower's strategies can average them, and no value changes.
"""

import hashlib
import io
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (adds such types to NumPy)
import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

Values = Mapping[str, NDArray[Any]]


class Framework(Protocol):
    """How to read and write the weights and buffers of a model, by name, and how to save it."""

    model: str  # the base class of its models
    suffix: str  # the suffix of its file format

    def read(self, net: Any) -> Values: ...
    def write(self, net: Any, values: Values) -> None: ...
    def save(self, net: Any, path: Path) -> None: ...


class Keras:
    """A Keras model: its weights, by their paths, without the random state of its layers."""

    model, suffix = "keras.Model", ".keras"

    def read(self, net: Any) -> Values:
        convert = sys.modules["keras"].ops.convert_to_numpy
        return {name: convert(variable) for name, variable in self.variables(net).items()}

    def write(self, net: Any, values: Values) -> None:
        for name, variable in self.variables(net).items():
            variable.assign(values[name])

    def variables(self, net: Any) -> dict[str, Any]:
        paths = [variable.path for variable in net.weights]  # layers of a subclassed model may share a name
        return {path if paths.count(path) == 1 else f"{path}.{i}": net.weights[i] for i, path in enumerate(paths)}

    def save(self, net: Any, path: Path) -> None:
        net.save(path)


class Torch:
    """A torch.nn.Module: its state_dict."""

    model, suffix = "torch.nn.Module", ".pt"

    def read(self, net: Any) -> Values:
        return {name: self.numpy(name, tensor) for name, tensor in net.state_dict().items()}

    def numpy(self, name: str, tensor: Any) -> NDArray[Any]:
        if not isinstance(tensor, sys.modules["torch"].Tensor):
            raise ValueError(f"{name} of the model's state_dict is of type {type(tensor).__name__}, not a tensor")
        tensor = tensor.detach().cpu()
        try:
            return np.asarray(tensor.numpy())
        except TypeError:
            return np.asarray(tensor.float().numpy().astype(str(tensor.dtype).removeprefix("torch.")))

    def write(self, net: Any, values: Values) -> None:
        net.load_state_dict({name: sys.modules["torch"].from_numpy(value) for name, value in values.items()})

    def save(self, net: Any, path: Path) -> None:
        sys.modules["torch"].save(net.state_dict(), model := io.BytesIO())
        path.write_bytes(model.getvalue())


class Flax:
    """A Flax NNX module: its state without random state; the path (a, b, c) becomes the name a.b.c. Saved as .npz."""

    model, suffix = "flax.nnx.Module", ".npz"

    def read(self, net: Any) -> Values:
        return {name: self.numpy(name, variable.get_value()) for name, _, variable in self.state(net)}

    def numpy(self, name: str, value: Any) -> NDArray[Any]:
        if not hasattr(value, "dtype"):
            raise ValueError(f"{name} of the model's state is of type {type(value).__name__}, not an array")
        return np.asarray(value)

    def state(self, net: Any) -> list[tuple[str, tuple[Any, ...], Any]]:
        nnx = sys.modules["flax.nnx"]
        flat = nnx.to_flat_state(nnx.state(net, nnx.Not(nnx.RngState)))
        return [(".".join(map(str, path)), path, variable) for path, variable in flat]

    def write(self, net: Any, values: Values) -> None:
        nnx, as_array = sys.modules["flax.nnx"], sys.modules["jax"].numpy.asarray
        new = [(path, old.replace(as_array(values[name], old.dtype))) for name, path, old in self.state(net)]
        nnx.update(net, nnx.from_flat_state(new))

    def save(self, net: Any, path: Path) -> None:
        values: dict[str, Any] = {name: array.numpy() for name, array in from_net(net).items()}
        np.savez(path, **values)


FRAMEWORKS: tuple[Framework, ...] = (Keras(), Torch(), Flax())  # a Keras model on torch is a torch.nn.Module, too


def framework(net: Any) -> Framework:
    """Return the framework of `net`. Raises ValueError if it is none of these."""
    for candidate in FRAMEWORKS:
        module, _, name = candidate.model.rpartition(".")
        loaded = sys.modules.get(module)
        if loaded and isinstance(net, getattr(loaded, name)):
            return candidate
    known = ", ".join(candidate.model for candidate in FRAMEWORKS)
    raise ValueError(f"Net() returned an object of type {type(net).__name__}, not one of: {known}")


# --------------------------------------------------------------------------------------------------------- records


def from_net(net: Any) -> ArrayRecord:
    """Return all weights and buffers of `net`, by name. Raises ValueError if there are none, or other objects."""
    values = framework(net).read(net)
    if not values:
        raise ValueError("Net() returned a model without weights; if it creates them later, give it its input shape")
    return ArrayRecord({name: encoded(value) for name, value in values.items()})


def to_net(arrays: ArrayRecord, net: Any) -> None:
    """Copy `arrays` into `net`. Raises ValueError if a name, a shape or a dtype does not match."""
    ours = framework(net)
    held = {name: (str(value.dtype), value.shape) for name, value in ours.read(net).items()}
    _compare(_layout(arrays), held)
    ours.write(net, _values(arrays))


_last: list[tuple[weakref.ref[ArrayRecord], Values]] = []


def _values(arrays: ArrayRecord) -> Values:
    """Return the values of `arrays`. The clients of a node share a global model, which is read for the first of them.

    They are kept as long as the record itself, and no longer: a model may be large.
    """
    if not _last or _last[0][0]() is not arrays:
        values = {name: array.numpy() for name, array in arrays.items()}
        _last[:] = [(weakref.ref(arrays, lambda _: _last.clear()), values)]
    return _last[0][1]


Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of each entry, by name


def check_compatible(found: ArrayRecord, expected: ArrayRecord) -> None:
    """Raise ValueError unless both have entries of the same names, shapes and dtypes."""
    _compare(_layout(found), _layout(expected))


def _layout(arrays: ArrayRecord) -> Layout:
    return {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}


def _compare(found: Layout, expected: Layout) -> None:
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            sent, ours = _shown(found.get(name)), _shown(expected.get(name))
            raise ValueError(f"{name} does not match: received {sent}, the model has {ours}")


def _shown(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{entry[0]} of shape {entry[1]}" if entry else "no such entry"


def encoded(values: NDArray[Any]) -> Array:
    """Return `values` as an Array that any strategy can average."""
    stored = Array(values.astype(stored_dtype(values.dtype), copy=False))
    return Array(str(values.dtype), stored.shape, stored.stype, stored.data)


def stored_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype in which values of a dtype are sent: float32 for those that a package has added to NumPy."""
    return np.dtype(np.float32) if np.dtype(dtype).isbuiltin == 2 else np.dtype(dtype)


def decoded(array: Array) -> NDArray[Any]:
    """Return an Array's values in their own dtype."""
    return array.numpy().astype(array.dtype, copy=False)


def restore_dtypes(old: ArrayRecord, new: ArrayRecord) -> ArrayRecord:
    """Return `new` with the dtypes of `old`: the weighted mean of integers, such as counters, is a float."""
    pairs = ((name, array.numpy(), np.dtype(old[name].dtype)) for name, array in new.items())
    whole = ((name, np.rint(mean) if dtype.kind in "biu" else mean, dtype) for name, mean, dtype in pairs)
    return ArrayRecord({name: encoded(np.asarray(mean, dtype)) for name, mean, dtype in whole})


def sha256(arrays: ArrayRecord) -> str:
    """Digest the raw little-endian bytes of all arrays, in the model's own order."""
    digest = hashlib.sha256()
    for value in map(decoded, arrays.values()):
        digest.update(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def size(arrays: ArrayRecord) -> int:
    """Return how many bytes `arrays` take on the wire."""
    return sum(len(array.data) for array in arrays.values())
