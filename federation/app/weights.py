"""Convert models of PyTorch, Keras and Flax NNX to ArrayRecords and back, without importing any of these frameworks.

Values of types that NumPy does not have (bfloat16, the float8 types) are sent as float32, with the name of their own
type: Flower's strategies can average them, and no value changes.
"""

import hashlib
import io
import sys
import weakref
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (adds such types to NumPy)
import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from federation.app.console import one_line

Values = Mapping[str, NDArray[Any]]
HEADERS = {  # how to read what stands before the values of an array, by the bytes with which that begins
    np.lib.format.magic(1, 0): np.lib.format.read_array_header_1_0,
    np.lib.format.magic(2, 0): np.lib.format.read_array_header_2_0,
}


class Framework(Protocol):
    """How to read and write the weights and buffers of a model, by name, and how to save it.

    Another framework is a class with these two attributes and four methods, and an entry in FRAMEWORKS.
    """

    model: str  # the base class of its models
    suffix: str  # the suffix of its file format

    def read(self, net: Any) -> Values:
        """Return an array for each name, of the shape and dtype in the model. Raises ValueError where one is none."""

    def write(self, net: Any, values: Values) -> None:
        """Copy values into the model: of the names, shapes and dtypes that `read` returns."""

    def save(self, net: Any, path: Path) -> None:
        """Save the model to a file, whose name ends with `suffix`."""

    def load(self, net: Any, path: Path) -> Values:
        """Return what `save` has written, by the names that `read` gives. A damaged file can raise many kinds."""


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

    def load(self, net: Any, path: Path) -> Values:
        keras = sys.modules["keras"]
        saved = keras.saving.load_model(path, custom_objects={type(net).__name__: type(net)}, compile=False)
        values = map(keras.ops.convert_to_numpy, saved.weights)  # other names than here: Keras numbers its layers
        return dict(zip(self.variables(net), values, strict=True))


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
        state = {name: sys.modules["torch"].from_numpy(value) for name, value in values.items()}
        net.load_state_dict(state, strict=False)  # which names there have to be is known already

    def save(self, net: Any, path: Path) -> None:
        state, federated = net.state_dict(), federated_names(net)
        state = state if federated is None else {name: state[name] for name in federated}
        sys.modules["torch"].save(state, model := io.BytesIO())
        path.write_bytes(model.getvalue())

    def load(self, net: Any, path: Path) -> Values:
        state = sys.modules["torch"].load(path, map_location="cpu", weights_only=True)
        return {name: self.numpy(name, tensor) for name, tensor in state.items()}


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
        save_arrays(from_net(net), path)

    def load(self, net: Any, path: Path) -> Values:
        return load_arrays(path)


class Arrays:
    """A dictionary of NumPy arrays, for models without a class that is known here. It is changed in place."""

    model, suffix = "builtins.dict", ".npz"

    def read(self, net: Any) -> Values:
        for name, value in net.items():
            if not isinstance(value, np.ndarray) or not isinstance(name, str):
                raise ValueError(
                    f"{name!r} of the model is of type {type(value).__name__}, not a NumPy array with a name"
                )
        return dict(net)

    def write(self, net: Any, values: Values) -> None:
        for name, value in values.items():
            net[name][...] = value

    def save(self, net: Any, path: Path) -> None:
        save_arrays(from_net(net), path)

    def load(self, net: Any, path: Path) -> Values:
        return load_arrays(path)


FRAMEWORKS: tuple[Framework, ...] = (
    Keras(),
    Torch(),
    Flax(),
    Arrays(),
)  # a Keras model on torch is a torch.nn.Module, too


def framework(net: Any) -> Framework:
    """Return the framework of `net`. Raises ValueError if it is none of these."""
    for candidate in FRAMEWORKS:
        module, _, name = candidate.model.rpartition(".")
        loaded = sys.modules.get(module)
        if loaded and isinstance(net, getattr(loaded, name)):
            return candidate
    known = ", ".join(candidate.model.replace("builtins.dict", "a dict of arrays") for candidate in FRAMEWORKS)
    raise ValueError(f"Net() returned an object of type {type(net).__name__}, not one of: {known}")


# --------------------------------------------------------------------------------------------------------- records


def from_net(net: Any) -> ArrayRecord:
    """Return all weights and buffers of `net`, by name, or those that its trainable() names.

    Raises ValueError if there are none, or other objects.
    """
    values = _federated(net)
    if not values:
        raise ValueError("Net() returned a model without weights; if it creates them later, give it its input shape")
    return ArrayRecord({name: encoded(value) for name, value in values.items()})


def federated_names(net: Any) -> list[str] | None:
    """Return the names of the weights that a model wants to be federated; None for all."""
    return list(net.trainable()) if callable(getattr(net, "trainable", None)) else None


def _federated(net: Any) -> Values:
    values, names = framework(net).read(net), federated_names(net)
    if unknown := sorted({*(names or ())} - values.keys()):
        raise ValueError(f"trainable() of the model names {unknown[0]}, which is not among its weights")
    return values if names is None else {name: values[name] for name in names}


def split(arrays: ArrayRecord, personal: str) -> tuple[ArrayRecord, ArrayRecord]:
    """Return the entries that all clients share, and those that match a pattern of `personal`, in a shell's syntax.

    Raises ValueError where there are patterns, and one of both would be empty.
    """
    if not personal:
        return arrays, ArrayRecord()
    patterns = personal.replace(",", " ").split()
    own = {name for name in arrays if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not own or len(own) == len(arrays):
        matched = "all entries" if own else "none of the entries"
        raise ValueError(f"personal={personal!r} matches {matched} of the model: {', '.join(arrays):.300}")
    shared = {name: array for name, array in arrays.items() if name not in own}
    return ArrayRecord(shared), ArrayRecord({name: array for name, array in arrays.items() if name in own})


def to_net(arrays: ArrayRecord, net: Any) -> None:
    """Copy `arrays` into `net`. Raises ValueError if a name, a shape or a dtype does not match."""
    held = {name: (str(value.dtype), value.shape) for name, value in _federated(net).items()}
    _compare(_layout(arrays), held)
    framework(net).write(net, {name: value.copy("K") for name, value in _values(arrays).items()})


def save_arrays(arrays: ArrayRecord, path: Path) -> None:
    """Write a model that no framework is needed to read: a NumPy archive, in the model's own order."""
    values: dict[str, Any] = {name: view(array) for name, array in arrays.items()}
    np.savez(path, **values)


def load_arrays(path: Path) -> Values:
    """Return what `save_arrays` has written: an array for each name. A damaged file can raise many kinds of errors."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
        return dict(saved)


def read_model(path: Path, net: Any = None) -> ArrayRecord:
    """Return the weights that are saved in a file: of the framework of `net`, or a NumPy archive of arrays by name.

    Raises ValueError where that is missing or damaged, or does not fit `net`.
    """
    try:
        is_archive = net is None or path.suffix == ".npz"
        values = load_arrays(path) if is_archive else framework(net).load(net, path)
    except Exception as error:  # each format has its own
        why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        formats = (
            ".npz, since a server without the framework reads no other" if net is None else ".npz or the model's own"
        )
        raise ValueError(f"cannot read the model {path}: {why} (formats: {formats})") from None
    held = {} if net is None else _federated(net)
    arrays = ArrayRecord({name: encoded(_like(value, held.get(name))) for name, value in values.items()})
    if net is not None:
        _explain_misfit(path, arrays, held)
    return arrays


def _like(value: NDArray[Any], held: NDArray[Any] | None) -> NDArray[Any]:
    """Return a value in the dtype that the model has: an archive may hold it in another, as NumPy lacks some."""
    return value if held is None else np.asarray(value).astype(held.dtype, copy=False)


def _explain_misfit(path: Path, arrays: ArrayRecord, held: Values) -> None:
    try:
        _compare(_layout(arrays), {name: (str(value.dtype), value.shape) for name, value in held.items()})
    except ValueError as error:
        raise ValueError(f"the model {path} is another one than Net() makes: {error}") from None


_last: list[tuple[weakref.ref[ArrayRecord], Values]] = []


def _values(arrays: ArrayRecord) -> Values:
    """Return the values of `arrays`. The clients of a node share a global model, which is read for the first of them.

    They are kept as long as the record itself, and no longer.
    """
    if not _last or _last[0][0]() is not arrays:
        values = {name: view(array) for name, array in arrays.items()}
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


def view(array: Array) -> NDArray[Any]:
    """Return an Array's values as they are stored, read-only: no copy of its bytes, which `array.numpy()` would make.

    Raises what `array.numpy()` raises, or TypeError where there are too few bytes.
    """
    header = io.BytesIO(array.data)
    reader = HEADERS.get(array.data[: np.lib.format.MAGIC_LEN])
    if reader is None or array.stype != "numpy.ndarray":
        return array.numpy()
    header.seek(np.lib.format.MAGIC_LEN)
    shape, by_column, dtype = reader(header)
    if dtype.hasobject:
        return array.numpy()  # which refuses it
    return np.ndarray(shape, dtype, array.data, header.tell(), order="F" if by_column else "C")


def decoded(array: Array) -> NDArray[Any]:
    """Return an Array's values in their own dtype. They may be read-only."""
    return view(array).astype(array.dtype, copy=False)


def restore_dtypes(old: ArrayRecord, new: ArrayRecord) -> ArrayRecord:
    """Return `new` with the dtypes of `old`: the weighted mean of integers, such as counters, is a float."""
    return ArrayRecord({name: _restored(old[name], array) for name, array in new.items()})


def _restored(old: Array, new: Array) -> Array:
    dtype = np.dtype(old.dtype)
    if new.dtype == old.dtype and len(new.data) == len(old.data) and stored_dtype(dtype) == dtype:
        return new  # as most are, and a model may be large
    mean = view(new)
    return encoded(np.asarray(np.rint(mean) if dtype.kind in "biu" else mean, dtype))


def sha256(arrays: ArrayRecord) -> str:
    """Digest the raw little-endian bytes of all arrays, in the model's own order."""
    digest = hashlib.sha256()
    for value in map(decoded, arrays.values()):
        ordered = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))  # of one dimension at least
        digest.update(ordered.view(np.uint8).data)
    return digest.hexdigest()


def size(arrays: ArrayRecord) -> int:
    """Return how many bytes `arrays` take on the wire."""
    return sum(len(array.data) for array in arrays.values())
