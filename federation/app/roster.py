"""Who takes part: nodes join with the clients that they play, each client gets a partition, and all leave."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from federation.app import partition, samples
from federation.app.config import RunConfig
from federation.app.console import one_line, print_to_user
from federation.app.fingerprint import fingerprint
from federation.app.live import LONGEST_NAME, Live
from federation.app.sources import compared, digest
from federation.app.task import classes_of

POLL = 0.1  # seconds between two looks for replies
NODE_UNAVAILABLE = 5  # the code of Flower's reply in the place of a node that has gone
JOIN_TIMEOUT = 120  # seconds that a round waits for nodes that are joining: who takes longer joins a later one
JOIN_SCHEMA = {  # what a node says of itself, by type
    "name": str, "key": str, "clients": int, "partition-id": int, "num-partitions": int, "flwr": str, "files": list,
    "own-data": str, "train-samples": int, "test-samples": int,
}  # fmt: skip


@dataclass(frozen=True)
class Client:
    """A client that has joined. `position` is its partition, or for one with data of its own, its number."""

    position: int
    node: int
    name: str  # its host, and its place there; "" if client.py did not start it
    key: str  # what tells it from all others, even after a restart of it or of the server; "" likewise
    rows: dict[str, partition.Rows] | None  # by split; None for one with data of its own
    samples: dict[str, int]  # how many it has joined with, by split
    shares_node: bool  # with other clients, so that its messages travel in a bundle
    own_data: str  # why its data are its own, and no copy of the server's; "" if they are one


@dataclass(frozen=True)
class Past:
    """What is known of a run before its clients join: something only if it is resumed."""

    run: str = field(default_factory=lambda: uuid.uuid4().hex)  # its name, under which clients keep their state
    places: Mapping[str, int] = field(default_factory=dict)  # which client, by key, had which partition
    num_partitions: int = 0
    trained: Mapping[int, int] = field(default_factory=dict)  # the last round in which each client trained
    live: Live = field(default_factory=Live)  # who is to be told what happens now


class Roster:
    """The clients of a run, by position, and the nodes that play them."""

    def __init__(self, grid: Grid, config: RunConfig, model: Any, past: Past | None = None) -> None:
        """Split the data of the server's `model` for clients that join through `grid`; without any, all have their own.

        `past` is what is known of a run that is resumed.
        """
        past = past or Past()
        self.grid, self.config = grid, config
        self.data = data = model.data
        self.counts = {"train": 0, "test": 0}
        if data:
            tested = data[0 if config.validation_fraction else 1]
            self.counts = {"train": samples.count(data[0]), "test": samples.count(tested)}
        self.files = {name: digest(path) for name, path in compared(model.task).items()}
        self.facts = ConfigRecord(  # what every message tells of the server
            {
                "data": model.root,
                "fingerprint": fingerprint(data) if data else "",
                "files": list(self.files),
                "classes": classes_of(model.task, data[0]) if data else 0,
                "run": past.run,
            }
        )
        self.waited = 0.0  # seconds, for clients to join
        self.split(past.num_partitions or config.num_clients)
        self.clients: dict[int, Client] = {}
        self.joining: dict[str, int] = {}  # message id: node
        self.join_deadline = 0.0
        self.known_nodes: set[int] = set()
        self.places = dict(past.places)  # which client, by key, has or had which partition
        self.trained = dict(past.trained)  # the last round in which the client of a partition has trained
        self.online: set[int] = set()  # the nodes, when somebody looked last
        self.live = past.live
        self.live.sources["roster"] = self.columns

    def split(self, partitions: int) -> None:
        """Split the data, once for the run. Raises ValueError where that cannot be."""
        self.parts = partition.split_data(self.data, partitions, self.config) if self.data else {}
        self.partitions = partitions

    def held_partitions(self) -> dict[str, list[partition.Rows]]:
        """Return the rows of all partitions, by split; none if every client has data of its own."""
        return self.parts if any(client.rows for client in self.clients.values()) else {}

    def present(self) -> list[Client]:
        """Return the clients that are online, by position."""
        online = self.look()
        return sorted((c for c in self.clients.values() if c.node in online), key=lambda client: client.position)

    def look(self) -> set[int]:
        """Return the nodes that are online."""
        self.online = set(self.grid.get_node_ids())
        return self.online

    def columns(self) -> dict[str, list[Any]]:
        """Return, for metrics.json, columns with a value for each client that has joined, by position."""
        clients = sorted(self.clients.values(), key=lambda client: client.position)
        return {
            "client": [client.position for client in clients],
            "name": [client.name[:LONGEST_NAME] for client in clients],
            "here": [client.node in self.online for client in clients],
            "train": [client.samples["train"] for client in clients],
            "test": [client.samples["test"] for client in clients],
            "own_data": [client.own_data for client in clients],
            "trained": [self.trained.get(client.position) for client in clients],
        }

    # ------------------------------------------------------------------------------------------------------ joining

    def wait_for(self, count: int) -> None:
        """Return once `count` clients are present; admit the nodes that come meanwhile."""
        started = time.monotonic()
        self.poll_new_nodes()
        if len(self.present()) < count:
            print_to_user(f"waiting for {count} clients, {len(self.present())} here")
            self.live.begin(f"waiting for {count} clients")
        while len(self.present()) < count or (self.joining and time.monotonic() < self.join_deadline):
            time.sleep(POLL)
            self.poll_new_nodes()
            self.live.tick()
        self.waited += time.monotonic() - started

    def poll_new_nodes(self) -> None:
        """Ask new nodes to introduce themselves, and admit those that have."""
        online = self.look()
        new = online - self.known_nodes  # or those that have been away: a key's node comes back under its old id
        self.known_nodes = online
        if new:
            self.join_deadline = time.monotonic() + JOIN_TIMEOUT
            hello = RecordDict({"server": self.facts})
            asked = zip(self._query("join", hello, new), new, strict=True)
            self.joining |= {message: node for message, node in asked if message}  # no id: it has gone already
        online = self.look()  # before the look for replies: who replies and goes is heard
        for reply in self.grid.pull_messages(list(self.joining)) if self.joining else ():
            self.admit(self.joining.pop(reply.metadata.reply_to_message_id), reply)
        self.joining = {message: node for message, node in self.joining.items() if node in online}

    def _query(self, action: str, content: RecordDict, nodes: Iterable[int]) -> Iterable[str]:
        """Send a query to `nodes` and return the messages' ids."""
        kind = f"{MessageType.QUERY}.{action}"
        return self.grid.push_messages([Message(content, node, kind, group_id=action) for node in nodes])

    def admit(self, node: int, reply: Message) -> None:
        """Give the clients of a new node their partitions, or send it away."""
        if reply.has_error():
            why = "it has left" if from_nobody(reply) else one_line(reply.error.reason)
            print_to_user(f"a client could not join: {why}")
            self.live.refuse("", why)
            return
        facts: dict[str, Any] = dict(reply.content.config_records.get("client") or {})
        if {key: type(value) for key, value in facts.items()} != JOIN_SCHEMA:
            print_to_user("a client could not join: it does not introduce itself as client.py does")
            self.live.refuse("", "it does not introduce itself as client.py does")
            return
        try:
            joined = self._clients_of(node, facts)
        except ValueError as error:
            print_to_user(f"{facts['name']} may not join: {error}")
            self.live.refuse(facts["name"], str(error))
            self.end_session(str(error), node)
            return
        self.clients = {position: client for position, client in self.clients.items() if client.node != node}
        self.clients |= {client.position: client for client in joined}
        given = {client.position for client in joined}
        for former in [key for key, place in self.places.items() if place in given]:
            if former not in {client.key for client in joined}:
                self.trained.pop(self.places[former], None)  # the new one has kept nothing
            del self.places[former]
        self.places |= {client.key: client.position for client in joined if client.key}
        print_to_user(self._welcome(joined))

    def _welcome(self, joined: list[Client]) -> str:
        first, samples = joined[0], sum(client.samples["train"] for client in joined)
        who = f"client {first.position}" if len(joined) == 1 else f"{len(joined)} clients"
        copy = f"of {self.counts['train']:,}, a copy of the server's data"
        share = copy if first.rows else f"of its own: {first.own_data}"
        return f"{who} joined{' from ' * bool(first.name)}{first.name}: {samples:,} samples {share}"

    def _clients_of(self, node: int, facts: dict[str, Any]) -> list[Client]:
        """Return the clients that a node plays, each with its place. Raises ValueError if the node may not join."""
        check_version(facts["flwr"])
        self._check_files(facts["files"])
        copy = not facts["own-data"]
        wanted = self._wanted(facts)
        if not copy:
            self._check_own_data(facts, wanted)
        keys = [facts["key"] and facts["key"] + f" {slot}" * bool(slot) for slot in range(len(wanted))]
        counted = self.partitions if self._has_shares(facts) else facts["num-partitions"]
        positions = self._assign_partitions(node, wanted, keys, counted, copy)
        pairs = zip(positions, keys, strict=True)
        return [self._client(position, node, key, facts, copy, len(wanted) > 1) for position, key in pairs]

    def _check_files(self, digests: list[str]) -> None:
        theirs = dict(zip(self.files, digests, strict=False))
        for name, ours in self.files.items():
            if theirs.get(name) != ours:
                raise ValueError(f"its {name} differs from the server's: copy that, or start the client in a folder "
                                 "without one, and it runs the server's")  # fmt: skip

    def _check_own_data(self, facts: dict[str, Any], wanted: list[int]) -> None:
        """Raise an error where a client has data of its own and cannot: RuntimeError in a simulation."""
        found = f"{facts['own-data']:.300}"
        if _is_simulated(facts):
            raise RuntimeError(f"a client of the simulation has other data than the server: {found}; "
                               "load_data() has to return the same in every process")  # fmt: skip
        why = f"its data are not a copy of the server's ({found})"
        if len(wanted) > 1:
            raise ValueError(f"it plays {len(wanted)} clients, but {why}; with data of its own it can play one")
        if wanted[0] >= 0:
            raise ValueError(
                f"it wants partition {wanted[0]} of the server's data, but {why}; leave --partition-id out"
            )

    def _client(
        self, position: int, node: int, key: str, facts: dict[str, Any], copy: bool, shares_node: bool
    ) -> Client:
        rows = {split: parts[position] for split, parts in self.parts.items()} if copy else None
        own = {"train": facts["train-samples"], "test": facts["test-samples"]}
        samples = {split: len(held) for split, held in rows.items()} if rows else own
        return Client(position, node, facts["name"], key, rows, samples, shares_node, f"{facts['own-data']:.300}")

    def _wanted(self, facts: dict[str, Any]) -> list[int]:
        """Return the partitions that the clients of a node want, -1 for any. The first node settles how many there are.

        A node of the Simulation Engine, which names no number of clients, plays its share of them: node i of n those
        of partitions i, i + n, i + 2n, and so on.
        """
        nodes, simulated = facts["num-partitions"], _is_simulated(facts)
        partitions = max(nodes, self.config.num_clients) if simulated else nodes
        if not self.clients and partitions not in (0, self.partitions):
            self.split(partitions)
        if self._has_shares(facts):
            return list(range(facts["partition-id"], self.partitions, nodes))
        return [facts["partition-id"]] * max(1, facts["clients"])

    def _has_shares(self, facts: dict[str, Any]) -> bool:
        """Tell whether a node plays its share of the clients of a simulation, which has more of them than nodes."""
        return _is_simulated(facts) and facts["num-partitions"] < self.partitions

    def _assign_partitions(self, node: int, wanted: list[int], keys: list[str], counted: int, copy: bool) -> list[int]:
        """Return a place for each client of a node: the one it wants, its old one, or the first that is free."""
        others = {client.position: client for client in self.present() if client.node != node}  # it may have been away
        taken = {c.position for c in self.clients.values() if c.node != node} | set(self.places.values())
        places: list[int] = []
        for want, key in zip(wanted, keys, strict=True):
            if want >= 0:
                self._check_wanted(want, key, counted, others)
                places.append(want)
            elif key in self.places and (self.places[key] < self.partitions) == copy:  # or its data have changed since
                places.append(self.places[key])
            else:
                places.append(self._free_place(taken | set(places), set(others) | set(places), copy))
        return places

    def _check_wanted(self, wanted: int, key: str, counted: int, others: dict[int, Client]) -> None:
        if counted != self.partitions:
            raise ValueError(f"it counts {counted} partitions, but this run has {self.partitions}")
        if wanted in others and not (key and others[wanted].key == key):
            raise ValueError(f"partition {wanted} is taken by {others[wanted].name or 'another client'}")

    def _free_place(self, taken: set[int], present: set[int], copy: bool) -> int:
        """Return the first place that nobody has had, or else that nobody who is present has."""
        count = self.partitions
        places = range(count) if copy else range(count, count + len(taken) + 1)
        free = [place for place in places if place not in taken] or [place for place in places if place not in present]
        if not free:
            raise ValueError(f"all {count} partitions are taken; start the server with more --clients")
        return free[0]

    # ------------------------------------------------------------------------------------------------------ leaving

    @contextmanager
    def session(self, meanwhile: Callable[[], object]) -> Iterator[None]:
        """End the session of all clients when the block ends, and tell them if it has failed.

        `meanwhile` is called at a good end, while clients leave.
        """
        try:
            yield
        except Exception as error:
            self.end_session(one_line(error))
            raise
        self.end_session(meanwhile=meanwhile)

    def end_session(
        self, error: str = "", node: int | None = None, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Tell all nodes, or one, that they are done, well ("") or not; wait until they have gone.

        `meanwhile` is called before the wait. The nodes of a simulation are not told: they end with it.
        """
        named = {client.node for client in self.clients.values() if client.name}
        nodes = (named if node is None else {node}) & set(self.grid.get_node_ids())
        goodbye = RecordDict({"goodbye": ConfigRecord({"error": error})})
        self._query("leave", goodbye, nodes)
        meanwhile()
        deadline = time.monotonic() + (15 if node is None else 0)  # one who is refused holds nobody up
        while nodes & set(self.grid.get_node_ids()) and time.monotonic() < deadline:
            time.sleep(POLL)


def _is_simulated(facts: dict[str, Any]) -> bool:
    """Tell whether a node is of Flower's Simulation Engine: it has a partition, but client.py has not started it."""
    return bool(facts["clients"] == 0 and facts["num-partitions"] > 0)


def from_nobody(reply: Message) -> bool:
    """Tell whether a reply says no more than that its node has gone: Flower speaks of heartbeats, even after Ctrl-C."""
    return reply.has_error() and reply.error.code == NODE_UNAVAILABLE


def check_version(theirs: str) -> None:
    """Raise ValueError unless a client runs the same minor release of Flower: others may speak another protocol."""
    ours = version("flwr")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ValueError(f"it runs Flower {theirs}, the server {ours}; install flwr=={ours} there")
