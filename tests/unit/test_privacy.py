"""Differential privacy: what is clipped, which noise is added, what it spends, and that a resume changes none of it."""

import json
import logging
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as some_arrays
from numpy.typing import NDArray

from federation.app import client_privacy
from federation.app.client_privacy import Ledger, local_mod
from federation.app.config import SettingError, validate
from federation.app.noise import KEY_SIZE, check_entries, gaussian_deviation, moved, secret_noise
from federation.app.privacy import CLIP_RATE, Adaptive, Private
from federation.app.report import Report
from federation.app.strategy import aggregate_train, make_strategy, strategy_state
from federation.launch.prepare import check_federated
from tests.in_memory import InMemoryGrid
from tests.tasks import TINY

pytestmark = pytest.mark.usefixtures("in_a_run")
central = pytest.mark.skipif(not find_spec("dp_accounting"), reason="needs dp-accounting: pip install '.[dp]'")
CENTRAL = ("server-fixed", "client-fixed", "server-adaptive", "client-adaptive")
PLAIN = {"num-clients": 4, "dp-clipping-norm": 1.0, "dp-noise-multiplier": 1.0}


class Nodes:
    """A Grid that only says who is there."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.count + 1))


def record(**values: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value, np.float32)) for name, value in values.items()})


def private(dp: str, state: dict[str, ArrayRecord] | None = None, **changed: Any) -> Any:
    changed = {key.replace("_", "-"): value for key, value in changed.items()}
    return make_strategy(validate(PLAIN | changed | {"dp": dp}), state or {})


def play(strategy: Any, server_round: int, before: ArrayRecord, updates: Any, counts: Any = None) -> NDArray[Any]:
    """Play a round in which each client sends the model, changed by one of `updates`. Return the change of the mean."""
    model = before["w"].numpy()
    questions = [*strategy.configure_train(server_round, before, ConfigRecord(), Nodes(strategy.asked))]
    replies = [reply(*pair) for pair in zip(questions, model + np.asarray(updates, np.float32), strict=True)]
    for message, count in zip(replies, counts or (), strict=False):
        message.content.metric_records["metrics"]["num-examples"] = count
    if strategy.config.dp.startswith("client"):
        replies = [clipped(strategy, *pair) for pair in zip(questions, replies, strict=True)]
    after, _ = aggregate_train(strategy, server_round, replies, before)
    return after["w"].numpy() - model


def reply(question: Message, model: NDArray[Any]) -> Message:
    metrics = MetricRecord({"num-examples": 10, "train-loss": 1.0, "seconds": 0.1})
    return Message(RecordDict({"arrays": record(w=model), "metrics": metrics}), reply_to=question)


def clipped(strategy: Any, question: Message, answer: Message) -> Message:
    """Return what the client's side makes of a reply."""
    context = Context(1, 1, {}, RecordDict(), strategy.config.values())
    return client_privacy.protect(question, context, lambda *_: answer)


# --------------------------------------------------------------------------------------------------------- accounting


@central
@pytest.mark.parametrize(("multiplier", "rounds", "delta"), [(1.0, 3, 1e-5), (4.0, 20, 1e-6), (0.5, 1, 1e-3)])
def test_epsilon_is_what_dp_accounting_says(multiplier: float, rounds: int, delta: float) -> None:
    from dp_accounting import dp_event, rdp

    strategy = private("server-fixed", dp_noise_multiplier=multiplier, dp_delta=delta)
    for server_round in range(1, rounds + 1):
        play(strategy, server_round, record(w=np.zeros(3)), np.ones((4, 3)))
    theirs = rdp.RdpAccountant()  # of all its orders, and for neighbours of which one has a client more
    theirs.compose(dp_event.GaussianDpEvent(multiplier), rounds)
    assert strategy.spent()["epsilon"] == pytest.approx(theirs.get_epsilon(delta), rel=1e-9)
    theirs.compose(dp_event.GaussianDpEvent(multiplier))
    assert strategy.spent()["epsilon_next"] == pytest.approx(theirs.get_epsilon(delta), rel=1e-9)


@central
def test_an_adaptive_round_spends_what_its_two_parts_do() -> None:
    from dp_accounting import dp_event, rdp

    strategy = private("server-adaptive", num_clients=8, dp_noise_multiplier=0.7)
    theirs = rdp.RdpAccountant()
    for server_round in range(1, 6):
        least, before, norm = strategy.least_multiplier(), strategy.spent()["epsilon_next"], strategy.clipping_norm
        play(strategy, server_round, record(w=np.zeros(3)), np.eye(8, 3) * 5)
        ratio = strategy.clipping_norm / norm
        assert ratio != 1 and least < strategy.multiplier(ratio)
        theirs.compose(dp_event.GaussianDpEvent(strategy.wrapper.noise_multiplier * ratio))  # the mean
        theirs.compose(dp_event.GaussianDpEvent(strategy.wrapper.clipped_count_stddev))  # the count
        assert strategy.spent()["epsilon"] == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
        assert strategy.spent()["epsilon"] < before


@central
@given(st.integers(1, 3000), st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_the_noise_multiplier_is_that_of_an_adaptive_round_whose_norm_stays(asked: int, multiplier: float) -> None:
    strategy = private("server-adaptive", num_clients=asked, dp_noise_multiplier=multiplier)
    assert strategy.multiplier(1.0) == pytest.approx(multiplier)
    assert strategy.least_multiplier() < multiplier
    wrapper = strategy.wrapped()  # Flower's, whose own arithmetic must come to the same noise
    assert wrapper.noise_multiplier == pytest.approx(strategy.mean_multiplier)
    assert wrapper.clipped_count_stddev == strategy.count_deviation >= asked / 20


@central
@pytest.mark.parametrize("dp", CENTRAL)
def test_the_first_round_must_not_spend_too_much(dp: str) -> None:
    first = private(dp).epsilon_next()
    assert first == pytest.approx(4.7285, abs=1e-3) if "fixed" in dp else 4.8 < first < 10
    with pytest.raises(SettingError, match=rf"dp-target-epsilon=4 .*first round can.* epsilon {first:.4g}"):
        make_strategy(validate(PLAIN | {"dp": dp, "dp-target-epsilon": 4.0}), {})
    make_strategy(validate(PLAIN | {"dp": dp, "dp-target-epsilon": first + 0.01}), {})


@central
def test_a_model_that_would_exceed_the_target_is_dropped() -> None:
    strategy = private("server-adaptive", dp_target_epsilon=11.0)
    list(strategy.configure_train(1, record(w=[0.0]), ConfigRecord(), Nodes(4)))
    strategy.wrapper.clipping_norm = strategy.clipping_norm / 4  # as after noise of a hundred standard deviations
    with pytest.raises(RuntimeError, match=r"round 1: .*dp-target-epsilon=11 would be exceeded"):
        strategy.account(1)
    assert strategy.spent()["epsilon"] == 0


@central
def test_without_the_package_one_line_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(SettingError, match=r"^dp=server-fixed needs .*pip install '\.\[dp\]'$"):
        make_strategy(validate(PLAIN | {"dp": "server-fixed"}), {})


# ------------------------------------------------------------------------------------------------- clipping, the mean


@central
@pytest.mark.parametrize("dp", CENTRAL[:2])
def test_all_clients_weigh_the_same_and_metrics_do_not(dp: str) -> None:
    strategy = private(dp, dp_noise_multiplier=0.001)
    before = record(w=[0.0, 0.0])
    change = play(strategy, 1, before, [[0.6, 0], [0, 0.6], [0.0, 30], [0, -0.2]], counts=[1, 1000, 5, 5])
    assert np.allclose(change, [0.15, 0.35], atol=0.002)  # the third is clipped to 1
    questions = [*strategy.configure_train(2, before, ConfigRecord(), Nodes(4))]
    replies = [reply(question, np.ones(2)) for question in questions]
    for answer, count, loss in zip(replies, (1, 97, 1, 1), (9.0, 1.0, 1.0, 1.0), strict=True):
        answer.content.metric_records["metrics"].update({"num-examples": count, "train-loss": loss})
    if dp == "client-fixed":
        replies = [clipped(strategy, *pair) for pair in zip(questions, replies, strict=True)]
    _, results = aggregate_train(strategy, 2, replies, before)
    assert results["train_loss"] == pytest.approx(1.08) and results["trained"]["samples"] == [1, 97, 1, 1]


@central
@given(some_arrays(np.float32, (2, 3), elements=st.floats(-1e6, 1e6, width=32)), st.sampled_from(CENTRAL))
@settings(deadline=None, max_examples=60)
def test_no_client_moves_the_mean_by_more_than_the_norm(updates: NDArray[Any], dp: str) -> None:
    strategy = private(dp, num_clients=2, dp_noise_multiplier=0.001, dp_clipping_norm=0.5)
    change = play(strategy, 1, record(w=np.zeros(3)), updates)
    lengths = np.linalg.norm(updates.astype(float), axis=1, keepdims=True)
    expected = (updates * np.minimum(1, 0.5 / np.maximum(lengths, 1e-30))).mean(0)
    assert np.linalg.norm(change - expected) < 0.02  # the noise has a standard deviation below 0.001


@given(some_arrays(np.float32, 5, elements=st.floats(-(2.0**60), 2.0**60, width=32)), st.booleans())
@settings(deadline=None)
def test_a_model_that_has_not_moved_can_be_clipped(values: NDArray[Any], tiny: bool) -> None:
    before = record(w=values, v=np.zeros((2, 2)))
    after = record(w=values, v=np.full((2, 2), 1e-30 if tiny else 0.0))  # too short for Flower, too
    changes = [moved(after, before)[name].numpy() - before[name].numpy() for name in "wv"]
    length = np.sqrt(sum(np.linalg.norm(change) ** 2 for change in changes))
    assert 0 < length <= 1e-6 * max(1, float(np.abs(values).max()))
    assert moved(record(w=values + 1, v=np.ones((2, 2))), before)["v"].numpy().all()


@pytest.mark.parametrize("value", [np.array([3]), np.array(3.0, np.float32), np.ones(2, np.float16), np.array(2)])
def test_entries_that_flower_cannot_clip_are_refused(value: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"dp cannot clip count, .*personal='count' keeps it"):
        check_entries(ArrayRecord({"w": Array(np.ones(2)), "count": Array(value)}))
    net = {"w": np.ones(2), "count": value}
    with pytest.raises(SettingError, match=r"dp cannot clip count"):  # before anything starts
        check_federated(validate({"dp": "local"}), net)
    check_federated(validate({"dp": "local", "personal": "count"}), net)


@central
def test_a_round_with_another_number_of_models_is_no_round() -> None:
    for dp in CENTRAL:
        strategy, before = private(dp), record(w=[0.0])
        questions = [*strategy.configure_train(1, before, ConfigRecord(), Nodes(9))]
        assert len(questions) == 4  # whoever else is there
        with pytest.raises(RuntimeError, match="round 1: 3 models, but the noise is meant for 4"):
            aggregate_train(strategy, 1, [reply(question, np.ones(1)) for question in questions[1:]], before)
        assert strategy.spent()["epsilon"] == 0
        assert play(strategy, 1, before, np.ones((4, 1))).shape == (1,)  # and the round can be tried again


@central
@pytest.mark.parametrize(("dp", "quantile", "start"), [
    ("server-adaptive", 0.5, 2.0), ("server-adaptive", 0.2, 5.0), ("client-adaptive", 0.8, 1.3),
])  # fmt: skip
def test_the_adaptive_norm_goes_to_the_quantile_that_is_wanted(dp: str, quantile: float, start: float) -> None:
    lengths = np.linspace(1, 5, 25)
    strategy = private(dp, num_clients=25, dp_noise_multiplier=0.01, dp_clipped_quantile=quantile)
    strategy.clipping_norm = start  # Flower's own sign would take it away from there
    strategy.key = bytes(KEY_SIZE)  # not a secret one, so that the noise is the same in each run of this test
    for server_round in range(1, 51):
        play(strategy, server_round, record(w=[0.0, 0.0]), np.stack([lengths, 0 * lengths], axis=1))
    assert strategy.clipping_norm == pytest.approx(np.quantile(lengths, 1 - quantile), rel=0.1)


# -------------------------------------------------------------------------------------------------------------- noise


@central
@pytest.mark.parametrize("dp", CENTRAL)
def test_noise_has_the_deviation_that_is_accounted_for(dp: str) -> None:
    strategy = private(dp, num_clients=2, dp_noise_multiplier=3.0, dp_clipping_norm=0.5)
    change = play(strategy, 1, record(w=np.zeros(40_000)), np.zeros((2, 40_000)))
    multiplier = strategy.mean_multiplier if isinstance(strategy, Adaptive) else 3.0
    assert change.std() == pytest.approx(multiplier * strategy.clipping_norm / 2, rel=0.02)
    assert abs(change.mean()) < 6 * change.std() / 200


@given(st.binary(min_size=KEY_SIZE, max_size=KEY_SIZE), st.integers(1, 10**6), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_noise_depends_on_key_round_and_models_alone(key: bytes, server_round: int, seed: int) -> None:
    def drawn(key: bytes, server_round: int, value: float) -> list[float]:
        with secret_noise(key, server_round, [record(w=[value]), record(w=[2.0])]):
            return [float(value) for value in np.random.normal(size=3)]

    np.random.seed(seed)
    first = drawn(key, server_round, 1.0)
    after = np.random.normal()
    np.random.seed(seed)
    assert np.random.normal() == after  # whoever draws from the generator next knows nothing of the key
    assert first == drawn(key, server_round, 1.0)
    other = bytes([key[0] ^ 1]) + key[1:]
    assert first not in (
        drawn(other, server_round, 1.0),
        drawn(key, server_round + 1, 1.0),
        drawn(key, server_round, 3.0),
    )


@given(st.floats(0.001, 60), st.floats(1e-12, 0.4))
@settings(deadline=None)
def test_noise_for_an_epsilon_is_enough(epsilon: float, delta: float) -> None:
    deviation = gaussian_deviation(epsilon, delta)
    assert spent_delta(deviation, epsilon) <= delta * (1 + 1e-6)


def spent_delta(deviation: float, epsilon: float) -> float:
    """Return the delta of noise of the deviation, in sensitivities (Balle and Wang 2018, theorem 8)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    shift, half = epsilon * deviation, 1 / (2 * deviation)
    return phi(half - shift) - math.exp(epsilon) * phi(-half - shift)


def test_the_formula_of_flowers_mod_is_too_small_for_a_large_epsilon() -> None:
    classic = math.sqrt(2 * math.log(1.25 / 1e-5))
    assert spent_delta(classic / 0.9, 0.9) < 1e-5 < 2e-5 < spent_delta(classic / 10, 10)
    assert gaussian_deviation(10, 1e-5) == pytest.approx(0.5222, abs=1e-4) and classic / 10 < 0.485


# --------------------------------------------------------------------------------------------------------- the client


def local_reply(folder: Path, position: int = 0, server_round: int = 1, **changed: Any) -> tuple[NDArray[Any], Message]:
    """Return what a client with dp=local changes of zeros, when its training makes ones of them, and what it got."""
    config = {"dp": "local", "dp-epsilon": 10.0, "dp-clipping-norm": 0.5} | changed
    context = Context(1, 1, {"state": str(folder)}, RecordDict(), validate(config).values())
    content = {
        "arrays": record(w=np.zeros(20_000)), "personal": record(own=[1.0]), "rows": record(mask=[1.0]),
        "config": ConfigRecord({"server-round": server_round}), "server": ConfigRecord({"run": "ab12"}),
        "client": ConfigRecord({"position": position, "kept": 0}),
    }  # fmt: skip
    question = Message(RecordDict(content), 1, MessageType.TRAIN)
    seen: list[Message] = []

    def handler(message: Message, context: Context) -> Message:
        seen.append(Message(RecordDict(dict(message.content)), 1, MessageType.TRAIN))
        np.random.seed(0)  # as training does, whose seed the server knows
        return reply(message, np.ones(20_000))

    noisy = client_privacy.protect(question, context, handler)
    assert list(question.content) == list(content) == list(seen[0].content)
    return noisy.content.array_records["arrays"]["w"].numpy(), noisy


def test_a_local_reply_is_clipped_and_its_noise_is_secret(tmp_path: Path) -> None:
    first, message = local_reply(tmp_path)
    shift, deviation = 0.5 / math.sqrt(20_000), 2 * 0.5 * gaussian_deviation(10.0, 1e-5)
    assert first.mean() == pytest.approx(shift, abs=6 * deviation / math.sqrt(20_000))
    assert first.std() == pytest.approx(deviation, rel=0.03)
    assert set(message.content) == {"arrays", "metrics"}
    np.random.seed(0)
    known = np.random.normal(0, deviation, 20_000)  # what whoever knows the seed of training can draw
    assert abs(np.corrcoef(first, known)[0, 1]) < 0.04
    assert np.array_equal(first, local_reply(tmp_path)[0])  # the same question again: nothing new is given away
    for other in (local_reply(tmp_path, 1), local_reply(tmp_path, server_round=2), local_reply(tmp_path / "other")):
        assert abs(np.corrcoef(first - shift, other[0] - shift)[0, 1]) < 0.04


def test_a_client_counts_the_rounds_that_it_has_replied_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for server_round in (1, 2, 2, 5):
        local_reply(tmp_path, server_round=server_round)
    assert "round 5: spent so far: epsilon 30, delta 3e-05" in capsys.readouterr().out
    (path,) = (tmp_path / "ab12").iterdir()
    assert path.name == "client-0-privacy.json" and json.loads(path.read_text())["rounds"] == [1, 2, 5]
    assert sys.platform == "win32" or path.stat().st_mode & 0o077 == 0
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"client-0-privacy\.json is damaged; begin a new run"):
        Ledger(path)


@pytest.mark.parametrize("dp", ["none", "client-fixed", "client-adaptive", "local"])
def test_errors_and_evaluations_pass_a_client_unchanged(dp: str, tmp_path: Path) -> None:
    context = Context(1, 1, {"state": str(tmp_path)}, RecordDict(), validate({"dp": dp}).values())
    for kind in (MessageType.EVALUATE, MessageType.TRAIN):
        question = Message(RecordDict({"arrays": record(w=[0.0])}), 1, kind)
        error = Message(Error(1, "no"), reply_to=question)
        assert client_privacy.protect(question, context, lambda *_, error=error: error) is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 1000.0])
def test_flowers_local_mod_gets_the_sensitivity_of_two_clipped_models(epsilon: float) -> None:
    mod = local_mod(validate({"dp": "local", "dp-epsilon": epsilon, "dp-clipping-norm": 3.0}))
    deviation = mod.sensitivity * math.sqrt(2 * math.log(1.25 / mod.delta)) / mod.epsilon
    assert (mod.clipping_norm, mod.sensitivity) == (3.0, 6.0)
    assert deviation == pytest.approx(6.0 * gaussian_deviation(epsilon, 1e-5))


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(autouse=True, scope="module")
def _task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("task")
    (folder / "tiny_private.py").write_text(TINY)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    sys.path.insert(0, str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "draw", lambda self: None)  # it takes longer than all rounds
        yield
    sys.path.remove(str(folder))
    sys.modules.pop("tiny_private", None)
    logging.getLogger("flwr").setLevel(logging.INFO)


def run(out: Path, dp: str, rounds: int = 3, tamper: Any = id, **changed: Any) -> dict[str, Any]:
    """Train the tiny task, and return metrics.json."""
    import server

    changed = {key.replace("_", "-"): value for key, value in changed.items()}
    config = {"task": "tiny_private", "out": str(out), "num-server-rounds": rounds, "dp": dp} | PLAIN | changed
    grid = InMemoryGrid(config, {1: {"partition-id": 0, "num-partitions": 1}}, tamper=tamper)
    server.main(grid, Context(1, 0, {}, RecordDict(), config))
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("dp", [*(pytest.param(dp, marks=central) for dp in CENTRAL), "local"])
def test_a_resumed_run_draws_and_spends_the_same_and_another_does_not(dp: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "a", dp)
    spent = [row["epsilon"] for row in whole["rounds"]]
    assert spent[0] is None and 0 < spent[1] < spent[2] < spent[3]
    (tmp_path / "a" / "checkpoint-3.npz").unlink()
    resumed = run(tmp_path / "a", dp, resume=True)
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]
    assert [row["epsilon"] for row in resumed["rounds"]] == spent
    assert "norm_bit" not in json.dumps(resumed)  # how many were clipped, without noise
    if dp in ("server-fixed", "local"):
        assert run(tmp_path / "b", dp)["final_weights_sha256"] != whole["final_weights_sha256"]
    if dp == "local":
        assert spent[1:] == [10, 20, 30] and whole["rounds"][2]["trained"]["epsilon"] == [20] * 4


@central
def test_a_first_round_that_is_played_again_makes_the_same_model(tmp_path: Path) -> None:
    whole = run(tmp_path, "server-fixed", rounds=1)
    (tmp_path / "checkpoint-1.npz").unlink()  # as if killed when clients had seen the model, and it was not saved yet
    assert run(tmp_path, "server-fixed", rounds=1, resume=True)["final_weights_sha256"] == whole["final_weights_sha256"]
    (tmp_path / "checkpoint-1.npz").unlink()
    with pytest.raises(SettingError, match=r"dp-target-epsilon=2 is less than the first round"):
        run(tmp_path, "server-fixed", rounds=1, resume=True, dp_target_epsilon=2.0)


@central
def test_the_run_ends_before_its_epsilon_is_exceeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = run(tmp_path, "server-fixed", rounds=9, dp_target_epsilon=8.0)
    assert ended["status"] == "finished" and len(ended["rounds"]) == 3 and (tmp_path / "final_model.pt").exists()
    last = ended["rounds"][-1]
    assert last["epsilon"] < 8 < last["epsilon_next"]
    line = f"ended after round 2: another one could spend epsilon {last['epsilon_next']:.4g} (dp-target-epsilon=8)"
    said = capsys.readouterr().out
    assert line in said and f"{last['epsilon']:.3f}" in said
    assert len(run(tmp_path, "server-fixed", rounds=9, dp_target_epsilon=10.0, resume=True)["rounds"]) == 4


@central
def test_a_client_that_fails_repeats_the_round_and_spends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tamper(message: Message) -> None:
        """Spoil one model of the first reply to train."""
        if "0/stacked/arrays" in message.content and not spoilt:
            arrays = message.content.array_records["0/stacked/arrays"]
            array = arrays["bias"]
            arrays["bias"] = Array(array.dtype, array.shape, array.stype, array.data[:-40] + b"\xff" * 40)
            spoilt.append(True)

    spoilt: list[bool] = []
    found = run(tmp_path / "a", "server-fixed", rounds=1, tamper=tamper)
    assert "3 of 4 models are good, 4 needed" in capsys.readouterr().out
    assert found["rounds"][1]["clients"] == 4 and found["rounds"][1]["dropped"] == 1
    assert found["rounds"][1]["epsilon"] == pytest.approx(4.7285, abs=1e-3)
    with pytest.raises(RuntimeError, match="too few good models"):
        spoilt.clear()
        run(tmp_path / "b", "server-fixed", rounds=1, tamper=tamper, retries=0)


@central
def test_the_state_is_saved_together_with_that_of_the_strategy() -> None:
    strategy = private("server-adaptive", strategy="fedprox")
    play(strategy, 1, record(w=[0.0]), np.ones((4, 1)))
    again = private("server-adaptive", strategy_state(strategy), strategy="fedprox")
    assert isinstance(again, Private) and again.key == strategy.key and again.spent() == strategy.spent()
    assert again.clipping_norm == strategy.clipping_norm != 1
    assert type(again.strategy) is type(strategy.strategy) and CLIP_RATE > 0
    changes = [play(one, 2, record(w=[0.0]), np.ones((4, 1))) for one in (again, strategy)]
    assert np.array_equal(*changes)
