"""What clients send of what has changed arrives as the server's new model, and nothing else does."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from federation.app import bundle
from federation.app.compression import Int8, TopK
from federation.app.config import validate
from federation.app.replies import check_reply
from federation.app.upload import RESIDUAL, restore_model, send_changes
from federation.app.weights import decoded, encoded
from tests.regression import play, regression_task

Weights = dict[str, NDArray[Any]]
Change = Callable[[ArrayRecord], object]
KINDS: dict[str, dict[str, Any]] = {
    "delta": {},
    "float16": {"compression": "float16"},
    "int8": {"compression": "int8"},
    "top-k": {"compression": "top-k", "top-k": 0.1},
}
SHIFTS = st.floats(-2, 2, width=16)
FLOATS = st.floats(-100, 100, width=16)
ENTRIES = st.one_of(
    *(arrays(kind, array_shapes(min_dims=0, max_dims=3, min_side=0), elements=FLOATS) for kind in ("f2", "f4", "f8")),
    arrays("f4", 3, elements=st.sampled_from([0, 0.5, 1, -3])).map(lambda values: values.astype("bfloat16")),
    *(arrays(kind, array_shapes(min_dims=0, min_side=0, max_dims=2)) for kind in ("i8", "u1", "?")),
)
MODELS = st.lists(st.tuples(st.text(), ENTRIES, SHIFTS), max_size=5, unique_by=lambda one: one[0])
MODEL: Weights = {
    "w": np.arange(60, dtype=np.float32).reshape(6, 10), "steps": np.array(7), "half": np.ones(2, "bfloat16"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory: pytest.TempPathFactory, in_a_run: None) -> Iterator[None]:
    with regression_task(tmp_path_factory.mktemp("task")):
        yield


def record(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: encoded(values) for name, values in weights.items()})


def exchange(
    before: Weights, after: Weights, state: RecordDict | None = None, server_round: int = 1, **settings: Any
) -> SimpleNamespace:
    """Return a question, the reply of a client that made one model of another, and what the mod has made of that."""
    config = {"upload": "delta", "seed": 3, **settings}
    order = {"server-round": server_round, "position": 2}
    question = Message(RecordDict({"arrays": record(before), "client": ConfigRecord(order)}), 1, MessageType.TRAIN)
    metrics = MetricRecord({"num-examples": 5, "train-loss": 0.5, "seconds": 0.1})
    plain = Message(RecordDict({"arrays": record(after), "metrics": metrics}), reply_to=question)
    context = Context(1, 1, {}, RecordDict() if state is None else state, config)
    reply = send_changes(question, context, lambda message, context: plain)
    return SimpleNamespace(question=question, reply=reply, config=validate(config), state=context.state)


def restored(sent: SimpleNamespace) -> Weights:
    """Return the model that the server makes of a reply, once its guard has let that through."""
    restore_model(sent.question, sent.reply, sent.config)
    check_reply(sent.question, sent.reply, {"train": 5}, exactly=True)
    return {name: decoded(array) for name, array in sent.reply.content.array_records["arrays"].items()}


def size(arrays: ArrayRecord) -> int:
    return sum(len(array.data) for array in arrays.values())


# --------------------------------------------------------------------------------------------------- there and back


@given(MODELS, st.sampled_from([*KINDS]))
@settings(deadline=None, max_examples=120)
def test_a_model_of_any_layout_comes_out_as_it_went_in(drawn: list[Any], kind: str) -> None:
    """To the rounding that each kind makes, all entries of top-k being sent; integers to the bit."""
    before = {name: values for name, values, _ in drawn}
    after = {name: trained(values, shift) for name, values, shift in drawn}
    found = restored(exchange(before, after, **KINDS[kind] | ({"top-k": 1.0} if kind == "top-k" else {})))
    assert list(found) == list(after)
    for name, values in after.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        if not is_real(values):
            assert found[name].tobytes() == np.ascontiguousarray(values).tobytes()
            continue
        expected, got = values.astype("f8"), found[name].astype("f8")
        change = np.abs(expected - before[name].astype("f8")).max(initial=0)
        coarse = {"delta": 0, "float16": 2**-10, "int8": 1 / 127 + 1e-6, "top-k": 2**-22}[kind] * change
        eps = {"float16": 2**-9, "bfloat16": 2**-7}.get(str(values.dtype), 2**-22)
        assert (np.abs(got - expected) <= coarse + eps * (np.abs(expected) + change) + 1e-7).all()


def trained(values: NDArray[Any], shift: float) -> NDArray[Any]:
    """Return other values of the same dtype: some numbers higher, some the other way round."""
    return np.asarray(values + shift if is_real(values) else np.flip(values)).astype(values.dtype)


def is_real(values: NDArray[Any]) -> bool:
    return values.dtype.kind not in "iub"


def test_weights_are_sent_as_ever() -> None:
    changed = {**MODEL, "w": MODEL["w"] + 1}
    sent = exchange(MODEL, changed, upload="weights")
    arrays = sent.reply.content["arrays"]
    restore_model(sent.question, sent.reply, sent.config)
    assert sent.reply.content["arrays"] is arrays and list(sent.state) == []
    assert {name: array.data for name, array in arrays.items()} == {n: a.data for n, a in record(changed).items()}


@pytest.mark.parametrize(
    ("kind", "share"), [("delta", 1.0), ("float16", 0.5), ("int8", 0.25), ("top-k", 0.2)], ids=[*KINDS]
)
def test_bytes_are_what_they_should_be(kind: str, share: float) -> None:
    random = np.random.default_rng(0)
    before, after = ({"w": random.normal(size=(500, 400)).astype("f4")} for _ in range(2))
    sent = exchange(before, after, **KINDS[kind]).reply.content.array_records["arrays"]
    assert size(sent) / size(record(after)) == pytest.approx(share, abs=0.001)


# ------------------------------------------------------------------------------------------------------------- int8


def test_stochastic_rounding_is_right_on_average_and_never_a_step_off() -> None:
    vector = np.random.default_rng(1).normal(size=400).astype(np.float32)
    sizes, how, count = [100, 300], Int8(), 2000
    step = np.repeat([np.abs(vector[:100]).max() / 127, np.abs(vector[100:]).max() / 127], sizes)
    found = [how.decode(how.encode(vector, sizes, np.float32, (seed, 2, 1)), sizes) for seed in range(count)]
    assert (np.abs(np.array(found) - vector) <= step * 1.0001).all()
    deviations = (np.mean(found, 0) - vector) / (step / 2 / count**0.5)  # at most half a step is a draw's deviation
    assert np.abs(deviations).max() < 4.5 and 0.2 < deviations.std() < 1.2
    nearest = np.round(vector / step) * step
    assert np.abs((nearest - vector) / (step / 2 / count**0.5)).max() > 20, "rounding to the nearest would show"


def test_the_same_client_rounds_alike_in_a_repeated_round_only() -> None:
    after = {**MODEL, "w": MODEL["w"] + np.linspace(0, 1, 60, dtype="f4").reshape(6, 10)}
    sent = [exchange(MODEL, after, server_round=number, **KINDS["int8"]).reply for number in (1, 1, 2)]
    first, again, later = (reply.content["arrays"]["values"].data for reply in sent)
    assert first == again != later


# -------------------------------------------------------------------------------------------------------------- top-k


@given(arrays("f4", st.integers(0, 40), elements=st.sampled_from([0, 1, -1, 2, 3.5, -3.5])), st.floats(0.01, 1))
@settings(deadline=None)
def test_the_largest_are_sent(vector: NDArray[Any], share: float) -> None:
    parts = TopK(share).encode(vector, [len(vector)], np.float32, (0,))
    count = len(parts["places"])
    assert count == int(np.ceil(share * len(vector))) and len(set(parts["places"].tolist())) == count
    assert sorted(np.abs(parts["values"])) == sorted(np.abs(vector))[len(vector) - count :]
    decoded = TopK(share).decode(parts, [len(vector)])
    np.testing.assert_array_equal(decoded[parts["places"].astype(int)], vector[parts["places"].astype(int)])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.sampled_from([0.02, 0.1, 0.5]))
@settings(deadline=None, max_examples=40)
def test_what_is_sent_and_what_is_left_are_all_changes(seeds: list[int], share: float) -> None:
    state, before = RecordDict(), {**MODEL, "w": MODEL["w"] * 0}
    total, sent = np.zeros(60), np.zeros(60)
    for server_round, seed in enumerate(seeds, 1):
        change = np.random.default_rng(seed).normal(size=(6, 10)).astype(np.float32)
        round_ = exchange(before, {**before, "w": change}, state, server_round, compression="top-k", **{"top-k": share})
        state = round_.state
        sent += restored(round_)["w"].ravel().astype("f8")
        total += change.ravel()
    left = state.array_records[RESIDUAL]["values"].numpy()[:60]
    np.testing.assert_allclose(sent + left, total, atol=1e-5)
    assert np.count_nonzero(left) >= 60 - np.ceil(share * 62)


# ---------------------------------------------------------------------------------------------------- what is no good


def put(name: str, values: Any) -> Change:
    return lambda arrays: arrays.update({name: Array(np.asarray(values))})


def altered(name: str, **changed: Any) -> Change:
    return lambda arrays: vars(arrays[name]).update(changed)


def claimed(shape: tuple[int, ...]) -> bytes:
    """Return the header of an array of that shape, and 248 bytes."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), header)
    return file.getvalue() + bytes(248)


def bytes_of(values: NDArray[Any]) -> bytes:
    np.save(file := io.BytesIO(), values)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("delta", lambda arrays: arrays.clear(), "received no such entry"),
        ("delta", lambda arrays: arrays.pop("entry steps"), "entry steps does not match"),
        ("delta", put("more", 1), "more does not match"),
        ("delta", put("values", np.zeros(61, "f4")), "(61,)"),
        ("delta", put("values", np.zeros(62, "f8")), "float64"),
        ("delta", put("values", np.full(62, np.nan, "f4")), "w is not finite"),
        ("delta", put("values", np.full(62, 3.4e38, "f4")), "half is not finite"),
        ("delta", put("entry steps", "seven"), "entry steps does not match"),
        ("delta", altered("entry steps", data=bytes_of(np.zeros(3, "i8"))), "steps holds int64 of shape (3,)"),
        ("delta", altered("values", data=b""), "0 bytes for 248"),
        ("delta", altered("values", data=bytes(2000)), "2000 bytes for 248"),
        ("delta", altered("values", data=bytes(300)), "cannot be read"),
        ("delta", altered("values", data=bytes_of(np.zeros(31, "f8"))), "values holds float64 of shape (31,)"),
        ("delta", altered("values", data=claimed((10**15,))), "cannot be read"),
        ("delta", altered("values", data=claimed((63,))), "cannot be read"),
        ("delta", altered("values", stype="pickle"), "cannot be read"),
        ("float16", put("values", np.full(62, np.inf, "f2")), "w is not finite"),
        ("int8", put("scales", np.full(2, np.nan, "f4")), "w is not finite"),
        ("int8", put("scales", np.full(3, 1, "f4")), "scales does not match"),
        ("int8", lambda arrays: arrays.pop("scales"), "scales does not match"),
        ("top-k", put("places", np.arange(7, dtype="u4") + 56), "places of its values"),
        ("top-k", put("places", np.zeros(7, "u4")), "places of its values"),
        ("top-k", put("places", np.arange(7, dtype="u4")[::-1].copy()), "places of its values"),
        ("top-k", put("places", np.full(7, 2**32 - 1, "u4")), "places of its values"),
        ("top-k", put("places", np.arange(7)), "places does not match"),
        ("top-k", put("values", np.zeros(62, "f4")), "values does not match"),
        ("top-k", put("values", np.full(7, np.nan, "f4")), "not finite"),
    ],
)  # fmt: skip
def test_a_damaged_upload_is_refused_in_one_line(kind: str, change: Change, named: str) -> None:
    sent = exchange(MODEL, MODEL, **KINDS[kind])
    change(sent.reply.content["arrays"])
    with pytest.raises(ValueError) as error:
        restored(sent)
    said = str(error.value)
    assert named in said and len(said.splitlines()) == 1 and len(said) <= 300, said


@pytest.mark.parametrize("change", [lambda c: c.clear(), lambda c: c.update({"arrays": MetricRecord()})])
def test_a_reply_without_a_model_is_refused_and_an_error_stays_one(change: Callable[[RecordDict], object]) -> None:
    sent = exchange(MODEL, MODEL)
    change(sent.reply.content)
    with pytest.raises(ValueError, match="cannot be read"):
        restore_model(sent.question, sent.reply, sent.config)
    failed = Message(Error(1, "out of memory"), reply_to=sent.question)
    restore_model(sent.question, failed, sent.config)
    assert failed.error.reason == "out of memory"


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, kind: str) -> None:
    own = {"upload": "delta", **KINDS[kind]}
    whole, begun = play(tmp_path / "whole", **own), play(tmp_path / "parts", rounds=2, **own)
    resumed = play(tmp_path / "parts", resume=True, **own)
    assert begun.digest != resumed.digest == whole.digest


def test_runs_learn_whatever_is_sent_and_count_its_bytes(tmp_path: Path) -> None:
    runs = {kind: play(tmp_path / kind, upload="delta", **own) for kind, own in KINDS.items()}
    plain = play(tmp_path / "weights")
    np.testing.assert_allclose(runs["delta"].model["w"], plain.model["w"], rtol=1e-4, atol=1e-6)
    assert all(run.model["steps"] == 16 for run in runs.values()), "counters are sent as they are"
    assert len({run.digest for run in (plain, *runs.values())}) == 5
    sent = [run.rounds[-1]["bytes_up"] for run in (plain, *runs.values())]
    assert sent == sorted(sent, reverse=True)
    assert {run.rounds[-1]["bytes_down"] for run in runs.values()} == {plain.rounds[-1]["bytes_down"]}
    for kind in ("float16", "int8"):
        assert runs[kind].rounds[-1]["server_loss"] == pytest.approx(plain.rounds[-1]["server_loss"], rel=0.02)


def test_a_damaged_upload_costs_its_client_the_round_and_replies_share_a_bundle(tmp_path: Path) -> None:
    def spoil(reply: Message) -> None:
        if reply.has_content() and "0/stacked/arrays" in reply.content:
            groups.append(len({name.split("/")[0] for name in reply.content if name != bundle.INDEX}))
            contents: list[Any] = bundle.unpack(reply.content)
            contents[2]["arrays"]["scales"] = Array(np.full(2, np.inf, "f4"))
            reply.content = bundle.pack(contents)

    groups: list[int] = []
    run = play(tmp_path, spoil, rounds=3, upload="delta", compression="int8")
    assert groups == [1, 1, 1] and [row["clients"] for row in run.rounds] == [3, 3, 3]
