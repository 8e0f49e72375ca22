"""Who takes part, and in what order: the Roster on a Grid in memory, by a clock that costs no time."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

import cifar
from federation.app import bundle, client_grid, delivery, job, packing, partition, roster, weights
from federation.app.client_grid import ClientGrid, seed_sampling
from federation.app.config import validate
from federation.app.fingerprint import fingerprint
from federation.app.roster import Roster
from federation.app.sources import compared, digest

DATA = (np.zeros((20, 2)), np.arange(20)), (np.zeros((12, 2)), np.arange(12))
MODEL = ArrayRecord({"w": Array(np.arange(4, dtype=np.float32))})


class Clock:
    """Time that passes only while somebody sleeps, and what happens then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, Callable[[], object]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 100, "waited in vain"
        due = [event for event in self.events if event[0] <= self.now]
        self.events = [event for event in self.events if event[0] > self.now]
        for _, happen in sorted(due, key=lambda event: event[0]):
            happen()

    def at(self, moment: float, happen: Callable[[], object]) -> None:
        self.events.append((moment, happen))


@dataclass
class FakeClient:
    """A node and how it behaves. A delay of infinity means that it never answers."""

    node: int
    name: str = ""
    wanted: int = -1
    partitions: int = 0
    key: str | None = None  # by default made from the name, as launch.py does
    samples: int = 20
    own_data: str = ""
    files: list[str] = field(default_factory=lambda: [digest(path) for path in compared(cifar).values()])
    flwr: str = version("flwr")
    clients: int = 0  # that the node plays; 0 if it does not say
    joins_after: float = 0.0
    answers_after: float = 0.0
    fails: str = ""
    stays: bool = False
    odd: dict[str, Any] = field(default_factory=dict)  # facts that it states in another way; None leaves one out
    received: list[Message] = field(default_factory=list)

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "query.join":
            facts = {"name": self.name, "partition-id": self.wanted, "num-partitions": self.partitions}
            facts |= {"key": self.key if self.key is not None else self.name and f"{self.name} 1"}
            facts |= {"clients": self.clients, "flwr": self.flwr, "own-data": self.own_data, "files": self.files}
            facts |= {"train-samples": self.samples, "test-samples": 12} | self.odd
            facts = {key: value for key, value in facts.items() if value is not None}
            return Message(RecordDict({"client": ConfigRecord(facts)}), reply_to=message)
        if self.fails:
            return Message(Error(1, self.fails), reply_to=message)
        metrics = {"num-examples": len(rows_of(message) or range(self.samples)), "seconds": 0.1}
        if message.metadata.message_type == MessageType.EVALUATE:
            found = MetricRecord(metrics | {"loss": 0.5, "accuracy": 0.5})
            return Message(RecordDict({"metrics": found}), reply_to=message)
        metrics["train-loss"] = 0.5
        return Message(RecordDict({"arrays": MODEL, "metrics": MetricRecord(metrics)}), reply_to=message)

    def of_type(self, message_type: str) -> list[Message]:
        return [message for message in self.received if message.metadata.message_type == message_type]


def rows_of(message: Message) -> list[int]:
    """Return the rows that a message names to its client, by the bits of its mask; none if it has no mask."""
    if "rows" not in message.content:
        return []
    assert list(message.content.array_records["rows"]) == ["mask"]
    mask = message.content.array_records["rows"]["mask"].numpy()
    return np.flatnonzero(np.unpackbits(mask)).tolist()


class FakeGrid(Grid):
    """Nodes in memory. Like a SuperLink, it hands every reply out once, to the one who asks for it.

    A message to a node that has gone is not stored: its id is "", and asking for that gives an error.
    """

    def __init__(self, clock: Clock, clients: Iterable[FakeClient]) -> None:
        self.clock, self.online = clock, {client.node: client for client in clients}
        self.replies: dict[str, tuple[float, Message]] = {}
        self.messages = 0

    def get_node_ids(self) -> list[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        self.messages += 1
        client = self.online.get(message.metadata.dst_node_id)
        identity = str(self.messages) if client else ""
        message.metadata.__dict__["_message_id"] = identity  # as the SuperLink does
        if client is None:
            self.replies[identity] = (self.clock.now, Message(Error(7, "message unavailable"), reply_to=message))
            return identity
        message.content = packing.unpack(message.content)
        client.received.append(message)
        if message.metadata.message_type == "query.leave":
            if not client.stays:
                self.clock.at(self.clock.now + 1, lambda: self.online.pop(client.node, None))
            return identity
        delay = client.joins_after if message.metadata.message_type == "query.join" else client.answers_after
        self.replies[identity] = (self.clock.now + delay, client.answer(message))
        return identity

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = sorted((self.replies[i][0], i) for i in message_ids if i in self.replies)
        return [self.replies.pop(identity)[1] for moment, identity in wanted if moment <= self.clock.now]

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    send_and_receive = set_run = create_message
    run = property(create_message)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, in_a_run: None) -> Clock:
    ours = Clock()
    monkeypatch.setattr(roster, "time", ours)
    monkeypatch.setattr(client_grid, "time", ours)
    return ours


def federation(clock: Clock, *clients: FakeClient, count: int = 2, **config: Any) -> tuple[ClientGrid, FakeGrid]:
    grid = FakeGrid(clock, clients)
    settings = {key.replace("_", "-"): value for key, value in config.items()}
    return ClientGrid(grid, Roster(grid, validate({"num-clients": count} | settings), model_with(DATA))), grid


def places(ours: ClientGrid) -> dict[int, int]:
    """Return the position of each node that has one."""
    return {client.node: client.position for client in ours.roster.clients.values()}


def train(ours: ClientGrid, server_round: int = 1, strategy: FedAvg | None = None) -> list[int]:
    """Play the training half of a round; return the positions that answered, in the order of the replies."""
    strategy = strategy or FedAvg(min_train_nodes=1, min_available_nodes=1)
    replies = ours.send_and_receive(strategy.configure_train(server_round, MODEL, ConfigRecord(), ours))
    return [reply.metadata.src_node_id for reply in replies]


# ----------------------------------------------------------------------------------------------------- places


def test_partitions_are_handed_out_in_order_of_arrival(clock: Clock) -> None:
    late, early = FakeClient(11, "a/0", joins_after=3), FakeClient(7, "b/0")
    ours, _ = federation(clock, late, early)
    ours.roster.wait_for(2)
    assert places(ours) == {7: 0, 11: 1}


def test_a_client_holds_the_rows_of_its_partition(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    clients = [FakeClient(node, f"host/{node}") for node in (1, 2, 3)]
    ours, _ = federation(clock, *clients, count=3, seed=5)
    ours.roster.wait_for(3)
    train(ours)
    ours.send_and_receive(FedAvg(min_available_nodes=1).configure_evaluate(1, MODEL, ConfigRecord(), ours))
    for client in clients:
        position = places(ours)[client.node]
        for kind, samples in ((MessageType.TRAIN, 20), (MessageType.EVALUATE, 12)):
            (message,) = client.of_type(kind)
            assert rows_of(message) == partition.iid(samples, 3, 5)[position].tolist()
    assert "client 0 joined from host/1: 7 samples of 20" in capsys.readouterr().out


def test_more_clients_than_samples_are_refused_at_once(clock: Clock) -> None:
    with pytest.raises(ValueError, match="12 samples cannot be split among 13 clients"):
        federation(clock, count=13)


def test_an_explicit_partition_is_respected(clock: Clock) -> None:
    chooser, other = FakeClient(1, "a/0", wanted=1, partitions=2), FakeClient(2, "b/0", joins_after=1)
    ours, _ = federation(clock, chooser, other)
    ours.roster.wait_for(2)
    assert places(ours) == {1: 1, 2: 0}


def test_the_first_client_settles_the_number_of_partitions(clock: Clock) -> None:
    first, second = FakeClient(1, "a/0", wanted=3, partitions=5), FakeClient(2, "b/0", joins_after=1)
    ours, _ = federation(clock, first, second)
    ours.roster.wait_for(2)
    train(ours)
    assert places(ours) == {1: 3, 2: 0}
    assert [len(rows_of(client.of_type("train")[0])) for client in (first, second)] == [4, 4]


def assert_refused(grid: FakeGrid, ours: ClientGrid, client: FakeClient, why: str) -> None:
    """Check that `client` has no place, was told why, and has gone."""
    (goodbye,) = client.of_type("query.leave")
    assert why in str(goodbye.content["goodbye"]["error"])
    assert client.node not in places(ours) and client.node not in grid.online
    assert client.of_type("train") == []


def test_a_partition_that_is_taken_is_refused(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    owner = FakeClient(1, "a/0", wanted=0, partitions=2)
    thief = FakeClient(2, "b/0", wanted=0, partitions=2, joins_after=1)
    ours, grid = federation(clock, owner, thief)
    clock.at(20, lambda: grid.online.update({3: FakeClient(3, "c/0")}))
    ours.roster.wait_for(2)
    assert_refused(grid, ours, thief, "partition 0 is taken by a/0")
    assert places(ours) == {1: 0, 3: 1}
    assert "b/0 may not join: partition 0 is taken by a/0" in capsys.readouterr().out


def test_another_number_of_partitions_is_refused(clock: Clock) -> None:
    first = FakeClient(1, "a/0", wanted=0, partitions=2)
    odd = FakeClient(2, "b/0", wanted=1, partitions=4, joins_after=1)
    ours, grid = federation(clock, first, odd)
    clock.at(20, lambda: grid.online.update({3: FakeClient(3, "c/0")}))
    ours.roster.wait_for(2)
    assert_refused(grid, ours, odd, "it counts 4 partitions, but this run has 2")


def test_a_client_that_is_refused_settles_nothing(clock: Clock) -> None:
    absurd = FakeClient(1, "a/0", wanted=0, partitions=1000)  # more than there are samples
    ours, grid = federation(clock, absurd)
    clock.at(20, lambda: grid.online.update({2: FakeClient(2, "b/0"), 3: FakeClient(3, "c/0")}))
    ours.roster.wait_for(2)
    assert_refused(grid, ours, absurd, "cannot be split among 1000")
    assert sorted(places(ours).values()) == [0, 1]


def test_one_client_too_many_is_refused(clock: Clock) -> None:
    clients = [FakeClient(node, f"host/{node}", joins_after=node / 10) for node in (1, 2, 3)]
    ours, grid = federation(clock, *clients)
    ours.roster.wait_for(2)
    clock.sleep(30)  # nobody waits for one who is refused
    assert_refused(grid, ours, clients[2], "all 2 partitions are taken")
    assert places(ours) == {1: 0, 2: 1}


@pytest.mark.parametrize("gone", [True, False])  # a killed client counts as online for a while
def test_a_client_that_comes_back_gets_its_old_partition(clock: Clock, gone: bool) -> None:
    clients = [FakeClient(node, f"host/{node}", joins_after=node / 10) for node in (1, 2, 3)]
    ours, grid = federation(clock, *clients, count=3)
    ours.roster.wait_for(3)
    assert places(ours) == {1: 0, 2: 1, 3: 2}
    if gone:
        del grid.online[2]
    grid.online[9] = FakeClient(9, "host/2")
    ours.roster.wait_for(3)
    ours.roster.poll_new_nodes()
    assert places(ours) == {1: 0, 9: 1, 3: 2}
    assert ours.get_node_ids() == [0, 1, 2]


def test_a_client_that_comes_back_may_name_its_partition(clock: Clock) -> None:
    ours, grid = federation(clock, FakeClient(1, "a/0", wanted=1, partitions=2))
    ours.roster.wait_for(1)
    grid.online[2] = FakeClient(2, "a/0", wanted=1, partitions=2)
    ours.roster.poll_new_nodes()
    assert places(ours) == {2: 1}


def test_a_new_client_takes_the_place_of_one_that_has_gone(clock: Clock) -> None:
    clients = [FakeClient(node, f"host/{node}", joins_after=node / 10) for node in (1, 2)]
    ours, grid = federation(clock, *clients)
    ours.roster.wait_for(2)
    del grid.online[1]
    grid.online[5] = FakeClient(5, "elsewhere/0")
    ours.roster.wait_for(2)
    assert places(ours) == {2: 1, 5: 0}


def test_a_partition_is_kept_for_the_client_that_an_earlier_server_gave_it_to(clock: Clock) -> None:
    known, new = FakeClient(1, "a/0", joins_after=5), FakeClient(2, "b/0")
    ours, _ = federation(clock, known, new)
    ours.roster.places = {"a/0 1": 0}  # as a checkpoint has it
    ours.roster.wait_for(2)
    assert places(ours) == {1: 0, 2: 1}
    assert ours.roster.places == {"a/0 1": 0, "b/0 1": 1}, "and as the next one will have it"


@pytest.mark.parametrize(("data", "old", "new"), [("", 2, 0), ("another", 0, 2)], ids=["a copy", "its own"])
def test_a_client_that_has_changed_its_data_gets_another_place(clock: Clock, data: str, old: int, new: int) -> None:
    ours, _ = federation(clock, FakeClient(1, "a/0", own_data=data))
    ours.roster.places = {"a/0 1": old}  # the places below 2 are partitions, the others for data of their own
    ours.roster.wait_for(1)
    assert places(ours) == {1: new} and ours.roster.places == {"a/0 1": new}
    assert (ours.roster.clients[new].rows is None) == bool(data)


def test_a_client_whose_partition_is_not_there_any_more_gets_another(clock: Clock) -> None:
    ours, _ = federation(clock, FakeClient(1, "a/0"))
    ours.roster.places = {"a/0 1": 4}  # the run was begun with more partitions, by a client that named their number
    ours.roster.wait_for(1)
    assert places(ours) == {1: 0}


def test_a_client_with_other_data_gets_no_rows(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    own = [FakeClient(node, f"site/{node}", own_data="7 training samples", samples=7) for node in (1, 2, 3)]
    ours, _ = federation(clock, *own)  # three, though only two are waited for
    ours.roster.wait_for(3)
    assert sorted(train(ours)) == [2, 3, 4]  # after the partitions, which are for clients with the server's data
    assert all("rows" not in client.of_type("train")[0].content for client in own)
    assert "client 2 joined from site/1: 7 samples of its own: 7 training samples" in capsys.readouterr().out


@pytest.mark.parametrize("theirs", ["1.40.0", "2.0.0", "1.999.0"])
def test_another_version_of_flower_is_refused(clock: Clock, theirs: str) -> None:
    ours_is = version("flwr")
    stranger, fine = FakeClient(1, "a/0", flwr=theirs), FakeClient(2, "b/0", joins_after=20)
    ours, grid = federation(clock, stranger, fine, count=1)
    ours.roster.wait_for(1)
    assert_refused(grid, ours, stranger, f"it runs Flower {theirs}, the server {ours_is}")
    assert places(ours) == {2: 0}


def test_another_version_of_the_script_is_refused(clock: Clock) -> None:
    stranger, fine = FakeClient(1, "a/0", files=["another"]), FakeClient(2, "b/0", joins_after=20)
    ours, grid = federation(clock, stranger, fine, count=1)
    ours.roster.wait_for(1)
    assert_refused(grid, ours, stranger, "its cifar.py differs from the server's")
    assert places(ours) == {2: 0}


def test_another_patch_of_flower_is_welcome(clock: Clock) -> None:
    minor = ".".join(version("flwr").split(".")[:2])
    ours, _ = federation(clock, FakeClient(1, "a/0", flwr=f"{minor}.99"), count=1)
    ours.roster.wait_for(1)
    assert places(ours) == {1: 0}


# ---------------------------------------------------------------------------------------------------- presence


def test_waits_until_enough_are_here(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    ours, grid = federation(clock, FakeClient(1, "a/0"))
    clock.at(30, lambda: grid.online.update({2: FakeClient(2, "b/0")}))
    ours.roster.wait_for(2)
    assert 30 <= clock.now <= 31 + 2 * roster.POLL
    assert "waiting for 2 clients, 1 here" in capsys.readouterr().out


def test_does_not_count_a_client_that_has_gone(clock: Clock) -> None:
    ours, grid = federation(clock, FakeClient(1, "a/0"))
    clock.at(5, lambda: grid.online.pop(1))
    clock.at(10, lambda: grid.online.update({2: FakeClient(2, "b/0")}))
    clock.at(20, lambda: grid.online.update({3: FakeClient(3, "c/0")}))
    ours.roster.wait_for(2)
    assert clock.now >= 20 and {client.node for client in ours.roster.present()} == {2, 3}


def test_who_takes_too_long_to_join_holds_nobody_up_for_ever(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "JOIN_TIMEOUT", 30)
    slow = FakeClient(2, "b/0", joins_after=45)
    ours, _ = federation(clock, FakeClient(1, "a/0"), slow, count=2)
    ours.roster.wait_for(1)
    assert 30 <= clock.now < 31 and [client.node for client in ours.roster.present()] == [1]
    ours.roster.wait_for(1)
    assert clock.now < 31, "nor does the next round wait for it again"
    clock.sleep(15)
    ours.roster.wait_for(1)
    assert [client.node for client in ours.roster.present()] == [1, 2]


def test_does_not_wait_for_a_node_that_goes_before_it_has_joined(clock: Clock) -> None:
    ours, grid = federation(clock, FakeClient(1, "a/0"), FakeClient(2, "b/0", joins_after=math.inf), count=1)
    clock.at(5, lambda: grid.online.pop(2))
    ours.roster.wait_for(1)
    assert 5 <= clock.now < 6 and places(ours) == {1: 0}


def test_a_client_that_fails_to_join_is_named_and_left_alone(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    broken = FakeClient(1)
    broken.answer = lambda message: Message(Error(1, "no\nsuch data"), reply_to=message)  # type: ignore[method-assign]
    ours, _ = federation(clock, broken, FakeClient(2, "b/0"), count=1)
    ours.roster.wait_for(1)
    assert places(ours) == {2: 0}
    assert "a client could not join: no such data" in capsys.readouterr().out


def test_a_node_that_has_gone_has_left_however_flower_puts_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The SuperLink replies in its place: that it has failed to report a heartbeat, even if it has signed off."""
    assert roster.NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
    gone, early = FakeClient(1, "a/0"), FakeClient(3, "c/0")
    ours, _ = federation(clock, gone, FakeClient(2, "b/0"), early, count=2)

    def unavailable(message: Message) -> Message:
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, "failed to report a heartbeat"), reply_to=message)

    early.answer = unavailable  # type: ignore[method-assign]
    ours.roster.wait_for(2)
    gone.answer = unavailable  # type: ignore[method-assign]
    assert train(ours) == [1]
    said = capsys.readouterr().out
    assert "a client could not join: it has left" in said and "client 0 (a/0) is left out: it has left" in said
    assert "heartbeat" not in said


@pytest.mark.parametrize(
    "odd",
    [{"name": 5}, {"name": None}, {"key": 1.5}, {"partition-id": "0"}, {"partition-id": True}, {"flwr": b"1.41"},
     {"num-partitions": None}, {"train-samples": "many"}, {"test-samples": [1]}, {"files": None},
     {"own-data": True}, {"colour": "red"}],
    ids=str,
)  # fmt: skip
def test_a_client_that_introduces_itself_in_another_way_is_left_alone(
    clock: Clock, odd: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, _ = federation(clock, FakeClient(1, "a/0", odd=odd), FakeClient(2, "b/0"), count=1)
    ours.roster.wait_for(1)
    assert places(ours) == {2: 0}
    assert "a client could not join: it does not introduce itself as client.py does" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a/0", ""], ids=["started by client.py", "by other means"])
@pytest.mark.parametrize(("wanted", "partitions"), [(-1, 0), (0, 2)], ids=["any", "its own"])
def test_a_node_that_has_been_away_is_greeted_again(clock: Clock, name: str, wanted: int, partitions: int) -> None:
    first = FakeClient(1, name, wanted, partitions)
    ours, grid = federation(clock, first, FakeClient(2, "b/0", joins_after=1))
    ours.roster.wait_for(2)
    del grid.online[1]
    ours.roster.poll_new_nodes()
    grid.online[1] = again = FakeClient(1, name, wanted, partitions)
    ours.roster.wait_for(2)
    assert [len(client.of_type("query.join")) for client in (first, again)] == [1, 1]
    assert again.of_type("query.leave") == []
    assert places(ours) == {1: 0, 2: 1}


def test_order_depends_on_partitions_only(clock: Clock) -> None:
    nodes = [900, 3, 512, 77]
    clients = [FakeClient(node, f"h/{node}", wanted=i, partitions=4) for i, node in enumerate(nodes)]
    for order in (clients, clients[::-1], clients[2:] + clients[:2]):
        ours, _ = federation(clock, *order, count=4)
        ours.roster.wait_for(4)
        assert ours.get_node_ids() == [0, 1, 2, 3] and [places(ours)[node] for node in nodes] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------ replies


def test_a_message_is_the_strategys_with_the_place_of_the_client_added(clock: Clock) -> None:
    client = FakeClient(4, "a/0")
    ours, _ = federation(clock, client, count=1)
    ours.roster.wait_for(1)
    train(ours, server_round=3)
    (message,) = client.of_type(MessageType.TRAIN)
    assert message.content["config"]["server-round"] == 3
    assert weights.sha256(message.content["arrays"]) == weights.sha256(MODEL)
    assert dict(message.content["client"]) == {"position": 0, "kept": 0}
    facts = {"data": "/data", "fingerprint": fingerprint(DATA), "files": list(compared(cifar)), "classes": 20}
    server = dict(message.content["server"])
    assert re.fullmatch("[0-9a-f]{32}", server.pop("run")) and server == facts
    assert message.metadata.dst_node_id == 4


def test_what_one_client_is_sent_is_not_sent_to_another(clock: Clock) -> None:
    clients = [FakeClient(node, f"h/{node}", joins_after=node / 10) for node in (1, 2, 3)]
    ours, _ = federation(clock, *clients, count=3)
    ours.roster.wait_for(3)
    train(ours)
    assert [client.of_type("train")[0].content["client"]["position"] for client in clients] == [0, 1, 2]
    rows = [rows_of(client.of_type("train")[0]) for client in clients]
    assert sorted(chain(*rows)) == list(range(20))


def test_replies_come_in_order_of_partition_whatever_the_order_of_arrival(clock: Clock) -> None:
    delays = [3.0, 0.5, 2.0, 0.0]
    clients = [FakeClient(i + 1, f"h/{i}", i, 4, answers_after=delay) for i, delay in enumerate(delays)]
    ours, _ = federation(clock, *clients[::-1], count=4)
    ours.roster.wait_for(4)
    assert train(ours) == [0, 1, 2, 3]


def test_errors_are_dropped_said_and_counted(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    ours, _ = federation(clock, FakeClient(1, "a/0", fails="out of memory"), FakeClient(2, "b/0", joins_after=1))
    ours.roster.wait_for(2)
    assert train(ours) == [1]
    assert ours.pop_counters()["dropped"] == 1
    assert ours.pop_counters()["dropped"] == 0
    assert "client 0 (a/0) is left out: out of memory" in capsys.readouterr().out
    assert train(ours, 2) == [1], "it is asked again in the next round"


def test_a_client_that_leaves_while_it_is_asked_is_not_waited_for(clock: Clock) -> None:
    silent = FakeClient(1, "a/0", answers_after=math.inf)
    ours, grid = federation(clock, silent, FakeClient(2, "b/0", joins_after=1, answers_after=2))
    ours.roster.wait_for(2)
    started = clock.now
    clock.at(started + 5, lambda: grid.online.pop(1))
    assert train(ours) == [1]
    assert 5 <= clock.now - started <= 5 + client_grid.PRESENCE + 2 * roster.POLL
    assert ours.pop_counters()["dropped"] == 1


def test_clients_that_go_before_they_are_asked_are_dropped_and_counted(clock: Clock) -> None:
    ours, grid = federation(clock, *(FakeClient(i, f"h/{i}", i, 3) for i in range(3)), count=3)
    ours.roster.wait_for(3)
    messages = FedAvg(min_available_nodes=1).configure_train(1, MODEL, ConfigRecord(), ours)
    grid.online = {2: grid.online[2]}
    replies = ours.send_and_receive(messages)
    assert [reply.metadata.src_node_id for reply in replies] == [places(ours)[2]]
    assert ours.pop_counters()["dropped"] == 2


def test_a_reply_that_arrived_counts_even_if_its_client_has_gone_since(clock: Clock) -> None:
    quick = FakeClient(1, "a/0", answers_after=1)
    ours, grid = federation(clock, quick, FakeClient(2, "b/0", joins_after=1, answers_after=8))
    ours.roster.wait_for(2)
    clock.at(clock.now + 3, lambda: grid.online.pop(1))
    assert train(ours) == [0, 1]


def test_nobody_is_waited_for_beyond_the_timeout(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    slow = FakeClient(1, "a/0", answers_after=math.inf)
    ours, _ = federation(clock, slow, FakeClient(2, "b/0", joins_after=1), round_timeout=7)
    ours.roster.wait_for(2)
    started = clock.now
    assert train(ours) == [1]
    assert 7 <= clock.now - started <= 7 + roster.POLL
    assert ours.pop_counters()["dropped"] == 1
    assert "client 0 (a/0) is left out: no reply within 7 s" in capsys.readouterr().out


def test_a_late_reply_is_not_taken_for_one_of_the_next_round(clock: Clock) -> None:
    slow = FakeClient(1, "a/0", answers_after=9)
    ours, _ = federation(clock, slow, FakeClient(2, "b/0", joins_after=1), round_timeout=7)
    ours.roster.wait_for(2)
    assert train(ours, 1) == [1]
    slow.answers_after = 3
    assert train(ours, 2) == [0, 1]
    assert len(slow.of_type("train")) == 2


def test_every_message_names_the_rows_so_that_no_client_need_remember_them(clock: Clock) -> None:
    client = FakeClient(1, "a/0", fails="busy")
    ours, grid = federation(clock, client, count=1)
    ours.roster.wait_for(1)
    for client.fails in ("busy", "", ""):
        train(ours)
    again = FakeClient(2, "a/0")
    grid.online = {2: again}
    ours.roster.wait_for(1)
    train(ours)
    told = [rows_of(message) for message in (*client.of_type("train"), *again.of_type("train"))]
    assert told == 4 * [list(range(20))]


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 16, 1000, 10_007])
def test_a_mask_is_a_bit_per_sample_and_decodes_to_the_rows(clock: Clock, samples: int) -> None:
    data = (np.zeros(samples), np.arange(samples)), (np.zeros(samples + 3), np.arange(samples + 3))
    grid = FakeGrid(clock, [])
    for partitions in {1, min(samples, 3), min(samples, 8)}:
        ours = ClientGrid(grid, Roster(grid, validate({"num-clients": partitions}), model_with(data)))
        for split, size in (("train", samples), ("test", samples + 3)):
            for rows in ours.roster.parts[split]:
                mask = ours.delivery.mask(split, rows)
                assert (mask.dtype, mask.nbytes) == (np.uint8, math.ceil(size / 8))
                assert np.flatnonzero(np.unpackbits(mask, count=size)).tolist() == rows.tolist()


def model_with(data: Any) -> SimpleNamespace:
    """Return what a Roster wants to know of the server's model."""
    return SimpleNamespace(root="/data", data=data, task=cifar)


def own_samples(mask: ArrayRecord | None, server_data: Any = DATA) -> list[int]:
    """Return the labels that a real client takes of the test samples, on being told `mask`."""
    settings = ConfigRecord({"data": "", "fingerprint": fingerprint(server_data)})
    content = RecordDict({"server": settings} | ({"rows": mask} if mask else {}))
    task: Any = ModuleType("task")
    task.load_data = lambda root: DATA
    message = Message(content, 1, MessageType.EVALUATE)
    with patch.object(job, "load_task", lambda name: task):
        return job.Job(message, Context(1, 1, {}, RecordDict(), {})).samples("test")[1].tolist()


def test_a_client_takes_the_samples_of_its_mask_and_refuses_one_for_other_data(clock: Clock) -> None:
    ours, _ = federation(clock)
    mask = ArrayRecord({"mask": Array(ours.delivery.mask("test", np.array([0, 8, 11], np.int32)))})
    assert own_samples(mask) == [0, 8, 11]
    assert own_samples(None) == list(range(12)), "without a mask, all are its own"
    with pytest.raises(ValueError, match="the data here are not the server's any more: as many training labels"):
        own_samples(mask, ((DATA[0][0], DATA[0][1][::-1]), DATA[1]))


def test_bytes_are_counted_both_ways(clock: Clock) -> None:
    clients = [FakeClient(node, f"h/{node}", joins_after=node / 10) for node in (1, 2)]
    ours, _ = federation(clock, *clients)
    ours.roster.wait_for(2)
    for server_round in (1, 2):
        train(ours, server_round)
        masks = sum(weights.size(client.of_type("train")[-1].content["rows"]) for client in clients)
        model = weights.size(MODEL)
        assert masks == 2 * len(Array(np.zeros(3, np.uint8)).data), "20 samples are 3 bytes and NumPy's header"
        counted = {"dropped": 0, "bytes_down": 2 * model + masks, "bytes_up": 2 * model}
        assert ours.pop_counters() == counted | {"waiting_seconds": pytest.approx(0.2 if server_round == 1 else 0)}
    assert not any(ours.pop_counters().values())


def test_evaluations_that_all_fail_are_an_error_but_clients_that_have_left_are_none(clock: Clock) -> None:
    clients = [FakeClient(node, f"h/{node}") for node in (1, 2)]
    ours, grid = federation(clock, *clients)
    ours.roster.wait_for(2)
    clients[0].fails = clients[1].fails = "no such module: helper"
    strategy = FedAvg(min_available_nodes=1)
    with pytest.raises(RuntimeError, match="round 4: no client could evaluate the model: no such module: helper"):
        ours.evaluate(strategy, 4, MODEL)
    for each in clients:
        each.fails, each.answers_after = "", math.inf
    clock.at(clock.now + 3, grid.online.clear)
    assert ours.evaluate(strategy, 5, MODEL) == []


@pytest.mark.parametrize(("loss", "accuracy", "warns"), [(0.5, 0.5, False), (0.6, 0.5, True), (0.5, 0.75, True)])
def test_clients_that_find_something_else_than_the_server_are_reported(
    clock: Clock, loss: float, accuracy: float, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, _ = federation(clock, FakeClient(1, "a/0"), FakeClient(2, "b/0"))
    ours.roster.wait_for(2)
    found = {"clients_loss": 0.5, "clients_accuracy": 0.5, "server_loss": loss, "server_accuracy": accuracy}
    ours.check_agreement([], found)
    assert "warning" not in capsys.readouterr().out, "nobody has evaluated"
    ours.check_agreement(ours.evaluate(FedAvg(min_available_nodes=1), 1, MODEL), found)
    said = capsys.readouterr().out
    assert ("clients and server differ on the same 12 test samples: loss 0.5000 and" in said) == warns
    half = FedAvg(fraction_evaluate=0.5, min_evaluate_nodes=1, min_available_nodes=1)
    ours.check_agreement(ours.evaluate(half, 2, MODEL), found)
    assert "warning" not in capsys.readouterr().out, "half of the samples may well be others"


def test_asking_nobody_returns_at_once(clock: Clock) -> None:
    ours, _ = federation(clock)
    assert ours.send_and_receive([]) == []
    assert clock.now == 0


# ------------------------------------------------------------------------------------- nodes that play several clients


def replies_of(node: FakeClient, message: Message, change: Callable[[int, bundle.Content], bundle.Content]) -> Message:
    """Return what a node that plays several clients replies, with the content for each of them changed by `change`."""
    contents = []
    for content in bundle.unpack(message.content):
        assert isinstance(content, RecordDict)
        alone = Message(content, node.node, message.metadata.message_type)
        contents.append(change(int(content["client"]["position"]), FakeClient.answer(node, alone).content))
    return Message(bundle.pack(contents), reply_to=message)


@dataclass
class FakeNode(FakeClient):
    """A node that plays several clients. `change` is what it makes of the replies of each, by position."""

    change: Callable[[int, bundle.Content], bundle.Content] = lambda position, content: content

    def answer(self, message: Message) -> Message:
        if bundle.INDEX not in message.content:
            return super().answer(message)
        return replies_of(self, message, self.change)


def test_a_node_of_several_clients_gets_one_message_and_the_strategy_does_not_notice(clock: Clock) -> None:
    alone, many = FakeClient(1, "a/0", wanted=0, partitions=5), FakeNode(2, "b/0", clients=4, joins_after=1)
    ours, _ = federation(clock, alone, many, count=5)
    ours.roster.wait_for(5)
    assert ours.get_node_ids() == [0, 1, 2, 3, 4] == train(ours)
    (message,) = many.of_type("train")
    contents = bundle.unpack(message.content)
    assert sorted(content["client"]["position"] for content in contents) == [1, 2, 3, 4]
    rows = [rows_of(Message(content, 2, "train")) for content in contents] + [rows_of(alone.of_type("train")[0])]
    assert sorted(chain(*rows)) == list(range(20))
    assert len(message.content.array_records) == 2, "the model, and the rows of all"


def test_a_bad_reply_of_a_bundle_is_dropped_alone(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(position: int, content: bundle.Content) -> bundle.Content:
        assert isinstance(content, RecordDict)
        if position == 1:
            content["arrays"] = ArrayRecord({"w": Array(np.full(4, np.nan, np.float32))})
        return "out of memory" if position == 3 else content

    ours, _ = federation(clock, FakeNode(1, "a/0", clients=5, change=spoil), count=5)
    ours.roster.wait_for(5)
    assert train(ours) == [0, 2, 4] and ours.pop_counters()["dropped"] == 2
    said = capsys.readouterr().out
    assert "client 1 (a/0) is left out: w is not finite" in said
    assert "client 3 (a/0) is left out: out of memory" in said


@pytest.mark.parametrize("reply", [RecordDict(), RecordDict({"bundle": ConfigRecord({"json": "{}"})}),
                                   bundle.pack([RecordDict()]), bundle.pack(["no"] * 30)], ids=range(4))  # fmt: skip
def test_a_bundle_that_cannot_be_read_costs_its_node_only(
    clock: Clock, reply: RecordDict, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = FakeNode(1, "a/0", clients=11)
    broken.answer = lambda message: (  # type: ignore[method-assign]
        Message(reply, reply_to=message) if bundle.INDEX in message.content else FakeClient.answer(broken, message)
    )
    ours, _ = federation(clock, broken, FakeClient(2, "b/0", joins_after=1), count=12)
    ours.roster.wait_for(12)
    assert train(ours) == [11] and ours.pop_counters()["dropped"] == 11
    assert "11 clients are left out: " in capsys.readouterr().out, "and not a line for each"


def test_more_models_than_a_bundle_may_hold_go_one_bundle_after_the_other(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "BUNDLED", 2 * weights.size(MODEL))
    many = FakeNode(1, "a/0", clients=5, answers_after=3)
    ours, _ = federation(clock, many, count=5)
    ours.roster.wait_for(5)
    start, arrived = clock.now, []
    clock.at(start + 2, lambda: arrived.append(len(many.of_type("train"))))
    assert train(ours) == [0, 1, 2, 3, 4]
    assert arrived == [1] and 9 <= clock.now - start < 10, "the next one leaves when the last one is answered"
    assert [len(bundle.unpack(message.content)) for message in many.of_type("train")] == [2, 2, 1]
    ours.send_and_receive(FedAvg(min_available_nodes=1).configure_evaluate(1, MODEL, ConfigRecord(), ours))
    assert len(many.of_type("evaluate")) == 1, "replies without models are small"


@pytest.mark.parametrize("limit", [{"round_timeout": 4}, {}], ids=["too late", "left"])
def test_what_a_node_has_not_been_sent_yet_is_given_up_with_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, limit: dict[str, int]
) -> None:
    monkeypatch.setattr(delivery, "BUNDLED", 1)
    ours, grid = federation(clock, FakeNode(1, "a/0", clients=3, answers_after=3), count=3, **limit)
    ours.roster.wait_for(3)
    if not limit:
        clock.at(clock.now + 4, lambda: grid.online.pop(1))
    assert len(train(ours)) == 1 and ours.pop_counters()["dropped"] == 2
    assert not ours.delivery.sent and not any(ours.delivery.queued.values())


def test_a_node_that_leaves_takes_its_clients_with_it_and_they_get_their_partitions_back(clock: Clock) -> None:
    nodes = FakeNode(1, "a/0", clients=2), FakeNode(2, "b/0", clients=3, joins_after=1, answers_after=math.inf)
    ours, grid = federation(clock, *nodes, count=5)
    ours.roster.wait_for(5)
    clock.at(clock.now + 5, lambda: grid.online.pop(2))
    assert train(ours) == [0, 1] and ours.pop_counters()["dropped"] == 3 and ours.get_node_ids() == [0, 1]
    grid.online[9] = FakeNode(9, "b/0", clients=3)
    ours.roster.wait_for(5)
    assert train(ours) == [0, 1, 2, 3, 4]
    assert {c.position for c in ours.roster.clients.values() if c.node == 9} == {2, 3, 4}


def test_a_node_that_comes_back_with_fewer_clients_leaves_partitions_free(clock: Clock) -> None:
    ours, grid = federation(clock, FakeNode(1, "a/0", clients=3), count=4)
    ours.roster.wait_for(3)
    del grid.online[1]
    ours.roster.poll_new_nodes()
    grid.online[1] = FakeNode(1, "a/0", clients=2)
    ours.roster.wait_for(2)
    assert ours.get_node_ids() == [0, 1]
    grid.online |= {2: FakeClient(2, "b/0"), 3: FakeClient(3, "c/0", joins_after=1)}
    ours.roster.wait_for(4)
    assert places(ours)[3] == 2 or places(ours)[2] == 2


def test_more_clients_than_partitions_are_refused(clock: Clock) -> None:
    many = FakeNode(1, "a/0", clients=3)
    ours, grid = federation(clock, many, FakeClient(2, "b/0", joins_after=20), count=2)
    ours.roster.wait_for(1)
    assert_refused(grid, ours, many, "all 2 partitions are taken")


def test_several_clients_of_a_node_cannot_have_data_of_its_own(clock: Clock) -> None:
    many = FakeNode(1, "a/0", clients=3, own_data="others")
    ours, grid = federation(clock, many, FakeClient(2, "b/0", joins_after=20), count=2)
    ours.roster.wait_for(1)
    assert_refused(grid, ours, many, "it plays 3 clients, but its data are not a copy of the server's (others)")


def test_a_partition_of_data_that_a_client_does_not_have_is_refused(clock: Clock) -> None:
    chooser = FakeClient(1, "a/0", clients=1, wanted=1, partitions=2, own_data="others")
    ours, grid = federation(clock, chooser, FakeClient(2, "b/0", joins_after=20), count=2)
    ours.roster.wait_for(1)
    why = "it wants partition 1 of the server's data, but its data are not a copy of the server's (others)"
    assert_refused(grid, ours, chooser, f"{why}; leave --partition-id out")


def test_other_data_in_a_simulation_are_an_error(clock: Clock) -> None:
    ours, _ = federation(clock, FakeNode(1, "", wanted=0, partitions=2, own_data="others"), count=2)
    with pytest.raises(RuntimeError, match="a client of the simulation has other data than the server: others"):
        ours.roster.wait_for(1)


@pytest.mark.parametrize(
    ("nodes", "clients", "shares"),
    [(2, 10, [5, 5]), (3, 10, [4, 3, 3]), (1, 4, [4]), (4, 2, [1] * 4), (2, 3, [2, 1]), (8, 10, [2, 2] + [1] * 6)],
)
def test_nodes_of_a_simulation_share_the_clients(clock: Clock, nodes: int, clients: int, shares: list[int]) -> None:
    """With more nodes than clients there are as many clients as nodes, as Flower users expect of `flwr run`."""
    engine = [FakeNode(100 + i, "", wanted=i, partitions=nodes) for i in range(nodes)]
    ours, _ = federation(clock, *engine, count=clients)
    ours.roster.wait_for(max(nodes, clients))
    assert train(ours) == list(range(max(nodes, clients)))
    held = [[c.position for c in ours.roster.clients.values() if c.node == node.node] for node in engine]
    assert [len(positions) for positions in held] == shares
    assert all(position % nodes == i for i, positions in enumerate(held) for position in positions)


def test_a_strategy_may_use_it_as_any_other_grid(clock: Clock) -> None:
    ours, _ = federation(clock, FakeNode(1, "a/0", clients=2), count=2)
    ours.roster.wait_for(2)
    content = RecordDict({"arrays": MODEL, "config": ConfigRecord({"server-round": 1})})
    messages = [ours.create_message(content, MessageType.TRAIN, client, "1") for client in ours.get_node_ids()]
    ids = ours.push_messages(messages)
    replies = ours.pull_messages(ids[1:]) + ours.pull_messages(ids)
    assert isinstance(ours, Grid) and len(set(ids)) == 2
    assert sorted(reply.metadata.src_node_id for reply in replies) == [0, 1] and ours.pull_messages(ids) == []


# ----------------------------------------------------------------------------------------------------- sampling


def sampled(clock: Clock, nodes: list[int], seed: int, server_round: int) -> list[int]:
    """Return which positions FedAvg samples, in its order, where node i of `nodes` holds partition i."""
    clients = [FakeClient(node, f"h/{node}", i, len(nodes)) for i, node in enumerate(nodes)]
    ours, _ = federation(clock, *sorted(clients, key=lambda client: client.node), count=len(nodes))
    ours.roster.wait_for(len(nodes))
    strategy = FedAvg(fraction_train=0.5, min_train_nodes=1, min_available_nodes=1)
    seed_sampling(seed, server_round)
    messages = strategy.configure_train(server_round, MODEL, ConfigRecord(), ours)
    return [message.metadata.dst_node_id for message in messages]


def test_sampling_is_a_function_of_seed_and_round_whatever_the_node_ids(clock: Clock) -> None:
    for server_round in range(1, 6):
        one = sampled(clock, [10, 20, 30, 40, 50, 60], 7, server_round)
        other = sampled(clock, [66, 5, 44, 33, 222, 11], 7, server_round)
        assert one == other and len(set(one)) == 3


def test_sampling_changes_with_round_and_seed(clock: Clock) -> None:
    nodes = [10, 20, 30, 40, 50, 60]
    rounds = {tuple(sorted(sampled(clock, nodes, 7, server_round))) for server_round in range(1, 9)}
    seeds = {tuple(sorted(sampled(clock, nodes, seed, 1))) for seed in range(8)}
    assert len(rounds) > 2 and len(seeds) > 2
    assert set().union(*rounds) == set(range(6)), "everybody has a turn"


# ------------------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("error", ["", "round 1: no client returned a model"])
def test_all_are_told_the_end_and_it_waits_until_they_have_gone(clock: Clock, error: str) -> None:
    clients = [FakeClient(node, f"h/{node}", joins_after=node / 10) for node in (1, 2)]
    ours, grid = federation(clock, *clients)
    ours.roster.wait_for(2)
    started = clock.now
    ours.roster.end_session(error)
    assert [str(c.of_type("query.leave")[0].content["goodbye"]["error"]) for c in clients] == [error, error]
    assert grid.online == {} and clock.now - started <= 1 + roster.POLL


def test_one_who_stays_is_not_waited_for_for_ever(clock: Clock) -> None:
    ours, _ = federation(clock, FakeClient(1, "a/0", stays=True), count=1)
    ours.roster.wait_for(1)
    started = clock.now
    ours.roster.end_session()
    assert clock.now - started <= 15 + roster.POLL


def test_simulated_clients_which_have_no_name_are_not_waited_for(clock: Clock) -> None:
    clients = [FakeClient(node, "", wanted=i, partitions=2, stays=True) for i, node in enumerate((1, 2))]
    ours, _ = federation(clock, *clients)
    ours.roster.wait_for(2)
    started = clock.now
    ours.roster.end_session()
    assert clock.now == started and all(client.of_type("query.leave") == [] for client in clients)
