"""Models of three frameworks to ArrayRecord and back, the digest of weights, and FedAvg as the mean that it should be.

Each framework is imported by the tests of it alone, and they are skipped where it is not installed.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from torch import nn

import cifar
from federation.app import weights
from tests.conftest import ROOT, Terminals

Values = Mapping[str, NDArray[Any]]

pytestmark = [
    pytest.mark.usefixtures("in_a_run"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras on TensorFlow
]
Facts = tuple[str, tuple[int, ...], bytes]  # of an entry: its dtype, its shape and the bytes of its values


# ------------------------------------------------------------------------------------------------- three frameworks


def facts(value: NDArray[Any]) -> Facts:
    return str(value.dtype), value.shape, value.tobytes()


class Kit(Protocol):
    """How to make models of a framework, and how to look into them without federation.app.weights."""

    model: str
    suffix: str
    dtypes: list[str]

    def make(self, values: Values) -> Any:
        """Return a model that has these entries; those called inner.* belong to a part of it."""

    def look(self, net: Any) -> dict[str, Facts]:
        """Return what is in a model that `make` has made, by the names that an ArrayRecord should have."""

    def normed(self) -> Any:
        """Return a model with batch normalisation of three channels."""

    def show(self, net: Any, x: NDArray[Any]) -> None:
        """Let the running statistics of such a model see a batch."""

    def answer(self, net: Any, x: NDArray[Any]) -> NDArray[Any]:
        """Return what such a model makes of a batch, by its running statistics."""

    def load(self, path: Path, net: Any) -> Any:
        """Return the model that was saved, read by the framework's own means; `net` is one of the same kind."""


class TorchKit:
    """Of PyTorch."""

    model, suffix = "torch.nn.Module", ".pt"
    dtypes = "float32 float16 bfloat16 float64 int64 int32 int16 uint8 bool".split()  # noqa: SIM905

    def make(self, values: Values) -> nn.Module:
        net = nn.Module()
        net.inner = nn.Module()
        for name, value in values.items():
            owner = net.inner if "." in name else net
            tensor = self.tensor(value)
            if tensor.is_floating_point():
                owner.register_parameter(name.split(".")[-1], nn.Parameter(tensor))
            else:
                owner.register_buffer(name.split(".")[-1], tensor)
        return net

    def tensor(self, value: NDArray[Any]) -> torch.Tensor:
        if value.dtype.name not in ("bfloat16", "float8_e5m2", "float8_e4m3fn"):
            return torch.from_numpy(value.copy())
        bits = value.copy().view(f"i{value.itemsize}")
        return torch.from_numpy(bits).view(getattr(torch, value.dtype.name))

    def look(self, net: nn.Module) -> dict[str, Facts]:
        return {
            name: (str(value.dtype).removeprefix("torch."), tuple(value.shape), self.raw(value))
            for name, value in net.state_dict().items()
        }

    def raw(self, tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    def normed(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(3))

    def show(self, net: nn.Module, x: NDArray[Any]) -> None:
        net.train()(torch.from_numpy(x))

    def answer(self, net: nn.Module, x: NDArray[Any]) -> NDArray[Any]:
        return net.eval()(torch.from_numpy(x)).detach().numpy()

    def load(self, path: Path, net: nn.Module) -> nn.Module:
        net.load_state_dict(torch.load(path, weights_only=True))
        return net


class KerasKit:
    """Of Keras, on whatever it runs."""

    model, suffix = "keras.Model", ".keras"
    dtypes = "float32 float16 bfloat16 float64 int64 int32 uint8 bool".split()  # noqa: SIM905

    def __init__(self) -> None:
        self.keras = pytest.importorskip("keras", reason="needs pip install '.[keras]'")

    def make(self, values: Values) -> Any:
        net = self.keras.Model(name="net")
        net.inner = self.keras.layers.Layer(name="inner")
        for name, value in values.items():
            owner = net.inner if "." in name else net
            kind = {"dtype": value.dtype.name, "trainable": value.dtype.name.startswith(("float", "bfloat"))}
            owner.add_weight(name=name.split(".")[-1], shape=value.shape, initializer="zeros", **kind).assign(value)
        return net

    def look(self, net: Any) -> dict[str, Facts]:
        return {variable.path: facts(np.asarray(variable.value)) for variable in net.weights}

    def normed(self) -> Any:
        layers = self.keras.layers
        return self.keras.Sequential([self.keras.Input((3,)), layers.BatchNormalization(name="norm")], name="net")

    def show(self, net: Any, x: NDArray[Any]) -> None:
        net(x, training=True)

    def answer(self, net: Any, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(net(x, training=False))

    def load(self, path: Path, net: Any) -> Any:
        return self.keras.saving.load_model(path)


class FlaxKit:
    """Of Flax NNX. JAX has no types of 64 bits, unless it is told so."""

    model, suffix = "flax.nnx.Module", ".npz"
    dtypes = "float32 float16 bfloat16 int32 int16 uint8 bool".split()  # noqa: SIM905

    def __init__(self) -> None:
        self.nnx = pytest.importorskip("flax.nnx", reason="needs pip install '.[jax]'")
        self.asarray = pytest.importorskip("jax").numpy.asarray

    def make(self, values: Values) -> Any:
        net = self.nnx.Module()
        net.inner = self.nnx.Module()
        for name, value in values.items():
            kind = self.nnx.Param if value.dtype.name.startswith(("float", "bfloat")) else self.nnx.BatchStat
            setattr(net.inner if "." in name else net, name.split(".")[-1], kind(self.asarray(value)))
        return net

    def look(self, net: Any) -> dict[str, Facts]:
        outer, inner = dict(vars(net)), vars(vars(net).get("inner", self.nnx.Module()))
        named = outer | {f"inner.{name}": variable for name, variable in inner.items()}
        return {
            name: facts(np.asarray(variable[...]))
            for name, variable in sorted(named.items())
            if isinstance(variable, self.nnx.Variable)
        }

    def normed(self) -> Any:
        return self.nnx.BatchNorm(3, rngs=self.nnx.Rngs(0))

    def show(self, net: Any, x: NDArray[Any]) -> None:
        net(self.asarray(x), use_running_average=False)

    def answer(self, net: Any, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(net(self.asarray(x), use_running_average=True))

    def load(self, path: Path, net: Any) -> Any:
        with np.load(path) as saved:
            for name in saved.files:
                inner, _, name_in_it = name.rpartition(".")
                variable = getattr(net.inner if inner else net, name_in_it)
                variable[...] = self.asarray(saved[name], variable.dtype)
        return net


KITS: dict[str, type[Kit]] = {"torch": TorchKit, "keras": KerasKit, "flax": FlaxKit}


@pytest.fixture(scope="module", params=KITS)
def kit(request: pytest.FixtureRequest) -> Kit:
    return KITS[request.param]()


@pytest.fixture(scope="module")
def keras() -> Any:
    return KerasKit().keras


@pytest.fixture(scope="module")
def nnx() -> Any:
    return FlaxKit().nnx


def array(dtype: str, values: object) -> NDArray[Any]:
    return np.asarray(values, np.float32).astype(dtype)


def drawn(dtype: str) -> st.SearchStrategy[NDArray[Any]]:
    """Return arrays of any shape and of any values, be they infinite, subnormal or (unless bfloat16) not a number."""
    shapes = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    if dtype == "bfloat16":
        return arrays("float32", shapes, elements=st.floats(width=16, allow_nan=False)).map(lambda a: a.astype(dtype))
    return arrays(dtype, shapes)


ENTRIES = ["weight", "bias", "scale", "running_mean", "num_batches_tracked", "inner.weight", "inner.count"]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_round_trip_keeps_names_shapes_dtypes_and_every_value(kit: Kit, data: st.DataObject) -> None:
    any_array = st.sampled_from(kit.dtypes).flatmap(drawn)
    values = data.draw(st.dictionaries(st.sampled_from(ENTRIES), any_array, min_size=1))
    net, other = kit.make(values), kit.make({name: np.zeros_like(value) for name, value in values.items()})
    expected = kit.look(net)
    assert sorted(entry[0] for entry in expected.values()) == sorted(value.dtype.name for value in values.values())
    record = weights.from_net(net)
    assert list(record) == list(expected)
    assert {name: (sent.dtype, tuple(sent.shape)) for name, sent in record.items()} == {
        name: entry[:2] for name, entry in expected.items()
    }
    assert {name: facts(weights.decoded(sent)) for name, sent in record.items()} == expected
    assert weights.sha256(record) == sha256(b"".join(raw for _, _, raw in expected.values())).hexdigest()
    weights.to_net(record, other)
    assert kit.look(other) == expected
    assert kit.look(net) == expected, "and the sender's are as they were"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3)], ids=str)
def test_every_dtype_is_kept_in_every_shape(kit: Kit, dtype: str, shape: tuple[int, ...]) -> None:
    net = kit.make({"weight": np.ones(shape).astype(dtype)})
    other = kit.make({"weight": np.zeros(shape).astype(dtype)})
    weights.to_net(weights.from_net(net), other)
    [name] = kit.look(net)
    assert kit.look(other) == {name: (dtype, shape, np.ones(shape).astype(dtype).tobytes())}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_what_numpy_has_no_type_for_travels_as_float32_under_its_own_name(dtype: str) -> None:
    kit, values = TorchKit(), array(dtype, [[1, -0.0, 0.375], [2**-6, -2, 448]])
    net, other = kit.make({"weight": values}), kit.make({"weight": np.zeros_like(values)})
    record = weights.from_net(net)
    assert record["weight"].dtype == dtype and record["weight"].numpy().dtype == np.float32
    np.testing.assert_array_equal(record["weight"].numpy(), values.astype(np.float32))
    weights.to_net(record, other)
    assert kit.look(other) == kit.look(net) == {"weight": (dtype, (2, 3), values.tobytes())}


def test_every_number_in_bfloat16_comes_out_as_it_went_in(kit: Kit) -> None:
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    values = values[~np.isnan(values.astype(np.float32))]
    assert len(values) == 2**16 - 2 * 127
    net, other = (kit.make({"weight": entry}) for entry in (values, np.zeros_like(values)))
    weights.to_net(weights.from_net(net), other)
    assert kit.look(other) == kit.look(net)
    assert [raw for _, _, raw in kit.look(other).values()] == [values.tobytes()]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_a_number_stays_so(kit: Kit, dtype: str) -> None:
    net, other = (kit.make({"weight": array(dtype, entry)}) for entry in ([1, np.nan, -np.inf], [0, 0, 0]))
    weights.to_net(weights.from_net(net), other)
    [(kind, _, raw)] = kit.look(other).values()
    np.testing.assert_array_equal(np.frombuffer(raw, kind).astype(np.float32), [1, np.nan, -np.inf])


def test_batch_normalisation_travels_with_its_statistics(kit: Kit) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    net, other, fresh = kit.normed(), kit.normed(), kit.normed()
    kit.show(net, x)
    kit.show(net, 3 * x + 1)
    record = weights.from_net(net)
    new = weights.from_net(fresh)
    moved = {name for name in record if weights.decoded(record[name]).tobytes() != new[name].numpy().tobytes()}
    assert {name.replace("/", ".").split(".")[-1] for name in moved} == {
        "torch.nn.Module": {"running_mean", "running_var", "num_batches_tracked"},
        "keras.Model": {"moving_mean", "moving_variance"},
        "flax.nnx.Module": {"mean", "var"},
    }[kit.model]
    weights.to_net(record, other)
    assert kit.look(other) == kit.look(net)
    np.testing.assert_array_equal(kit.answer(other, x), kit.answer(net, x))
    assert np.abs(kit.answer(other, x) - kit.answer(fresh, x)).max() > 0.1


def test_a_framework_is_told_by_its_model(kit: Kit) -> None:
    framework = weights.framework(kit.make({"weight": np.ones(2, np.float32)}))
    assert (framework.model, framework.suffix) == (kit.model, kit.suffix)


@pytest.mark.parametrize("thing", [None, 3, [np.ones(3)], np.ones(3), cifar.Net], ids=repr)
def test_what_is_no_model_is_refused_by_the_name_of_its_type(thing: object) -> None:
    said = (
        f"Net() returned an object of type {type(thing).__name__}, "
        "not one of: keras.Model, torch.nn.Module, flax.nnx.Module, a dict of arrays"
    )
    for function in (weights.framework, weights.from_net):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            function(thing)


def refused_as_empty(net: Any) -> None:
    with pytest.raises(ValueError, match=r"^Net\(\) returned a model without weights; .* give it its input shape$"):
        weights.from_net(net)


def test_a_model_without_weights_is_refused(kit: Kit) -> None:
    refused_as_empty(kit.make({}))


def test_a_model_of_keras_that_is_not_yet_built_is_refused(keras: Any) -> None:
    refused_as_empty(keras.Sequential([keras.layers.Dense(3)]))


def test_a_model_of_random_state_alone_is_refused(keras: Any, nnx: Any) -> None:
    refused_as_empty(keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.5)]))
    refused_as_empty(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))


def test_an_entry_of_torch_that_is_no_tensor_is_named() -> None:
    class Talkative(nn.Linear):
        def get_extra_state(self) -> str:
            return "hello"

    with pytest.raises(ValueError, match=r"^_extra_state of the model's state_dict is of type str, not a tensor$"):
        weights.from_net(Talkative(1, 1))


def test_an_entry_of_nnx_that_is_no_array_is_named(nnx: Any) -> None:
    net = nnx.Module()
    net.inner = nnx.Module()
    net.inner.factor = nnx.Param(2.5)
    with pytest.raises(ValueError, match=r"^inner\.factor .*float"):
        weights.from_net(net)


def test_a_model_of_torch_that_is_not_yet_built_is_refused() -> None:
    with pytest.raises(ValueError, match="uninitialized parameter"):
        weights.from_net(nn.Sequential(nn.LazyLinear(3)))


def test_models_are_saved_in_the_format_of_their_framework(kit: Kit, tmp_path: Path) -> None:
    kinds = {"weight": "float32", "bias": "bfloat16", "inner.count": "int32"}
    values = {name: array(dtype, [[1, -2, 0.5]]) for name, dtype in kinds.items()}
    if kit.model == "keras.Model":  # one of a class of its own would not be found again
        net, other = kit.normed(), kit.normed()
        kit.show(net, np.arange(6, dtype=np.float32).reshape(2, 3))
    else:
        net, other = kit.make(values), kit.make({name: np.zeros_like(value) for name, value in values.items()})
    path = tmp_path / f"model{kit.suffix}"
    weights.framework(net).save(net, path)
    assert [*kit.look(kit.load(path, other)).values()] == [*kit.look(net).values()]
    assert list(tmp_path.iterdir()) == [path]


def test_an_npz_file_of_flax_has_arrays_by_name(tmp_path: Path) -> None:
    kit = FlaxKit()
    values = {"weight": array("bfloat16", [0.375, 3]), "inner.count": array("int32", 7)}
    weights.framework(net := kit.make(values)).save(net, tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as saved:
        assert {name: saved[name].tolist() for name in saved.files} == {"weight": [0.375, 3], "inner.count": 7}


IMPORTED = """
import sys
import federation.app.weights
print({name.split(".")[0] for name in sys.modules} & {"torch", "jax", "flax", "keras", "tensorflow"} or "nothing")
"""


def python(code: str, terminals: Terminals, **environment: str) -> str:
    """Return what the code prints in a process of its own. (JAX warns of a fork, which a Terminal needs.)"""
    environment = terminals.environment | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_imports_no_framework(terminals: Terminals) -> None:
    assert python(IMPORTED, terminals) == "nothing\n"


BACKEND = """
import keras, numpy as np
from federation.app import weights
make = lambda: keras.Sequential(
    [keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16"), keras.layers.BatchNormalization()], name="net"
)
keras.utils.clear_session()
net = make()
keras.utils.clear_session()
other = make()
net(np.ones((4, 3)), training=True)
record = weights.from_net(net)
assert weights.sha256(record) != weights.sha256(weights.from_net(other))
weights.to_net(record, other)
assert weights.sha256(record) == weights.sha256(weights.from_net(other))
print(keras.backend.backend(), weights.framework(net).model, *(array.dtype for array in record.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_model_of_keras_is_one_on_any_backend(terminals: Terminals, backend: str) -> None:
    for needed in ("keras", backend):
        pytest.importorskip(needed)
    said = python(BACKEND, terminals, KERAS_BACKEND=backend)
    assert said == f"{backend} keras.Model" + 2 * " bfloat16" + 4 * " float32" + "\n"


# ------------------------------------------------------------------------------------------- of PyTorch, Keras and NNX


class Odd(nn.Module):
    """A model with what state_dicts hold besides matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5)
        self.norm = nn.BatchNorm2d(4)  # its num_batches_tracked is an int64 scalar
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))


def changed(net: nn.Module) -> nn.Module:
    """Give every entry of `net` another value."""
    with torch.no_grad():
        for number, tensor in enumerate(net.state_dict().values()):
            tensor.copy_(tensor.logical_not() if tensor.dtype == torch.bool else tensor + number + 1)
    return net


@pytest.mark.parametrize("make", [cifar.Net, Odd])
def test_round_trip_keeps_names_shapes_types_and_values(make: Callable[[], nn.Module]) -> None:
    net, other = changed(make()), make()
    weights.to_net(weights.from_net(net), other)
    before, after = net.state_dict(), other.state_dict()
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        assert torch.equal(before[name], after[name]), name


def test_a_record_has_the_names_shapes_and_types_of_the_model() -> None:
    record = weights.from_net(Odd())
    assert list(record) == list(Odd().state_dict())
    assert record["conv.weight"].numpy().dtype == np.float32 and record["conv.weight"].shape == (4, 3, 5, 5)
    assert record["norm.num_batches_tracked"].numpy().dtype == np.int64
    assert record["norm.num_batches_tracked"].numpy().shape == record["scale"].numpy().shape == ()
    assert record["nothing"].numpy().shape == (0, 3)


def test_a_record_is_a_copy() -> None:
    net = cifar.Net()
    record = weights.from_net(net)
    digest = weights.sha256(record)
    changed(net)
    assert weights.sha256(record) == digest != weights.sha256(weights.from_net(net))


def test_tensors_that_are_not_contiguous_travel_there_and_back() -> None:
    def make(start: float) -> nn.Module:
        net = nn.Conv2d(4, 3, 5).to(memory_format=torch.channels_last)
        net.register_buffer("turned", torch.arange(start, start + 12).view(3, 4).t())
        net.register_buffer("thinned", torch.arange(start, start + 12)[1::3].to(torch.bfloat16))
        net.register_buffer("permuted", torch.arange(24).view(2, 3, 4).permute(2, 0, 1) + int(start))
        return net

    net, other = make(5.0), make(0.0)
    assert not any(net.state_dict()[name].is_contiguous() for name in ("weight", "turned", "permuted"))
    record = weights.from_net(net)
    assert record["turned"].numpy().tolist() == [[5, 9, 13], [6, 10, 14], [7, 11, 15], [8, 12, 16]]
    weights.to_net(record, other)
    assert TorchKit().look(other) == TorchKit().look(net)
    assert other.turned.stride() == net.turned.stride() == (1, 4), "each model keeps its own layout"


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.output = nn.Linear(3, 5, bias=False)
            self.output.weight = self.embedding.weight

    net, other = Tied(), Tied()
    record = weights.from_net(net)
    assert list(record) == ["embedding.weight", "output.weight"]
    weights.to_net(record, other)
    assert other.output.weight is other.embedding.weight
    assert torch.equal(other.output.weight, net.output.weight)


def test_layers_of_keras_that_share_a_name_are_told_apart(keras: Any) -> None:
    class Twins(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="twins")
            self.one, self.two = keras.layers.Dense(2, name="same"), keras.layers.Dense(2, name="same")
            self.last = keras.layers.Dense(1, name="last")
            for layer in (self.one, self.two, self.last):
                layer.build((None, 2))

    net, other = Twins(), Twins()
    for number, variable in enumerate(net.weights):
        variable.assign(np.full(variable.shape, number))
    record = weights.from_net(net)
    assert len(record) == len(set(record)) == 6
    assert {name.rpartition("/")[0] for name in record} == {"same", "last"}
    assert {"last/kernel", "last/bias"} < set(record), "a name of its own stays as it is"
    weights.to_net(record, other)
    assert [np.unique(variable).tolist() for variable in other.weights] == [[0], [1], [2], [3], [4], [5]]
    assert np.unique(other.two.kernel).tolist() == [2]


def test_a_path_of_nnx_has_the_places_in_its_lists(nnx: Any) -> None:
    def make(start: float) -> Any:
        net = nnx.Module()
        net.layers = nnx.List([nnx.Module() for _ in range(12)])
        for number, layer in enumerate(net.layers):
            layer.kernel = nnx.Param(FlaxKit().asarray(np.full(2, start + number, np.float32)))
        return net

    net, other = make(100), make(0)
    record = weights.from_net(net)
    assert {name: sent.numpy().tolist() for name, sent in record.items()} == {
        f"layers.{number}.kernel": [100 + number] * 2 for number in range(12)
    }
    weights.to_net(record, other)
    assert [layer.kernel[0].item() for layer in other.layers] == list(range(100, 112))


def test_the_random_state_of_keras_is_not_among_the_entries(keras: Any) -> None:
    def make(seed: int) -> Any:
        dense, dropout = keras.layers.Dense(2, name="dense"), keras.layers.Dropout(0.5, seed=seed)
        return keras.Sequential([keras.Input((3,)), dense, dropout], name="net")

    net, other = make(1), make(2)
    state = np.asarray(other.layers[-1].seed_generator.state.value)
    record = weights.from_net(net)
    assert list(record) == ["net/dense/kernel", "net/dense/bias"]
    weights.to_net(record, other)
    assert np.array_equal(np.asarray(other.layers[-1].seed_generator.state.value), state)


def test_the_random_state_of_nnx_is_not_among_the_entries(nnx: Any) -> None:
    def make(seed: int, value: float) -> Any:
        net = nnx.Module()
        net.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))
        net.scale = nnx.Param(FlaxKit().asarray(np.float32(value)))
        return net

    def state(net: Any) -> list[bytes]:
        return [np.asarray(variable[...]).tobytes() for _, variable in nnx.to_flat_state(nnx.state(net, nnx.RngCount))]

    net, other = make(1, 2.5), make(2, 0)
    other.dropout(FlaxKit().asarray(np.ones(3, np.float32)))  # so that it counts on
    before = state(other)
    assert before != state(net)
    record = weights.from_net(net)
    assert list(record) == ["scale"]
    weights.to_net(record, other)
    assert other.scale[...].item() == 2.5
    assert state(other) == before


# -------------------------------------------------------------------------------------------------- what does not match


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda record: record.pop("fc1.bias"),
            "fc1.bias does not match: received no such entry, the model has float32 of shape (120,)",
        ),
        (
            lambda record: record.update({"fc9.bias": Array(np.zeros(3, np.float32))}),
            "fc9.bias does not match: received float32 of shape (3,), the model has no such entry",
        ),
        (
            lambda record: record.update({"fc2.weight": Array(np.zeros((3, 3), np.float32))}),
            "fc2.weight does not match: received float32 of shape (3, 3), the model has float32 of shape (84, 120)",
        ),
        (
            lambda record: record.update({"fc2.bias": Array(np.zeros(84))}),
            "fc2.bias does not match: received float64 of shape (84,), the model has float32 of shape (84,)",
        ),
        (
            lambda record: record.update({"fc3.bias": weights.encoded(array("bfloat16", np.zeros(10)))}),
            "fc3.bias does not match: received bfloat16 of shape (10,), the model has float32 of shape (10,)",
        ),
        (
            lambda record: record.update({"fc3.bias": Array(np.zeros((10, 1), np.float32))}),
            "fc3.bias does not match: received float32 of shape (10, 1), the model has float32 of shape (10,)",
        ),
    ],
    ids=["missing", "surplus", "shape", "wider", "narrower", "dimension"],
)
def test_weights_that_do_not_fit_are_named(spoil: Callable[[ArrayRecord], object], said: str) -> None:
    record = weights.from_net(cifar.Net())
    spoil(record)
    net = cifar.Net()
    before = TorchKit().look(net)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        weights.to_net(record, net)
    assert TorchKit().look(net) == before, "nothing is written unless all fits"


@pytest.mark.parametrize(
    "sent", [None, np.ones(3, np.float32), np.ones(2, np.float16)], ids=["missing", "shape", "dtype"]
)
def test_weights_that_do_not_fit_are_refused_by_every_framework(kit: Kit, sent: NDArray[Any] | None) -> None:
    net = kit.make({"bias": np.zeros(1, np.float32), "weight": np.zeros(2, np.float32)})
    before, record = kit.look(net), weights.from_net(net)
    [name] = [name for name in record if "weight" in name]
    del record[name]
    if sent is not None:
        record[name] = Array(sent)
    with pytest.raises(ValueError, match=rf"^{name} does not match: .*, the model has float32 of shape \(2,\)$"):
        weights.to_net(record, net)
    assert kit.look(net) == before


def test_records_are_alike_whatever_their_values_and_their_order() -> None:
    one = ArrayRecord({"a": Array(np.ones(2)), "b": Array(np.ones((0, 3), np.int32))})
    other = ArrayRecord({"b": Array(np.ones((0, 3), np.int32)), "a": Array(np.zeros(2))})
    weights.check_compatible(one, other)
    with pytest.raises(ValueError, match=r"^b .* received no such entry, the model has int32 of shape \(0, 3\)$"):
        weights.check_compatible(ArrayRecord({"a": Array(np.ones(2))}), one)
    with pytest.raises(ValueError, match=r"^b .* received int32 of shape \(0, 3\), the model has no such entry$"):
        weights.check_compatible(one, ArrayRecord({"a": Array(np.ones(2))}))


# --------------------------------------------------------------------------------------------------------- the digest


def test_digest_is_independent_of_the_memory_format() -> None:
    net = cifar.Net()
    digest = weights.sha256(weights.from_net(net))
    net.to(memory_format=torch.channels_last)
    assert not net.conv2.weight.is_contiguous()
    assert weights.sha256(weights.from_net(net)) == digest


def test_digest_is_independent_of_transposition_in_memory() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    transposed = matrix.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert weights.sha256(ArrayRecord({"a": Array(matrix)})) == weights.sha256(ArrayRecord({"a": Array(transposed)}))


def test_digest_is_of_the_raw_little_endian_bytes_in_order() -> None:
    arrays = {"b": np.array([1, 2], "<f4"), "a": np.array(3, "<i8"), "c": np.zeros((0, 2), "<f4")}
    expected = sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    assert weights.sha256(ArrayRecord({name: Array(array) for name, array in arrays.items()})) == expected
    big = {name: Array(array.astype(array.dtype.newbyteorder(">"))) for name, array in arrays.items()}
    assert weights.sha256(ArrayRecord(big)) == expected


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_digest_changes_with_any_value(data: st.DataObject) -> None:
    net = cifar.Net()
    digest = weights.sha256(weights.from_net(net))
    tensor = net.state_dict()[data.draw(st.sampled_from(list(net.state_dict())))].flatten()
    place = data.draw(st.integers(0, len(tensor) - 1))
    tensor[place] = torch.nextafter(tensor[place], torch.tensor(torch.inf))  # by the least that there is
    assert weights.sha256(weights.from_net(net)) != digest


def test_digest_of_bfloat16_is_that_of_its_own_bytes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    raw = b"".join(tensor.view(torch.int16).numpy().tobytes() for tensor in net.state_dict().values())
    assert len(raw) == 2 * sum(tensor.numel() for tensor in net.state_dict().values())
    assert weights.sha256(weights.from_net(net)) == sha256(raw).hexdigest()


def test_size_is_that_of_the_arrays_and_little_more() -> None:
    record = weights.from_net(cifar.Net())
    assert weights.size(record) == sum(len(array.data) for array in record.values())
    assert 62_006 * 4 < weights.size(record) <= 62_006 * 4 + 128 * len(record)
    assert weights.size(ArrayRecord()) == 0
    half = weights.from_net(cifar.Net().to(torch.bfloat16))
    assert weights.size(half) == weights.size(record), "bfloat16 travels as float32"


# ---------------------------------------------------------------------------------------------------- aggregation


def reply(arrays: Values | ArrayRecord, examples: int, loss: float = 0.0) -> Message:
    """Return what a client would send back."""
    content = RecordDict({
        "arrays": ArrayRecord({name: a if isinstance(a, Array) else Array(a) for name, a in arrays.items()}),
        "metrics": MetricRecord({"num-examples": examples, "train-loss": loss}),
    })  # fmt: skip
    question = Message(RecordDict({"config": ConfigRecord({})}), 1, MessageType.TRAIN)
    return Message(content, reply_to=question)


@st.composite
def clients(draw: st.DrawFn) -> list[tuple[list[float], int]]:
    """Return the weights and the number of samples of each client."""
    length = draw(st.integers(1, 5))
    values = st.lists(st.floats(-100, 100, width=32), min_size=length, max_size=length)
    return draw(st.lists(st.tuples(values, st.integers(1, 50_000)), min_size=1, max_size=6))


@settings(deadline=None)
@given(clients())
def test_fedavg_is_the_mean_weighted_by_numbers_of_samples(clients: list[tuple[list[float], int]]) -> None:
    models = np.array([values for values, _ in clients], np.float32)
    counts = [count for _, count in clients]
    replies = [
        reply({"w": model, "b": model[:1].reshape(())}, count, float(model[0]))
        for model, count in zip(models, counts, strict=True)
    ]
    arrays, metrics = FedAvg().aggregate_train(1, replies)
    assert arrays is not None and metrics is not None
    expected = np.average(models.astype(np.float64), axis=0, weights=counts)
    np.testing.assert_allclose(arrays["w"].numpy(), expected, rtol=1e-5, atol=1e-4)
    assert arrays["w"].numpy().dtype == np.float32 and arrays["b"].numpy().shape == ()
    assert metrics["train-loss"] == pytest.approx(expected[0], rel=1e-5, abs=1e-4)


def test_an_unweighted_mean_would_be_another_one() -> None:
    models, counts = np.array([[0.0, 4.0], [8.0, 4.0]], np.float32), [3, 1]
    arrays, _ = FedAvg().aggregate_train(1, [reply({"w": m}, c) for m, c in zip(models, counts, strict=True)])
    assert arrays is not None
    assert arrays["w"].numpy().tolist() == [2.0, 4.0] != models.mean(0).tolist()


def mean_of(nets: list[Any], counts: list[int]) -> ArrayRecord:
    """Return the mean that a server makes of what clients with these models send."""
    old = weights.from_net(nets[0])
    arrays, _ = FedAvg().aggregate_train(
        1, [reply(weights.from_net(net), count) for net, count in zip(nets, counts, strict=True)]
    )
    assert arrays is not None
    assert list(arrays) == list(old)
    return weights.restore_dtypes(old, arrays)


def test_the_mean_of_models_loads_into_a_model() -> None:
    one, other, mean = Odd(), changed(Odd()), Odd()
    with torch.no_grad():
        one.norm.num_batches_tracked.fill_(10)
        other.norm.num_batches_tracked.fill_(17)
    weights.to_net(mean_of([one, other], [1, 3]), mean)
    torch.testing.assert_close(mean.conv.weight, 0.25 * one.conv.weight + 0.75 * other.conv.weight)
    assert mean.norm.num_batches_tracked.dtype == torch.int64
    assert mean.norm.num_batches_tracked.item() == 15, "15.25, rounded"
    assert mean.mask.tolist() == [False, True], "as three quarters of the samples have it"
    assert mean.nothing.shape == (0, 3)


def test_the_mean_of_models_with_batch_normalisation_has_the_mean_of_their_statistics(kit: Kit) -> None:
    nets, mean = [kit.normed(), kit.normed()], kit.normed()
    batch = np.arange(12, dtype=np.float32).reshape(4, 3)
    for number, net in enumerate(nets):
        kit.show(net, (2 * number + 1) * batch)
    weights.to_net(mean_of(nets, [1, 3]), mean)
    sent = [weights.from_net(net) for net in nets]
    for name, after in weights.from_net(mean).items():
        one, other = (record[name].numpy() for record in sent)
        np.testing.assert_allclose(after.numpy(), 0.25 * one + 0.75 * other, rtol=1e-6)
        assert after.dtype == sent[0][name].dtype
    assert kit.answer(mean, batch).tobytes() not in [kit.answer(net, batch).tobytes() for net in nets]


def test_bfloat16_can_be_averaged_and_stays_bfloat16(kit: Kit) -> None:
    values = [
        {"weight": [[1, 2, 3]], "scale": 5, "bias": [1]},
        {"weight": [[5, 2, -1]], "scale": 6, "bias": [1.0078125]},
    ]
    nets = [kit.make({name: array("bfloat16", value) for name, value in entries.items()}) for entries in values]
    mean = mean_of(nets, [1, 3])
    assert {(sent.dtype, sent.numpy().dtype.name) for sent in mean.values()} == {("bfloat16", "float32")}
    weights.to_net(mean, nets[0])
    expected = {"weight": [[4, 2, 0]], "scale": 5.75, "bias": [1.0078125]}  # the nearest to 1.005859375 that there is
    assert kit.look(nets[0]) == kit.look(kit.make({name: array("bfloat16", value) for name, value in expected.items()}))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9))
def test_the_mean_of_bfloat16_is_the_nearest_one_there_is(values: list[float], first: int, second: int) -> None:
    one, other = array("bfloat16", values), array("bfloat16", values[::-1])
    nets = [TorchKit().make({"weight": entry}) for entry in (one, other)]
    mean = weights.decoded(mean_of(nets, [first, second])["weight"]).astype(float)
    exact = np.average([one.astype(float), other.astype(float)], axis=0, weights=[first, second])
    assert (np.abs(mean - exact) <= np.abs(exact) * 2**-8 + 1e-4).all()


def test_dtypes_are_as_before_and_whole_numbers_are_rounded() -> None:
    kinds = {"a": "int64", "b": "uint8", "c": "bool", "d": "bool", "e": "float16", "f": "float64", "g": "bfloat16"}
    means = {"a": -17.75, "b": 17.25, "c": 0.75, "d": 0.25, "e": 0.1, "f": 0.1, "g": 0.1}
    old = ArrayRecord({name: weights.encoded(np.zeros((), dtype)) for name, dtype in kinds.items()})
    new = weights.restore_dtypes(old, ArrayRecord({name: Array(np.array(mean)) for name, mean in means.items()}))
    assert {name: after.dtype for name, after in new.items()} == kinds
    assert {name: weights.decoded(after).item() for name, after in new.items()} == {
        "a": -18, "b": 17, "c": True, "d": False, "e": np.float16(0.1), "f": 0.1, "g": 0.10009765625
    }  # fmt: skip
    assert {tuple(after.shape) for after in new.values()} == {()}
