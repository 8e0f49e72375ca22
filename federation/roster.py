"""Who takes part: clients join, get a partition each, are asked, answer, and leave."""

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from federation import partition, weights
from federation.config import Config
from federation.console import reason, say, tell
from federation.packing import pack, unpack
from federation.strategy import check_reply
from federation.task import data_digest, load_task, source_digest

POLL = 0.2  # seconds between two looks for replies: more looks take time from clients on the same machine
PATIENCE = 120  # seconds for which a round waits for somebody to finish joining: who takes longer joins a later one
PRESENCE = 2.0  # seconds between two looks at who is still there
FACTS = {  # what a client says of itself, by type
    "name": str, "key": str, "partition-id": int, "num-partitions": int, "flwr": str, "task": str, "data": str,
    "train-samples": int, "test-samples": int,
}  # fmt: skip


@dataclass
class Client:
    """A client that has joined. `position` is its partition, or for one with data of its own, its number."""

    node: int
    name: str  # its host, and its place there; "" if client.py did not start it
    key: str  # what tells it from all others, even after a restart of it or of the server; "" likewise
    position: int
    rows: dict[str, partition.Rows] | None  # by split; None for one with data of its own
    samples: dict[str, int]  # how many it has joined with, by split


class Roster:
    """The clients of a run, on top of Flower's Grid."""

    def __init__(self, grid: Grid, config: Config, root: str, data: Any) -> None:
        self.grid, self.config, self.root = grid, config, root
        self.digest, self.code = data_digest(data), source_digest(load_task(config["task"]))
        self.labels = data[0][1], data[1][1]
        self.deal(config["num-clients"])
        self.clients: dict[int, Client] = {}  # by node
        self.joining: dict[str, int] = {}  # message id: node
        self.patient_until = 0.0
        self.met: set[int] = set()
        self.places: dict[str, int] = {}  # which client, by key, has or had which partition
        self.dropped = self.bytes_down = self.bytes_up = 0

    def remember(self, metrics: dict[str, Any]) -> None:
        """Go on from what a run has reported, and keep that up to date: who has which of how many partitions."""
        self.places = metrics["clients"]
        if dealt := metrics["partitions"].get("train"):
            self.deal(len(dealt))

    # ------------------------------------------------------------------------------------------------------ joining

    def wait_for(self, count: int) -> None:
        """Return once `count` clients are present; greet those that come on the way."""
        self.greet()
        if len(self.present()) < count:
            say(f"waiting for {count} clients, {len(self.present())} here")
        while len(self.present()) < count or (self.joining and time.monotonic() < self.patient_until):
            time.sleep(POLL)
            self.greet()

    def greet(self) -> None:
        """Ask nodes that are new to introduce themselves, and seat those that have."""
        online = set(self.grid.get_node_ids())
        strangers = online - self.met  # or those that have been away: a key's node comes back under its old id
        self.met = online
        if strangers:
            self.patient_until = time.monotonic() + PATIENCE
            hello = RecordDict({"client": ConfigRecord({"data": self.root})})
            asked = zip(self.send(hello, "join", strangers), strangers, strict=True)
            self.joining |= {message: node for message, node in asked if message}  # no id: it has gone already
        online = set(self.grid.get_node_ids())  # before the look for replies: who replies and goes is heard
        for reply in self.grid.pull_messages(list(self.joining)) if self.joining else ():
            self.seat(self.joining.pop(reply.metadata.reply_to_message_id), reply)
        self.joining = {message: node for message, node in self.joining.items() if node in online}

    def send(self, content: RecordDict, query: str, nodes: Iterable[int]) -> Iterable[str]:
        """Send a query to `nodes` and return the messages' ids."""
        kind = f"{MessageType.QUERY}.{query}"
        return self.grid.push_messages([Message(content, node, kind, group_id=query) for node in nodes])

    def seat(self, node: int, reply: Message) -> None:
        """Give a new client its place, or send it away."""
        if reply.has_error():
            say(f"a client could not join: {reason(reply.error.reason)}")
            return
        facts: dict[str, Any] = dict(reply.content.config_records.get("client") or {})
        if {key: type(value) for key, value in facts.items()} != FACTS:
            say("a client could not join: it does not introduce itself as client.py does")
            return
        name, copy = facts["name"], facts["data"] == self.digest
        try:
            check_version(facts["flwr"])
            if facts["task"] != self.code:
                raise ValueError(f"its copy of {self.config['task']} differs from the server's: copy that, or start "
                                 "the client in a folder without one, and it runs the server's")  # fmt: skip
            first = not self.clients  # the first client to join settles how many partitions there are
            if first and facts["num-partitions"] not in (0, self.partitions):
                self.deal(facts["num-partitions"])
            position = self.place(node, facts["key"], facts["partition-id"], facts["num-partitions"], copy)
            rows = {split: parts[position] for split, parts in self.parts.items()} if copy else None
            own = {"train": facts["train-samples"], "test": facts["test-samples"]}
            samples = {split: len(held) for split, held in rows.items()} if rows else own
        except ValueError as error:
            say(f"{name} may not join: {error}")
            self.send_away(str(error), node)
            return
        self.clients = {n: client for n, client in self.clients.items() if client.position != position}
        self.clients[node] = Client(node, name, facts["key"], position, rows, samples)
        for former in [key for key, place in self.places.items() if place == position]:
            del self.places[former]
        self.places |= {facts["key"]: position} if facts["key"] else {}
        share = f"{samples['train']:,} samples" + (f" of {len(self.labels[0]):,}" if rows else " of its own")
        say(f"client {position} joined{' from ' * bool(name)}{name}: {share}")

    def deal(self, partitions: int) -> None:
        """Split the data, once for the run. Raises ValueError where that cannot be."""
        self.parts = partition.split(*self.labels, partitions, self.config)
        self.partitions = partitions

    def dealt(self) -> dict[str, list[partition.Rows]]:
        """Return the rows of all partitions, by split; none if every client has data of its own."""
        return self.parts if any(client.rows for client in self.clients.values()) else {}

    def place(self, node: int, key: str, wanted: int, counted: int, copy: bool) -> int:
        """Return the partition of a client: its old one, the one it wants, or the first that is free."""
        partitions = self.partitions
        present = {client.position: client for client in self.present() if client.node != node}  # it may have been away
        taken = {c.position for c in self.clients.values() if c.node != node} | set(self.places.values())
        if wanted >= 0:
            if counted != partitions:
                raise ValueError(f"it counts {counted} partitions, but this run has {partitions}")
            if wanted in present and not (key and present[wanted].key == key):
                raise ValueError(f"partition {wanted} is taken by {present[wanted].name or 'another client'}")
            return wanted
        if key in self.places and (self.places[key] < partitions) == copy:  # or its data have changed since
            return self.places[key]
        places = range(partitions) if copy else range(partitions, partitions + len(taken) + 1)
        free = [place for place in places if place not in taken] or [place for place in places if place not in present]
        if not free:
            raise ValueError(f"all {partitions} partitions are taken; start the server with more --clients")
        return free[0]

    # -------------------------------------------------------------------------------------------------- as a Grid

    def train(self, strategy: Strategy, server_round: int, arrays: ArrayRecord) -> list[Message]:
        """Return the replies of the clients that `strategy` asks to train; ask again where too few of them are good.

        Raises RuntimeError after `retries`.
        """
        for attempt in range(self.config["retries"] + 1):
            self.wait_for(self.config["min-clients"])
            seed_sampling(self.config["seed"], server_round, attempt)
            questions = list(strategy.configure_train(server_round, arrays, ConfigRecord(), self.as_grid()))
            replies = self.ask(questions, "training")
            needed = min(len(questions), self.config["min-clients"])
            if len(replies) >= needed:
                return replies
            say(f"round {server_round}: {len(replies)} of {len(questions)} models are good, {needed} needed")
        raise RuntimeError(f"round {server_round}: too few good models, even after {self.config['retries']} retries")

    def present(self) -> list[Client]:
        """Return the clients that are online, by partition."""
        online = set(self.grid.get_node_ids())
        return sorted((c for c in self.clients.values() if c.node in online), key=lambda client: client.position)

    def as_grid(self) -> Grid:
        """Return this as a Grid for a strategy, of which it asks for no more than the nodes to sample from."""
        return cast(Grid, self)

    def get_node_ids(self) -> list[int]:
        """Return the nodes by partition, so that sampling does not depend on their ids, which differ between runs."""
        return [client.node for client in self.present()]

    def ask(self, messages: Iterable[Message], doing: str) -> list[Message]:
        """Send `messages` and return the good replies, in order of partition, whatever order they came in.

        Waits for `round-timeout` seconds at most, and not for clients that have gone.
        """
        asked = [self.address(message) for message in messages]
        sent = list(zip(self.grid.push_messages([_packed(message) for message in asked]), asked, strict=True))
        pending = {identity: question for identity, question in sent if identity}
        for question in (question for identity, question in sent if not identity):
            self.drop(question, "it has left")
        replies: dict[int, Message] = {}
        tell(progress=(0, len(asked)), doing=doing)
        deadline, look = time.monotonic() + self.config["round-timeout"], 0.0
        while pending and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(list(pending)):
                self.take(pending.pop(reply.metadata.reply_to_message_id), reply, replies)
                tell(progress=(len(asked) - len(pending), len(asked)), doing=doing)
            if time.monotonic() > look:
                look = time.monotonic() + PRESENCE
                online = set(self.grid.get_node_ids())
                for identity in [m for m, question in pending.items() if question.metadata.dst_node_id not in online]:
                    self.drop(pending.pop(identity), "it has left")
            time.sleep(POLL if pending else 0)
        for question in pending.values():
            self.drop(question, f"no reply within {self.config['round-timeout']} s")
        return [replies[position] for position in sorted(replies)]

    def address(self, message: Message) -> Message:
        """Add to a strategy's message what differs from client to client."""
        client = self.clients[message.metadata.dst_node_id]
        content = RecordDict(dict(message.content))
        content["client"] = ConfigRecord({"position": client.position, "data": self.root, "digest": self.digest})
        if client.rows:
            split = "train" if message.metadata.message_type == MessageType.TRAIN else "test"
            content["rows"] = ArrayRecord({"mask": Array(self.mask(split, client.rows[split]))})
        self.bytes_down += sum(weights.size(arrays) for arrays in content.array_records.values())
        return Message(content, client.node, message.metadata.message_type, group_id=message.metadata.group_id)

    def mask(self, split: str, rows: partition.Rows) -> NDArray[np.uint8]:
        """Return a bit for each sample of a split: small enough for every message, so that no client need remember."""
        chosen = np.zeros(len(self.labels[split == "test"]), bool)
        chosen[rows] = True
        return np.packbits(chosen)

    def take(self, question: Message, reply: Message, replies: dict[int, Message]) -> None:
        client = self.clients[question.metadata.dst_node_id]
        try:
            if reply.has_content():
                reply.content = unpack(reply.content)
            check_reply(question, reply, client.samples, exactly=client.rows is not None)
        except ValueError as error:
            self.drop(question, str(error))
            return
        self.bytes_up += sum(weights.size(arrays) for arrays in reply.content.array_records.values())
        replies[client.position] = reply

    def drop(self, question: Message, why: str) -> None:
        self.dropped += 1
        client = self.clients[question.metadata.dst_node_id]
        say(f"client {client.position}{f' ({client.name})' * bool(client.name)} is left out: {why}")

    # ------------------------------------------------------------------------------------------------------ leaving

    def tally(self) -> dict[str, int]:
        """Return, and set back to zero, what has been counted since the last call."""
        counts = {"dropped": self.dropped, "bytes_down": self.bytes_down, "bytes_up": self.bytes_up}
        self.dropped = self.bytes_down = self.bytes_up = 0
        return counts

    def send_away(self, error: str = "", node: int | None = None) -> None:
        """Tell all clients, or one, that they are done, well ("") or not; wait until all have gone."""
        nodes = [n for n, client in self.clients.items() if client.name] if node is None else [node]
        goodbye = RecordDict({"goodbye": ConfigRecord({"error": error})})
        nodes = list(set(nodes) & set(self.grid.get_node_ids()))
        self.send(goodbye, "leave", nodes)
        deadline = time.monotonic() + (15 if node is None else 0)  # one who is refused holds nobody up
        while set(nodes) & set(self.grid.get_node_ids()) and time.monotonic() < deadline:
            time.sleep(POLL)


def _packed(message: Message) -> Message:
    """Return a message to the same client whose model is packed."""
    to = message.metadata
    return Message(pack(message.content), to.dst_node_id, to.message_type, group_id=to.group_id)


def check_version(theirs: str) -> None:
    """Raise ValueError unless a client runs the same minor release of Flower: others may speak another protocol."""
    ours = version("flwr")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ValueError(f"it runs Flower {theirs}, the server {ours}; install flwr=={ours} there")


def seed_sampling(seed: int, server_round: int, attempt: int = 0) -> None:
    """Make the strategy's choice of clients a function of seed and round: it draws from Python's generator.

    A round that is tried again may choose others.
    """
    random.seed(f"{seed} {server_round}" + f" {attempt}" * bool(attempt))
