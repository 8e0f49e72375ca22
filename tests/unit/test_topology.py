"""No server that averages: the mixing matrices are right, and the clients' models are what these make of them."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.app import bundle, delivery
from federation.app.config import validate
from federation.app.gossip import Gossip, consensus
from federation.app.mixing import mean, mixed, relayed
from federation.app.packing import unpack
from federation.app.strategy import make_strategy, strategy_state
from federation.app.topology import Graph, graph, metropolis
from federation.app.weights import encoded
from tests.regression import play, regression_task

TOPOLOGIES = st.sampled_from(["ring", "random", "full"])
CLIENTS = st.sets(st.integers(0, 60), max_size=24)


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory: pytest.TempPathFactory, in_a_run: None) -> Iterator[None]:
    with regression_task(tmp_path_factory.mktemp("task")):
        yield


# ------------------------------------------------------------------------------------------- graphs and their matrices


def reached(found: Graph) -> set[int]:
    """Return the clients that there is a way to from the first one."""
    seen, new = set[int](), set(list(found)[:1])
    while new:
        seen |= new
        new = set().union(*(found[client] for client in new)) - seen
    return seen


@given(TOPOLOGIES, CLIENTS, st.integers(1, 30), st.integers(0, 2**31 - 1), st.integers(1, 1000))
@settings(deadline=None)
def test_the_matrix_is_symmetric_and_doubly_stochastic_whoever_takes_part(
    topology: str, clients: set[int], neighbours: int, seed: int, server_round: int
) -> None:
    found = graph(topology, clients, neighbours, seed, server_round)
    matrix = np.zeros((61, 61))
    for client, row in metropolis(found).items():
        assert set(row) == {client} | found[client], "nobody but neighbours"
        matrix[client, [*row]] = [*row.values()]
    sums = [float(client in clients) for client in range(61)]
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(0), sums, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), sums, atol=1e-12)
    assert (matrix > -1e-12).all()
    if len(clients) > 2 and topology != "full":
        assert (np.diag(matrix)[sorted(clients)] > 0.03).all(), "so that averaging does not only swap models"


@given(TOPOLOGIES, CLIENTS, st.integers(1, 30), st.integers(0, 2**31 - 1), st.integers(1, 1000))
@settings(deadline=None)
def test_the_graph_has_the_neighbours_that_are_asked_for(
    topology: str, clients: set[int], neighbours: int, seed: int, server_round: int
) -> None:
    found, most = graph(topology, clients, neighbours, seed, server_round), max(0, len(clients) - 1)
    assert set(found) == clients and all(client not in others for client, others in found.items())
    wanted = min({"ring": 2, "full": most, "random": neighbours}[topology], most)
    short = wanted % 2 and len(clients) % 2  # not everybody can have an odd number of them
    assert sorted(map(len, found.values())) == [wanted - 1] * short + [wanted] * (len(clients) - short)
    assert reached(found) == clients or wanted == 1, "connected"
    assert graph(topology, reversed(sorted(clients)), neighbours, seed, server_round) == found


def test_rings_and_full_graphs_have_equal_weights_and_random_ones_change() -> None:
    ring = metropolis(graph("ring", range(5), 9, 0, 1))
    assert ring[0] == pytest.approx({4: 1 / 3, 0: 1 / 3, 1: 1 / 3})
    assert metropolis(graph("full", range(5), 9, 0, 1))[3] == pytest.approx(dict.fromkeys(range(5), 1 / 5))
    assert metropolis({0: {1}, 1: {0, 2}, 2: {1}})[0] == pytest.approx({0: 2 / 3, 1: 1 / 3})
    drawn = [graph("random", range(20), 3, seed, number) for seed in (0, 1) for number in (1, 2, 3)]
    assert all(one != other for one, other in pairwise(drawn))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"topology": "ring"}, "topology=ring needs three clients"),
        ({"topology": "full", "num-clients": 1, "min-clients": 1}, "topology=full needs two clients"),
        ({"topology": "random", "num-clients": 3}, "neighbours=3 is not less than num-clients"),
        ({"topology": "ring", "num-clients": 4, "strategy": "scaffold"}, "strategy=fedavg only"),
        ({"topology": "ring", "num-clients": 4, "upload": "delta"}, "neighbours exchange whole models"),
        ({"topology": "ring", "num-clients": 4, "fraction-train": 0.5}, "lets every client train"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        validate(values)
    assert len(str(error.value).splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------- averaging


def record(**values: Any) -> ArrayRecord:
    return ArrayRecord({name: encoded(np.asarray(value)) for name, value in values.items()})


def test_a_mean_keeps_dtypes_and_rounds_counters() -> None:
    def model(number: int) -> ArrayRecord:
        half = np.array([number, 1], "bfloat16")
        return record(w=np.full(3, number, np.float32), half=half, steps=number, big=np.array(2**60 + number))

    own, other = model(1), model(4)
    found = mixed(relayed(own, [other, other], [0.4, 0.3, 0.3]))
    assert {name: array.dtype for name, array in found.items()} == {name: array.dtype for name, array in own.items()}
    np.testing.assert_allclose(found["w"].numpy(), 2.8, rtol=1e-6)
    assert found["half"].numpy().tolist() == [float(np.array(2.8, "bfloat16")), 1] and int(found["steps"].numpy()) == 3
    assert mixed(relayed(own, [], [1.0])) is own is mixed({"arrays": own}), "alone, to the last bit"


def test_the_consensus_distance_is_that_of_its_definition() -> None:
    models = [record(w=np.array([number, 0.0], np.float32), steps=10 * number) for number in (1, 2, 3)]
    assert consensus(models, mean(models, [1 / 3] * 3)) == pytest.approx((2 / 3) ** 0.5)
    assert consensus(models[:1], models[0]) == 0


class Nodes(Grid):
    """A Grid of which a strategy asks for no more than who is there."""

    here: list[int]

    def get_node_ids(self) -> list[int]:
        return self.here

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    push_messages = pull_messages = send_and_receive = set_run = create_message
    run = property(create_message)


SOME = st.sets(st.integers(0, 5))
PRESENCE = st.lists(st.tuples(st.sets(st.integers(0, 5), min_size=1), SOME), min_size=2, max_size=5)


@given(TOPOLOGIES, PRESENCE, st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_who_is_lost_is_left_out_and_comes_back_with_its_own_last_model(
    topology: str, presence: list[tuple[set[int], set[int]]], seed: int
) -> None:
    """Each round, some are there and some of these fail. Training adds a number to each model."""
    config = validate({"topology": topology, "num-clients": 6, "neighbours": 2, "seed": seed})
    strategy, grid, like = make_strategy(config, {}), Nodes(), record(w=np.zeros(2, np.float32))
    assert isinstance(strategy, Gossip)
    models, replied = np.zeros((6, 2)), set[int]()
    for server_round, (here, failing) in enumerate(presence, 1):
        grid.here = sorted(here)
        messages = [*strategy.configure_train(server_round, like, ConfigRecord(), grid)]
        assert {message.metadata.dst_node_id for message in messages} == here
        matrix = np.eye(6)
        for client, row in metropolis(graph(topology, here & replied, 2, seed, server_round)).items():
            matrix[client] = [row.get(other, 0.0) for other in range(6)]
        replies, expected = [], matrix @ models
        for message in messages:
            client = message.metadata.dst_node_id
            found = mixed(message.content.array_records)["w"].numpy()
            np.testing.assert_allclose(found, expected[client], rtol=1e-5, atol=1e-6)
            if client not in failing:
                models[client] = found + np.float32(client + server_round)
                replies.append(reply_to(message, models[client]))
        if replies:
            replied = here - failing
            average, metrics = strategy.aggregate_train(server_round, replies)
            assert average is not None and metrics is not None
            np.testing.assert_allclose(average["w"].numpy(), models[sorted(replied)].mean(0), rtol=1e-5)
        else:
            replied = set()
        strategy = make_strategy(config, strategy_state(strategy))  # as after a crash


def reply_to(message: Message, model: Any) -> Message:
    metrics = MetricRecord({"num-examples": 10 + message.metadata.dst_node_id, "train-loss": 0.5, "seconds": 0.1})
    content = RecordDict({"arrays": record(w=model.astype(np.float32)), "metrics": metrics})
    return Message(content, reply_to=message)


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_full_is_fedavg_where_all_clients_weigh_the_same(tmp_path: Path) -> None:
    star, full = play(tmp_path / "star"), play(tmp_path / "full", topology="full")
    assert [row["samples"] for row in star.rounds] == [[20] * 4] * 4, "equal weights"
    for name, values in star.model.items():
        np.testing.assert_allclose(full.model[name], values, rtol=1e-5, atol=1e-7)
    assert full.model["steps"] == 16 and np.abs(full.model["w"]).max() > 0.01
    for own, other in zip(full.rounds, star.rounds, strict=True):
        for key in ("train_loss", "clients_loss", "server_loss"):
            assert own[key] == pytest.approx(other[key], rel=1e-4)
        assert "consensus" not in other
    assert full.digest != play(tmp_path / "ring", topology="ring").digest


def test_without_training_the_consensus_distance_falls_and_the_mean_stays(tmp_path: Path) -> None:
    """After the first round, the learning rate is next to nothing."""
    still = {"learning_rate": 0.02, "learning_rate_schedule": "step", "learning_rate_decay": 1e-9, "decay_rounds": 1}
    first, last = (play(tmp_path / str(n), rounds=n, topology="ring", **still) for n in (1, 6))
    apart = [row["consensus"] for row in last.rounds]
    assert apart[0] > 0.01 and all(later < 0.6 * before for before, later in pairwise(apart))
    np.testing.assert_allclose(last.model["w"], first.model["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("topology", ["ring", "random"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, topology: str) -> None:
    settings = {"topology": topology, "neighbours": 2}
    whole = play(tmp_path / "whole", **settings)
    begun = play(tmp_path / "parts", rounds=2, **settings)
    resumed = play(tmp_path / "parts", resume=True, **settings)
    assert begun.digest != resumed.digest == whole.digest
    assert [row["consensus"] for row in resumed.rounds] == [row["consensus"] for row in whole.rounds]


def test_a_client_that_fails_in_a_round_goes_on_alone_and_then_with_the_others(tmp_path: Path) -> None:
    def fail(reply: Message) -> None:
        asked = reply.metadata
        if asked.message_type == MessageType.TRAIN and asked.src_node_id == 3 and rounds.append(1) is None:
            reply.content.metric_records["metrics"]["num-examples"] = 1 if len(rounds) == 2 else 20

    rounds: list[int] = []
    run = play(tmp_path, fail, nodes=4, rounds=5, topology="ring")
    assert [row["clients"] for row in run.rounds] == [4, 3, 4, 4, 4]
    asked = [message for message in run.grid.messages if message.metadata.message_type == MessageType.TRAIN]
    received = [[len(neighbours(message)) for message in asked if message.metadata.dst_node_id == 1 + client]
                for client in range(4)]  # fmt: skip
    assert received == [[0, 2, 2, 2, 2], [0, 2, 2, 2, 2], [0, 2, 0, 2, 2], [0, 2, 2, 2, 2]]
    own = [unpack(message.content).array_records["arrays"]["steps"].numpy() for message in asked[2::4]]
    assert [int(steps) for steps in own] == [0, 4, 4, 8, 15], "first that of round 1, and then of 8, 12 and 12: 11"


def neighbours(message: Message) -> list[str]:
    return [name for name in message.content if name.startswith("neighbour-")]


def test_bytes_are_counted_and_bundles_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    star, one = play(tmp_path / "star"), play(tmp_path / "one", topology="ring")
    assert one.rounds[0]["bytes_up"] == star.rounds[0]["bytes_up"]
    model, masks = star.rounds[0]["bytes_up"] // 4, star.rounds[0]["bytes_down"] - 2 * star.rounds[0]["bytes_up"]
    rest = one.rounds[1]["bytes_down"] - 2 * 4 * 3 * model - masks
    assert 0 < rest < 8 * 160, "of each message, only the weights are left: three numbers"
    monkeypatch.setattr(delivery, "BUNDLED", 2 * 3 * model + 400)
    several = play(tmp_path / "several", topology="ring")
    assert several.digest == one.digest
    bundles = [unpack(message.content) for message in several.grid.messages]
    sizes = [len(bundle.unpack(content)) for content in bundles if bundle.INDEX in content]
    assert sizes == [4] + 7 * [2, 2], "in training and in testing, as soon as there are neighbours"
