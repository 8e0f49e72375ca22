"""Each strategy makes what its paper says, and is refused where it cannot; hooks are the losses that they stand for."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from federation.app.client_state import KEPT, ClientState, check_kept
from federation.app.config import SettingError, validate
from federation.app.corrections import ControlVariates, proximal
from federation.app.strategy import (
    STRATEGIES,
    aggregate_train,
    check_strategy,
    least_models,
    make_strategy,
    strategy_state,
)
from federation.app.weights import encoded, from_net, sha256, split
from federation.launch.prepare import check_federated

pytestmark = pytest.mark.usefixtures("in_a_run")
Weights = dict[str, NDArray[Any]]
LEAST = {"fedmedian": 3, "fedtrimmedavg": 5, "krum": 5, "multikrum": 5, "bulyan": 7}


class Nodes(Grid):
    """A Grid of which a strategy asks for no more than who is there."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return [*range(self.count)]

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    push_messages = pull_messages = send_and_receive = set_run = create_message
    run = property(create_message)


def record(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: encoded(value) for name, value in weights.items()})


def strategy_of(name: str, clients: int, **config: Any) -> Any:
    return make_strategy(validate({"strategy": name, "num-clients": clients, "learning-rate": 0.1, **config}), {})


def drawn(seed: int, clients: int) -> list[Weights]:
    """Return the models of some clients."""
    random = np.random.default_rng(seed)
    return [
        {"w": random.normal(size=(2, 3)).astype("f4"), "b": np.asarray(random.normal(), "f4")} for _ in range(clients)
    ]


def play(strategy: Any, model: Weights, models: list[Weights], counts: list[int], server_round: int = 1) -> Weights:
    """Return the next global model that a strategy makes of the clients' models; the loss of client i is 1 + i."""
    arrays, clients = record(model), Nodes(len(models))
    questions = list(strategy.configure_train(server_round, arrays, ConfigRecord(), clients))
    replies = []
    for number, (trained, count) in enumerate(zip(models, counts, strict=True)):
        metrics = MetricRecord({"num-examples": count, "train-loss": 1.0 + number, "seconds": 0.1})
        content = RecordDict({"arrays": record(trained), "metrics": metrics})
        replies.append(Message(content, reply_to=questions[number]))
    made, _ = aggregate_train(strategy, server_round, replies, arrays)
    return {name: array.numpy() for name, array in made.items()}


def stacked(models: list[Weights], name: str) -> NDArray[Any]:
    return np.stack([model[name] for model in models])


def flat(model: Weights) -> NDArray[Any]:
    return np.concatenate([value.ravel() for value in model.values()])


# ------------------------------------------------------------------------------------------------------- the formulas


def test_fedavgm_is_momentum_on_the_server() -> None:
    """Hsu et al. 2019, section 4: v = 0.5 v + (x - mean), x = x - 0.7 v."""
    strategy = strategy_of("fedavgm", 2, **{"strategy-arguments": "server_momentum=0.5 server_learning_rate=0.7"})
    model = expected = drawn(0, 1)[0]
    velocity: Weights = {"w": np.zeros((2, 3)), "b": np.zeros(())}
    for t in (1, 2, 3):
        clients = drawn(t, 2)
        model = play(strategy, model, clients, [1, 3], t)
        means = {name: (clients[0][name] + 3 * clients[1][name]) / 4 for name in model}
        velocity = {name: 0.5 * velocity[name] + expected[name] - means[name] for name in model}
        expected = {name: expected[name] - 0.7 * velocity[name] for name in model}
        np.testing.assert_allclose(flat(model), flat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "second"), [("fedadagrad", "sum"), ("fedyogi", "sign")])
def test_adaptive_strategies_differ_by_their_second_moment(name: str, second: str) -> None:
    """Reddi et al. 2021, algorithm 2, first round: v is zero before."""
    strategy, model, clients = strategy_of(name, 2), drawn(0, 1)[0], drawn(1, 2)
    made = play(strategy, model, clients, [1, 1])
    for key, x in model.items():
        delta = stacked(clients, key).mean(0) - x
        eta, beta_1, beta_2, tau = (getattr(strategy, part) for part in ("eta", "beta_1", "beta_2", "tau"))
        v = delta**2 if second == "sum" else (1 - beta_2) * delta**2
        m = (1 - beta_1) * delta
        np.testing.assert_allclose(made[key], x + eta * m / (np.sqrt(v) + tau), rtol=1e-4, atol=1e-5)


def test_qfedavg_is_flowers_formula_with_our_loss_and_rate() -> None:
    """Li et al. 2020 (q-FFL), algorithm 2, with L = 1 / learning-rate."""
    strategy, model, clients = strategy_of("qfedavg", 2, **{"strategy-arguments": "q=2.0"}), drawn(0, 1)[0], drawn(1, 2)
    made, x = play(strategy, model, clients, [1, 1]), flat(model)
    gradients = [10 * (x - flat(client)) for client in clients]
    losses = [1.0, 2.0]
    h = sum(2 * loss * g @ g + 10 * loss**2 for loss, g in zip(losses, gradients, strict=True))
    expected = x - sum(loss**2 * g for loss, g in zip(losses, gradients, strict=True)) / h
    np.testing.assert_allclose(flat(made), expected, rtol=1e-4)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=5)
def test_robust_strategies_choose_as_their_papers_say(seed: int) -> None:
    clients = drawn(seed, 7)
    model, counts = drawn(seed + 1, 1)[0], [1] * 7
    points = np.stack([flat(client) for client in clients])
    made = {name: flat(play(strategy_of(name, 7), model, clients, counts)) for name in LEAST}

    np.testing.assert_allclose(made["fedmedian"], np.median(points, 0), rtol=1e-5)
    np.testing.assert_allclose(made["fedtrimmedavg"], np.sort(points, 0)[1:-1].mean(0), rtol=1e-4, atol=1e-6)
    distances = ((points[:, None] - points) ** 2).sum(2)
    scores = np.sort(distances, 1)[:, 1:5].sum(1)  # the n - f - 2 nearest (Blanchard et al. 2017, section 4)
    best = np.argsort(scores)
    np.testing.assert_allclose(made["krum"], points[best[0]], rtol=1e-5)
    np.testing.assert_allclose(made["multikrum"], points[best[:3]].mean(0), rtol=1e-4, atol=1e-6)
    chosen = points[best[:5]]  # theta = n - 2 f, then the beta = theta - 2 f values nearest to the median
    nearest = np.argsort(np.abs(chosen - np.median(chosen, 0)), 0)[:3]
    bulyan = np.take_along_axis(chosen, nearest, 0).mean(0)
    np.testing.assert_allclose(made["bulyan"], bulyan, rtol=1e-4, atol=1e-6)


def test_a_hostile_model_moves_the_mean_and_none_of_the_robust_strategies() -> None:
    model, clients = drawn(0, 1)[0], drawn(1, 8)
    bad = {name: np.asarray(value + 1e4) for name, value in clients[0].items()}
    assert abs(flat(play(strategy_of("fedavg", 8), model, [bad, *clients[1:]], [1] * 8))).min() > 1000
    for name in LEAST:
        assert abs(flat(play(strategy_of(name, 8), model, [bad, *clients[1:]], [1] * 8))).max() < 5, name


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_too_few_clients_are_refused(name: str, least: int) -> None:
    assert least_models(validate({"strategy": name, "num-clients": least})) == least
    strategy_of(name, least)
    for few in ({"num-clients": least - 1}, {"num-clients": 20, "clients-per-round": least - 1},
                {"num-clients": 2 * least, "fraction-train": 0.5 - 0.5 / least}):  # fmt: skip
        with pytest.raises(SettingError, match=f"^strategy={name} needs {least} clients in a round, and there are"):
            make_strategy(validate({"strategy": name, **few}), {})


@pytest.mark.parametrize("name", STRATEGIES)
def test_parameters_out_of_range_or_unknown_are_refused(name: str) -> None:
    row = STRATEGIES[name]
    for parameter, (low, high) in row.limits.items():
        for value in (low - 1, high + 1, True, "'much'"):
            given = f"{parameter}={str(value).lower()}"
            with pytest.raises(
                SettingError, match=f"^strategy-arguments: {parameter}=.* is out of range: .* is allowed$"
            ):
                strategy_of(name, 50, **{"strategy-arguments": given})
    with pytest.raises(SettingError, match=f"^strategy-arguments: {name} takes no foo; what can be set: "):
        strategy_of(name, 50, **{"strategy-arguments": "foo=1"})


OWN = """
from flwr.serverapp.strategy import FedAvg, FedXgbBagging

class Counting(FedAvg):
    state = ("seen",)

    def __init__(self, step=1, **sampling):
        super().__init__(**sampling)
        self.step = step
        self.seen = None

class NoStrategy:
    pass
"""


def test_a_class_of_ones_own_is_found_by_its_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_strategy.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = validate({"strategy": "own_strategy.Counting", "strategy-arguments": "step=3", "fraction-train": 0.5})
    strategy: Any = make_strategy(config, {})
    assert (strategy.step, strategy.fraction_train, strategy.min_train_nodes, strategy_state(strategy)) == (
        3,
        0.5,
        1,
        {},
    )
    strategy.seen = {"w": np.arange(3)}
    restored: Any = make_strategy(config, strategy_state(strategy))
    assert restored.seen["w"].tolist() == [0, 1, 2]
    strategy.seen = [np.arange(2), np.ones(1)]
    restored = make_strategy(config, strategy_state(strategy))
    assert [one.tolist() for one in restored.seen] == [[0, 1], [1.0]]
    for name, said in {"own_strategy.NoStrategy": "none of: fedavg", "own_strategy.No": "no attri",
                       "no_module.X": "No module named", "fedfoo": "none of: fedavg, fedprox"}.items():  # fmt: skip
        with pytest.raises(SettingError, match=f"^strategy={name!r} .*{said}"):
            make_strategy(validate({"strategy": name}), {})
    with pytest.raises(SettingError, match=r"^strategy=own_strategy\.Counting with 'foo=1': .*foo"):
        make_strategy(validate({"strategy": "own_strategy.Counting", "strategy-arguments": "foo=1"}), {})


# ------------------------------------------------------------------------------------------------------------- hooks


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()


def batches(count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=random, dtype=torch.double), torch.randint(2, (6,), generator=random))
        for _ in range(count)
    ]


def train(net: nn.Module, extra: Any = lambda net: 0.0, momentum: float = 0.9, rate: float = 0.1) -> None:
    """A script's own training, with a clipping of gradients that sees what is added to them."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
    for x, y in batches():
        loss = nn.functional.cross_entropy(net(x), y) + extra(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_proximal_hook_is_the_proximal_loss() -> None:
    hooked, explicit = small_net(), small_net()
    start = [parameter.detach().clone() for parameter in explicit.parameters()]

    def distance(net: nn.Module) -> torch.Tensor:
        pairs = zip(net.parameters(), start, strict=True)
        return 0.35 * sum(((parameter - old) ** 2).sum() for parameter, old in pairs)  # type: ignore[return-value]

    with proximal(hooked, 0.7):
        train(hooked)
    train(explicit, distance)
    for one, other in zip(hooked.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    free = small_net()
    train(free)
    assert not torch.allclose(hooked[0].weight, free[0].weight)  # type: ignore[index]
    before = hooked[0].weight.detach().clone()  # type: ignore[index]
    train(hooked)
    train(explicit)
    assert torch.allclose(hooked[0].weight, explicit[0].weight) and not torch.equal(before, hooked[0].weight)  # type: ignore[index]


def hand_written_scaffold(net: nn.Module, c: list[torch.Tensor], own: list[torch.Tensor]) -> list[torch.Tensor]:
    """Karimireddy et al. 2020, algorithm 1: steps of y - eta (g - c_i + c), and c_i+ by option II."""
    eta, x = 0.1, [parameter.detach().clone() for parameter in net.parameters()]
    for inputs, labels in batches():
        gradients = torch.autograd.grad(nn.functional.cross_entropy(net(inputs), labels), list(net.parameters()))
        with torch.no_grad():
            for y, g, server, client in zip(net.parameters(), gradients, c, own, strict=True):
                y -= eta * (g - client + server)
    ends = (parameter.detach() for parameter in net.parameters())
    return [mine - server + (a - b) / (5 * eta) for mine, server, a, b in zip(own, c, x, ends, strict=True)]


def test_control_variates_are_option_two_of_a_hand_written_optimizer() -> None:
    hooked, by_hand = small_net(), small_net()
    names = [name for name, _ in hooked.named_parameters()]
    random = np.random.default_rng(2)
    c, own = ({name: random.normal(size=p.shape) / 9 for name, p in hooked.named_parameters()} for _ in range(2))
    server = c | {"1.running_mean": np.zeros(3)}
    variates = ControlVariates(hooked, server, own)
    with variates.applied():
        train(hooked, momentum=0.0)
    expected = hand_written_scaffold(by_hand, *([torch.from_numpy(values[n]) for n in names] for values in (c, own)))
    for one, other in zip(hooked.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    renewed, change = variates.renewed()
    for name, value in zip(names, expected, strict=True):
        np.testing.assert_allclose(renewed[name].numpy(), value.numpy(), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(change[name].numpy(), renewed[name].numpy() - own[name], rtol=1e-6, atol=1e-8)
    assert list(renewed) == list(server) and not change["1.running_mean"].numpy().any()


@pytest.mark.parametrize("strategy", ["fedprox", "scaffold"])
def test_a_framework_without_gradient_hooks_is_refused_by_name(strategy: str) -> None:
    config = validate({"strategy": strategy})
    check_federated(config, small_net())
    with pytest.raises(SettingError, match=f"^strategy={strategy} changes gradients by hooks, which a .*dict does not"):
        check_federated(config, {"w": np.ones(2)})


def test_training_without_gradients_of_the_net_is_an_error() -> None:
    variates = ControlVariates(small_net(), {"0.weight": np.zeros((3, 4))}, {})
    with pytest.raises(ValueError, match="no backward pass"), variates.applied():
        train(small_net())


def test_the_server_of_scaffold_moves_by_the_mean_and_its_variate_by_the_sum_over_all_clients() -> None:
    strategy = strategy_of("scaffold", 10, **{"strategy-arguments": "server_learning_rate=0.5", "fraction-train": 0.2})
    model, clients = drawn(0, 1)[0], drawn(1, 2)
    for server_round in (1, 2):
        questions = list(strategy.configure_train(server_round, record(model), ConfigRecord(), Nodes(10)))
        assert len(questions) == 2 and set(questions[0].content["variates"]) == {"w", "b"}
        sent = {name: array.numpy() for name, array in questions[0].content["variates"].items()}
        expected = (server_round - 1) * (clients[0]["w"] + clients[1]["w"]) / 10
        np.testing.assert_allclose(sent["w"], expected, rtol=1e-5, atol=1e-8)
        numbers = [MetricRecord({"num-examples": count, "train-loss": 1.0, "seconds": 1.0}) for count in (1, 99)]
        contents = [RecordDict({"arrays": record(one), "variates": record(one), "metrics": n})
                    for one, n in zip(clients, numbers, strict=True)]  # fmt: skip
        replies = [Message(content, reply_to=question) for content, question in zip(contents, questions, strict=True)]
        made, _ = strategy.aggregate_train(server_round, replies)
        expected = 0.5 * flat(model) + 0.5 * (flat(clients[0]) + flat(clients[1])) / 2
        np.testing.assert_allclose(flat({name: a.numpy() for name, a in made.items()}), expected, rtol=1e-6)


# --------------------------------------------------------------------------------------------- what a client keeps


def test_state_is_kept_by_round_and_a_damaged_or_missing_one_is_named(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "a1", 3)
    for number in (1, 2, 4, 5, 7):
        state.save(
            number, {"personal": record({"w": np.full(2, number, "f4")}), "counts": record({"n": np.array(number)})}
        )
    assert len(list(state.folder.iterdir())) == KEPT
    assert {number: state.load(number)["personal"]["w"].numpy().tolist() for number in (4, 5, 7)} == {
        4: [4.0, 4.0], 5: [5.0, 5.0], 7: [7.0, 7.0]
    }  # fmt: skip
    state.save(5, {"counts": record({"n": np.array(50)})})  # a server that has gone on from round 4
    assert not state.path(7).exists() and state.load(5)["counts"]["n"].numpy() == 50
    with pytest.raises(ValueError, match=rf"round 7 is not in {state.folder}: start it where that is, by --state"):
        state.load(7)
    state.path(5).write_bytes(state.path(5).read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"client-3-round-5.npz is damaged \(.*\); begin a new run"):
        state.load(5)
    for run in ("../up", "", "A", "a" * 65, "a\n"):
        with pytest.raises(ValueError, match="the server names its run"):
            ClientState(tmp_path, run, 0)


def test_a_simulation_whose_clients_have_lost_their_state_is_not_resumed(tmp_path: Path) -> None:
    rows = [{"round": 0, "trained": None}, {"round": 1, "trained": {"client": [0, 2]}}]
    rows.append({"round": 2, "trained": {"client": [2]}})
    folder = tmp_path / "client-state"
    for position, number in ((0, 1), (2, 2)):
        ClientState(folder, "b2", position).save(number, {"personal": record({"w": np.ones(1)})})
    check_kept(tmp_path, {"run": "b2", "rounds": rows})
    ClientState(folder, "b2", 2).path(2).unlink()
    with pytest.raises(
        ValueError, match="what client 2 has kept of round 2 is missing or damaged in client-state; begin a new run"
    ):
        check_kept(tmp_path, {"run": "b2", "rounds": rows})


@given(st.sets(st.sampled_from(["fc1.weight", "fc3.weight", "fc3.bias", "bn.mean"]), min_size=1))
def test_entries_are_split_by_patterns_if_they_leave_something_on_both_sides(names: set[str]) -> None:
    arrays = record({name: np.ones(1) for name in sorted(names)})
    assert split(arrays, "")[0] is arrays
    matching = sorted(names - {"fc1.weight"})
    if matching and "fc1.weight" in names:
        assert [[*part] for part in split(arrays, "fc3.* *bn*")] == [["fc1.weight"], matching]
    else:
        with pytest.raises(ValueError, match=f"matches {'all' if matching else 'none of the'} entries of the model: "):
            split(arrays, "fc3.* *bn*")


# --------------------------------------------------------------------------------------------------- rates and steps


def test_rates_go_down_as_documented() -> None:
    def rates(**settings: Any) -> list[float]:
        keys = {"learning-rate": 0.8, "num-server-rounds": 4} | {k.replace("_", "-"): v for k, v in settings.items()}
        config = validate(keys)
        return [config.rate_in(server_round) for server_round in (1, 2, 3, 4)]

    assert rates() == [0.8] * 4
    step = rates(learning_rate_schedule="step", learning_rate_decay=0.5, decay_rounds=2)
    assert step == pytest.approx([0.8, 0.8, 0.4, 0.4])
    assert rates(learning_rate_schedule="cosine") == pytest.approx([0.8, 0.6828427, 0.4, 0.1171573])


def test_local_steps_go_through_all_samples_before_one_comes_again() -> None:
    from federation.app.job import Job

    job: Any = SimpleNamespace(
        config=validate({"local-steps": 3, "batch-size": 4, "seed": 5}), order={"position": 2, "server-round": 0}
    )
    held, seen = np.arange(100, 130), []
    for server_round in range(1, 11):  # 120 samples: four times all 30
        job.order["server-round"] = server_round
        rows = Job._rows_of_steps(job, held)
        assert len(rows) == 12
        seen += rows.tolist()
    for epoch in range(4):
        assert sorted(seen[30 * epoch : 30 * epoch + 30]) == held.tolist()
    assert seen[:30] != seen[30:60] != sorted(seen[30:60])
    few = Job._rows_of_steps(job, held[:5])
    assert len(few) == 12 and set(few) == set(held[:5].tolist())


def test_the_context_of_a_client_is_filled_and_emptied(tmp_path: Path) -> None:
    from federation.app.client_state import keep_state

    def ask(kind: str, server_round: int, kept: int) -> Message:
        told = {"server-round": server_round, "run": "c3", "position": 1, "kept": kept}
        return Message(RecordDict({"config": ConfigRecord(told)}), 1, kind)

    def answer(message: Message, context: Context) -> Message:
        seen.append({name: sha256(held) for name, held in context.state.array_records.items()})
        context.state["variates"] = record({"w": np.full(1, 7.0)})
        return Message(RecordDict(), reply_to=message)

    seen: list[dict[str, str]] = []
    context = Context(1, 1, {"state": str(tmp_path)}, RecordDict(), {"strategy": "scaffold"})
    keep_state(ask(MessageType.TRAIN, 1, 0), context, answer)
    assert seen == [{}] and not context.state
    keep_state(ask(MessageType.EVALUATE, 2, 1), context, answer)
    keep_state(ask(MessageType.TRAIN, 2, 1), context, answer)
    assert seen[1] == seen[2] == {"variates": sha256(record({"w": np.full(1, 7.0)}))}
    assert sorted(path.name for path in (tmp_path / "c3").iterdir()) == [
        "client-1-round-1.npz", "client-1-round-2.npz"
    ]  # fmt: skip
    context.run_config["strategy"] = "fedavg"
    keep_state(ask(MessageType.TRAIN, 3, 0), context, answer)
    assert len(list((tmp_path / "c3").iterdir())) == 2


def test_shared_and_personal_entries_make_the_whole_model() -> None:
    arrays = from_net(small_net())
    shared, personal = split(arrays, "1.*")
    assert {*shared} == {"0.weight", "0.bias", "3.weight", "3.bias"} and "1.running_var" in personal
    assert sha256(ArrayRecord({name: ({**shared, **personal})[name] for name in arrays})) == sha256(arrays)


def test_a_strategy_that_is_checked_prints_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flwr")  # another test may have muted it
    config = validate({"fraction-evaluate": 0.0, "strategy": "fedprox", "strategy-arguments": "proximal_mu=0.0"})
    check_strategy(config)
    assert caplog.records == []
    make_strategy(config, {})
    assert len(caplog.records) == 2, "as Flower's classes do"
