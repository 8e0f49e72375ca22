"""Clients' messages on their way to the nodes that play them, and the replies on their way back.

The messages to and from one node travel in bundles, one after the other, so that a node never holds more models than
BUNDLED allows. What differs from client to client is added here.
"""

import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from federation.app import bundle, packing, partition, weights
from federation.app.console import one_line
from federation.app.mixing import MIXING
from federation.app.roster import Client, Roster, from_nobody

BUNDLED = 32 * 2**20  # bytes of models in a bundle, unless a single one has more: each is in memory several times


@dataclass
class Batch:
    """Clients' messages that travel to a node together, by their ids."""

    node: int
    questions: dict[str, Message]
    is_bundle: bool
    message: Message | None = None  # to the node, made while the node still answers the one before it

    def parts(self) -> "Iterator[Batch]":
        """Split what has so many models, or trains so many, that they would not fit into one bundle."""
        ids = [*self.questions]
        first = self.questions[ids[0]]
        differ = first.metadata.message_type == MessageType.TRAIN or MIXING in first.content  # here, or in the replies
        model = max(_size(question.content) for question in self.questions.values())
        step = max(1, BUNDLED // max(1, model)) if differ else len(ids)
        for start in range(0, len(ids), step):
            part = {identity: self.questions[identity] for identity in ids[start : start + step]}
            yield Batch(self.node, part, self.is_bundle)


class Delivery:
    """Brings messages to clients of a Roster, by way of the Grid of their nodes."""

    def __init__(self, grid: Grid, roster: Roster) -> None:
        self.grid, self.roster = grid, roster
        self.queued: dict[int, deque[Batch]] = {}  # what each node gets once it has answered what it got before
        self.sent: dict[str, Batch] = {}  # by the id of the node's message
        self.lost: set[str] = set()  # the ids of clients' messages that found no node
        self.replies: dict[str, Message] = {}  # that nobody has pulled yet, by the ids of the clients' messages
        self.bytes_down = 0

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Send each client its message and return the ids, "" for a client that has left."""
        ids: list[str] = []
        batches: dict[tuple[int, str, str], Batch] = {}
        for message in messages:
            ids.append(uuid.uuid4().hex)
            to, client = message.metadata, self.roster.clients[message.metadata.dst_node_id]
            key = client.node, to.message_type, to.group_id
            batches.setdefault(key, Batch(client.node, {}, client.shares_node)).questions[ids[-1]] = message
        for batch in batches.values():
            self.queued.setdefault(batch.node, deque()).extend(batch.parts())
        self._send_queued()
        return ["" if identity in self.lost else identity for identity in ids]

    def _send_queued(self) -> None:
        """Send each node that has nothing to answer its next batch, and make the message after that."""
        busy = {batch.node for batch in self.sent.values()}
        batches = [queue.popleft() for node, queue in self.queued.items() if queue and node not in busy]
        identities = self.grid.push_messages([self._message(batch) for batch in batches]) if batches else []
        for identity, batch in zip(identities, batches, strict=True):
            batch.message = None
            if identity:
                self.sent[identity] = batch
            else:
                self.lost |= batch.questions.keys()
        for batch in batches:
            if queue := self.queued[batch.node]:
                self._message(queue[0])

    def _message(self, batch: Batch) -> Message:
        if batch.message is None:
            batch.message = self._wrap(batch)
        return batch.message

    def _wrap(self, batch: Batch) -> Message:
        """Return the message to a node that carries the questions to its clients."""
        questions = [*batch.questions.values()]
        clients = [self.roster.clients[question.metadata.dst_node_id] for question in questions]
        contents = [self._address(*pair) for pair in zip(clients, questions, strict=True)]
        self.bytes_down += sum(map(_size, contents))
        content = bundle.pack(contents) if batch.is_bundle else contents[0]
        to = questions[0].metadata
        return Message(packing.pack(content), batch.node, to.message_type, group_id=to.group_id)

    def _address(self, client: Client, question: Message) -> RecordDict:
        """Return the content of a strategy's message, and what differs from client to client."""
        content = RecordDict(dict(question.content))
        kept = self.roster.trained.get(client.position, 0)  # the round of which the client is to have its state
        content["server"] = self.roster.facts
        content["client"] = ConfigRecord({"position": client.position, "kept": kept})
        if client.rows:
            split = "train" if question.metadata.message_type == MessageType.TRAIN else "test"
            content["rows"] = ArrayRecord({"mask": Array(self.mask(split, client.rows[split]))})
        return content

    def mask(self, split: str, rows: partition.Rows) -> NDArray[np.uint8]:
        """Return a bit for each sample of a split: small enough for every message, so that no client need remember."""
        chosen = np.zeros(self.roster.counts[split], bool)
        chosen[rows] = True
        return np.packbits(chosen)

    def pull(self, ids: Iterable[str]) -> dict[str, Message]:
        """Return the replies to some messages that have arrived, by the ids of the messages."""
        replies = list(self.grid.pull_messages([*self.sent])) if self.sent else []
        answered = [(reply, self.sent.pop(reply.metadata.reply_to_message_id)) for reply in replies]
        self._send_queued()  # first of all, so that no node waits for its models to be read
        for reply, batch in answered:
            if from_nobody(reply):
                self.lost |= batch.questions.keys()
                continue
            self.replies |= zip(batch.questions, _unwrap(reply, batch), strict=True)
        return {identity: self.replies.pop(identity) for identity in ids if identity in self.replies}

    def pop_lost(self) -> set[str]:
        """Return the ids of messages that have found no node since the last call."""
        lost, self.lost = self.lost, set()
        return lost

    def pop_bytes(self) -> int:
        """Return how many bytes of models have been sent since the last call."""
        count, self.bytes_down = self.bytes_down, 0
        return count

    def withdraw(self, online: set[int]) -> None:
        """Give up all messages to nodes that are not online."""
        gone = [identity for identity, batch in self.sent.items() if batch.node not in online]
        batches = [self.sent.pop(identity) for identity in gone]
        batches += [batch for node in self.queued.keys() - online for batch in self.queued.pop(node)]
        self.lost.update(*(batch.questions for batch in batches))


def _size(content: RecordDict) -> int:
    return sum(map(weights.size, content.array_records.values()))


def _unwrap(reply: Message, batch: Batch) -> list[Message]:
    """Return the replies of a node's clients."""
    contents: list[bundle.Content]
    try:
        if reply.has_error():
            raise ValueError(reply.error.reason)
        content = packing.unpack(reply.content)
        contents = bundle.unpack(content) if batch.is_bundle else [content]
        if len(contents) != len(batch.questions):
            raise ValueError(f"{len(contents)} replies to {len(batch.questions)} messages")
    except Exception as error:  # an untrusted reply must never stop the run
        contents = [one_line(error)] * len(batch.questions)
    return [_reply(content, question) for content, question in zip(contents, batch.questions.values(), strict=True)]


def _reply(content: bundle.Content, question: Message) -> Message:
    if isinstance(content, str):
        return Message(Error(0, content), reply_to=question)
    return Message(content, reply_to=question)
