"""The guard in front of the aggregation lets nothing through that would spoil it, and strategies keep their state."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from federation.app.checkpoint import load_checkpoint, save_checkpoint
from federation.app.config import validate
from federation.app.replies import check_reply
from federation.app.strategy import make_strategy, strategy_state
from federation.app.weights import encoded, restore_dtypes, sha256

pytestmark = pytest.mark.usefixtures("in_a_run")
Weights = dict[str, NDArray[Any]]
Change = Callable[[RecordDict], object]

TRAIN, EVALUATE = MessageType.TRAIN, MessageType.EVALUATE
SAMPLES = {"train": 20, "test": 12}
MODEL: Weights = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.ones(2, "bfloat16"), "steps": np.array(7),
}  # fmt: skip


def record(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: encoded(values) for name, values in weights.items()})


def exchange(kind: str, weights: Weights = MODEL, counted: int | None = None) -> tuple[Message, Message]:
    """Return a question and a good reply to it."""
    question = Message(RecordDict({"arrays": record(weights), "config": ConfigRecord()}), 1, kind)
    own = {"train-loss": 0.5} if kind == TRAIN else {"loss": 0.5, "accuracy": 0.25}
    counted = SAMPLES["train" if kind == TRAIN else "test"] if counted is None else counted
    metrics = MetricRecord({"num-examples": counted, "seconds": 0.1} | own)
    content = ({"arrays": record(weights)} if kind == TRAIN else {}) | {"metrics": metrics}
    return question, Message(RecordDict(content), reply_to=question)


def check_refused(question: Message, reply: Message, *named: str, exactly: bool = True) -> None:
    """Check that a reply is refused in one line, which names what is wrong with it."""
    with pytest.raises(ValueError) as error:
        check_reply(question, reply, SAMPLES, exactly)
    said = str(error.value)
    assert type(error.value) is ValueError and len(said.splitlines()) == 1 and len(said) <= 300, said
    assert all(text in said for text in named), said


def put(name: str, value: Any) -> Change:
    """Return a change of one number to whatever `value` is, past the checks that Flower makes where it is set."""
    return lambda content: content.metric_records["metrics"].__dict__["_data"].update({name: value})


def array(name: str, **changed: Any) -> Change:
    """Return a change of what an array says of itself, or of the bytes that it holds."""
    return lambda content: vars(content.array_records["arrays"][name]).update(changed)


def bytes_of(values: NDArray[Any]) -> bytes:
    np.save(file := io.BytesIO(), values, allow_pickle=True)
    return file.getvalue()


def archive(**values: NDArray[Any]) -> bytes:
    np.savez(file := io.BytesIO(), **values)
    return file.getvalue()


class Bomb:
    """An object that shows that it has been unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


# ------------------------------------------------------------------------------------------------------ good replies


@given(
    st.dictionaries(
        st.text(), arrays(st.sampled_from(["f2", "f4", "f8", "i8", "u1", "?"]), array_shapes(min_dims=0, min_side=0))
    ),
    st.integers(1, 10**9),
)
@settings(deadline=None)
def test_a_good_reply_of_any_shape_passes(weights: Weights, counted: int) -> None:
    finite = {name: np.asarray(np.nan_to_num(values)) for name, values in weights.items()}
    for kind in (TRAIN, EVALUATE):
        check_reply(*exchange(kind, finite, counted), {"train": counted, "test": counted}, exactly=True)


def test_arrays_of_every_layout_and_whole_losses_pass() -> None:
    question, reply = exchange(TRAIN)
    reply.content.array_records["arrays"]["w"] = Array(np.asfortranarray(MODEL["w"]))
    put("train-loss", 0)(reply.content)
    check_reply(question, reply, SAMPLES, exactly=True)


@pytest.mark.parametrize(("kind", "most"), [(TRAIN, 200), (EVALUATE, 120)])
def test_data_of_its_own_may_have_changed_in_number_but_not_beyond_reason(kind: str, most: int) -> None:
    for counted in (1, 5, most):
        check_reply(*exchange(kind, counted=counted), SAMPLES, exactly=False)
        check_refused(*exchange(kind, counted=counted), f"num-examples={counted}")
    for counted in (0, -1, most + 1, 10**18):
        check_refused(*exchange(kind, counted=counted), f"num-examples={counted}", exactly=False)


# ------------------------------------------------------------------------------------------------------- bad replies


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
@pytest.mark.parametrize(
    ("said", "expected"),
    [("out of\nmemory", "out of memory"), ("", "''"), ("x" * 5000, "xxx")],
    ids=["lines", "empty", "long"],
)
def test_an_error_is_the_reason(kind: str, said: str, expected: str) -> None:
    question, _ = exchange(kind)
    check_refused(question, Message(Error(1, said), reply_to=question), expected)


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.pop("metrics"), "records"),
        (lambda content: content.clear(), "records []"),
        (lambda content: content.update({"more": ArrayRecord()}), "'more'"),
        (lambda content: content.update({"a\nb": ConfigRecord()}), r"'a\nb'"),
        (lambda content: content.update({"metrics": ConfigRecord({"num-examples": 20})}), "it reports no "),
        (lambda content: content.update({"metrics": MetricRecord()}), "it reports no "),
        (lambda content: content["metrics"].pop("num-examples"), "it reports no num-examples"),
        (lambda content: content["metrics"].pop("seconds"), "it reports no seconds"),
        (put("a\nb", 1.0), r"it reports a metric called 'a\nb'"),
        *((put("num-examples", value), f"num-examples={value}") for value in (0, -1, 19, 20.0, 10**18)),
        *((put("num-examples", value), f"num-examples is {value}") for value in (float("nan"), True, "20", [20], None)),
        *((put("seconds", value), f"seconds is {value}") for value in (float("nan"), float("inf"), -float("inf"), [1])),
        (put("seconds", list(range(10**4))), "seconds is [0, 1"),
    ],
)  # fmt: skip
def test_a_reply_with_other_records_or_numbers_is_refused(kind: str, change: Change, named: str) -> None:
    question, reply = exchange(kind)
    change(reply.content)
    check_refused(question, reply, named)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(TRAIN, "train-loss", value) for value in (float("nan"), float("inf"), True, "0.5", [0.5], None)]
    + [(EVALUATE, "loss", value) for value in (float("nan"), -float("inf"), False, "0.5", [0.5], None)]
    + [(EVALUATE, "accuracy", value) for value in (float("nan"), -0.01, 1.01, 2, -1, True, "1", [1.0])],
)
def test_a_loss_or_an_accuracy_that_cannot_be_is_refused(kind: str, name: str, value: Any) -> None:
    question, reply = exchange(kind)
    put(name, value)(reply.content)
    check_refused(question, reply, f"{name} is {value}")
    reply.content.metric_records["metrics"].pop(name)
    if name != "accuracy":  # which a task need not have
        check_refused(question, reply, f"it reports no {name}")


def test_a_model_in_a_test_or_the_numbers_of_another_question_are_refused() -> None:
    (training, trained), (testing, tested) = exchange(TRAIN), exchange(EVALUATE)
    check_refused(testing, trained, "['arrays', 'metrics'], not ['metrics']")
    check_refused(training, tested, "['metrics'], not ['arrays', 'metrics']")
    tested.content["arrays"] = record(MODEL)
    check_refused(training, tested, "it reports no train-loss")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.update({"arrays": ConfigRecord()}), "w does not match"),
        (lambda content: content.update({"arrays": ArrayRecord()}), "received no such entry"),
        (lambda content: content["arrays"].pop("half"), "half does not match"),
        (lambda content: content["arrays"].update({"a\nb": Array(np.ones(2))}), "a b does not match"),
        (lambda content: content["arrays"].update({"w": content["arrays"].pop("w")}), "order ['half', 'steps', 'w']"),
        (lambda content: content["arrays"].update({"w": Array(MODEL["w"].T.copy())}), "w does not match"),
        (lambda content: content["arrays"].update({"w": Array(MODEL["w"].astype("f8"))}), "float64"),
        (lambda content: content["arrays"].update({"half": Array(np.ones(2, "f4"))}), "half does not match"),
        *((array("w", data=bytes_of(np.full((2, 3), value, "f4"))), "w is not finite: 6 of 6 values")
          for value in (np.nan, np.inf, -np.inf)),
        (array("half", data=bytes_of(np.array([1, np.nan], "f4"))), "half is not finite: 1 of 2 values"),
        (array("w", dtype="float64"), "w does not match"),
        (array("w", dtype="a\nb"), "w does not match: received a b of"),
        (array("w", shape=(3, 2)), "w does not match"),
        (array("w", data=bytes_of(np.ones((3, 2), "f4"))), "w holds float32 of shape (3, 2)"),
        (array("w", data=bytes_of(np.ones((2, 3), ">f4"))), "w holds >f4"),
        (array("w", data=bytes_of(np.ones((2, 3), "f8"))), "w holds float64"),
        (array("steps", data=bytes_of(np.array("7"))), "steps holds <U1"),
        (array("w", data=bytes_of(np.ones((2, 3), [("a\nb", "f4")]))), "w holds "),
        (array("w", data=bytes_of(MODEL["w"])[:-1]), "w cannot be read"),
        (array("w", data=bytes_of(MODEL["w"])[:50]), "w cannot be read"),
        (array("w", data=b""), "w cannot be read"),
        (array("w", data=b"\x80\4N."), "w cannot be read"),
        (array("w", data=bytes_of(np.array([Bomb()], object))), "w cannot be read"),
        (array("w", data=bytes_of(np.ones(2, "f4")).replace(b"(2,)", b"(2000000000000000,)")), "w cannot be read"),
        (array("w", data=archive(w=MODEL["w"])), "w cannot be read"),
        (array("w", stype="pickle"), "w cannot be read"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_averaged_is_refused(change: Change, named: str) -> None:
    question, reply = exchange(TRAIN)
    change(reply.content)
    check_refused(question, reply, named)


# -------------------------------------------------------------------------------------------------------- strategies


class Nodes(Grid):
    """A Grid of which a strategy asks for no more than who is there."""

    def get_node_ids(self) -> list[int]:
        return [1, 2]

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    push_messages = pull_messages = send_and_receive = set_run = create_message
    run = property(create_message)


def aggregate(strategy: Any, server_round: int, model: ArrayRecord, parts: list[tuple[Weights, int]]) -> ArrayRecord:
    """Let `strategy` make the next global model of what two clients return."""
    strategy.configure_train(server_round, model, ConfigRecord(), Nodes())
    replies = [exchange(TRAIN, weights, counted)[1] for weights, counted in parts]
    mean, _ = strategy.aggregate_train(server_round, replies)
    return restore_dtypes(model, mean)


def drawn(seed: int) -> list[tuple[Weights, int]]:
    """Return the models of two clients, with their numbers of samples."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (), "none": (0, 2)}
    return [({n: random.normal(size=s).astype("f4") for n, s in shapes.items()}, counted) for counted in (3, 17)]


ADAM = {"strategy": "fedadam", "strategy-arguments": "eta=0.05 beta_1=0.8 beta_2=0.95 tau=0.01"}


def test_fedadam_is_flowers_formula() -> None:
    strategy, model = make_strategy(validate(ADAM), {}), record(drawn(0)[0][0])
    expected = {name: values.numpy().astype("f8") for name, values in model.items()}
    m, v = ({name: np.zeros_like(values) for name, values in expected.items()} for _ in range(2))
    for t in (1, 2, 3):
        parts = drawn(t)
        model = aggregate(strategy, t, model, parts)
        for name, x in expected.items():
            delta = sum(weights[name] * (counted / 20) for weights, counted in parts) - x
            m[name] = 0.8 * m[name] + (1 - 0.8) * delta
            v[name] = 0.95 * v[name] + (1 - 0.95) * delta**2
            eta = 0.05 * np.sqrt(1 - 0.95 ** (t + 1)) / (1 - 0.8 ** (t + 1))
            expected[name] = x + eta * m[name] / (np.sqrt(v[name]) + 0.01)
        assert {name: values.dtype for name, values in model.items()} == dict.fromkeys(expected, "float32")
        for name, x in expected.items():
            np.testing.assert_allclose(model[name].numpy(), x, rtol=2e-5, atol=1e-6)


def test_fedadam_goes_on_from_its_saved_state_to_the_bit(tmp_path: Path) -> None:
    strategy, model = make_strategy(validate(ADAM), {}), record(drawn(0)[0][0])
    for t in (1, 2):
        model = aggregate(strategy, t, model, drawn(t))
    save_checkpoint({"rounds": [0, 1, 2]}, {"arrays": model, **strategy_state(strategy)}, tmp_path)
    _, state = load_checkpoint(tmp_path)
    assert list(state) == ["arrays", "m_t", "v_t"] and sha256(state["arrays"]) == sha256(model)
    config = validate(ADAM)
    restored, forgetful = make_strategy(config, dict(list(state.items())[1:])), make_strategy(config, {})
    on, again, anew = (aggregate(s, 3, model, drawn(3)) for s in (strategy, restored, forgetful))
    assert sha256(again) == sha256(on) != sha256(anew)
    for name, held in strategy_state(strategy).items():
        assert sha256(strategy_state(restored)[name]) == sha256(held)


def test_fedavg_has_no_state_and_is_the_weighted_mean() -> None:
    strategy, parts = make_strategy(validate({}), {}), drawn(1)
    model = aggregate(strategy, 1, record(drawn(0)[0][0]), parts)
    for name, values in model.items():
        np.testing.assert_allclose(values.numpy(), sum(w[name] * (n / 20) for w, n in parts), rtol=1e-5)
    assert strategy_state(strategy) == {} == strategy_state(make_strategy(validate(ADAM), {}))
