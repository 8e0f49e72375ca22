"""Model to ArrayRecord and back, the digest of weights, and Flower's FedAvg as the weighted mean that it should be."""

from collections.abc import Callable, Iterator
from hashlib import sha256

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity  # without one, no Message can be made outside of a run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cifar
from federation import weights


@pytest.fixture(scope="module", autouse=True)
def in_a_run() -> Iterator[None]:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    yield
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None


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


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda record: record.pop("fc1.bias"), "fc1.bias"),
        (lambda record: record.update({"fc9.bias": Array(np.zeros(3, np.float32))}), "fc9.bias"),
        (lambda record: record.update({"fc2.weight": Array(np.zeros((3, 3), np.float32))}), "fc2.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(spoil: Callable[[ArrayRecord], object], named: str) -> None:
    record = weights.from_net(cifar.Net())
    spoil(record)
    with pytest.raises(ValueError, match=named) as error:
        weights.to_net(record, cifar.Net())
    assert "\n" not in str(error.value)


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


def test_size_is_that_of_the_arrays_and_little_more() -> None:
    record = weights.from_net(cifar.Net())
    assert weights.size(record) == sum(len(array.data) for array in record.values())
    assert 62_006 * 4 < weights.size(record) <= 62_006 * 4 + 128 * len(record)
    assert weights.size(ArrayRecord()) == 0


# ---------------------------------------------------------------------------------------------------- aggregation


def reply(arrays: dict[str, np.ndarray], examples: int, loss: float = 0.0) -> Message:
    """Return what a client would send back."""
    content = RecordDict({
        "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
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


def test_the_mean_of_models_loads_into_a_model() -> None:
    one, other, mean = Odd(), changed(Odd()), Odd()
    with torch.no_grad():
        one.norm.num_batches_tracked.fill_(10)
        other.norm.num_batches_tracked.fill_(20)
    replies = [
        reply({name: tensor.numpy() for name, tensor in net.state_dict().items()}, count)
        for net, count in ((one, 1), (other, 3))
    ]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    weights.to_net(arrays, mean)
    torch.testing.assert_close(mean.conv.weight, 0.25 * one.conv.weight + 0.75 * other.conv.weight)
    assert mean.norm.num_batches_tracked.dtype == torch.int64
    assert mean.norm.num_batches_tracked.item() == 17
