"""A Flower Grid whose nodes are clients, on top of the Grid of the nodes that play them.

A strategy samples from it and sends through it as from any other Grid, and need not know that a node may play several
clients. Their messages to and from one node travel in bundles, one after the other, so that a node never holds more
models than BUNDLED allows. It adds to each message what differs from client to client, and returns only replies that
can be aggregated.
"""

import random
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from federation.app import bundle, metrics, packing, partition, weights
from federation.app.agreement import disagreement
from federation.app.console import emit_event, one_line, print_to_user
from federation.app.roster import POLL, Client, Roster, from_nobody
from federation.app.strategy import check_reply

PRESENCE = 2.0  # seconds between two looks at who is still there
BUNDLED = 32 * 2**20  # bytes of models in a bundle, unless a single one has more: each is in memory several times
MOST_LISTED = 10  # clients with the same reason
DOING = {MessageType.TRAIN: "training", MessageType.EVALUATE: "testing"}


@dataclass
class Batch:
    """Clients' messages that travel to a node together, by their ids."""

    node: int
    questions: dict[str, Message]
    is_bundle: bool
    message: Message | None = None  # to the node, made while the node still answers the one before it

    def parts(self) -> "Iterator[Batch]":
        """Split what trains so many models that they would not fit into one bundle."""
        ids = [*self.questions]
        first = self.questions[ids[0]]
        trained = first.metadata.message_type == MessageType.TRAIN
        model = sum(map(weights.size, first.content.array_records.values()))
        step = max(1, BUNDLED // max(1, model)) if trained else len(ids)
        for start in range(0, len(ids), step):
            part = {identity: self.questions[identity] for identity in ids[start : start + step]}
            yield Batch(self.node, part, self.is_bundle)


@dataclass
class Exchange:
    """Messages that are sent and waited for together."""

    doing: str  # what the clients are doing, in a word
    count: int
    pending: dict[str, Message]  # the questions without a reply, by their ids
    shown: int = -1  # how many replies the terminal knows of
    good: list[Message] = field(default_factory=list)
    rejected: dict[str, list[int]] = field(default_factory=dict)  # positions by reason
    failed: str = ""  # why the first one failed that had not just left or was late

    def reject(self, question: Message, why: str, failed: bool = False) -> None:
        self.failed = self.failed or why * failed
        self.rejected.setdefault(why, []).append(question.metadata.dst_node_id)

    def reject_minority(self) -> None:
        """Reject the replies that report other metrics than most others."""
        for reply in metrics.minority(sorted(self.good, key=lambda reply: reply.metadata.src_node_id)):
            self.good.remove(reply)
            named = ", ".join(sorted(reply.content.metric_records["metrics"]))
            why = f"it reports other metrics than most clients: {named:.200}"
            self.rejected.setdefault(why, []).append(reply.metadata.src_node_id)

    def show_progress(self) -> None:
        """Tell the terminal, where that has changed, how many clients have replied."""
        done = self.count - len(self.pending)
        if done != self.shown and self.count:
            emit_event(progress=(done, self.count), doing=self.doing)
            self.shown = done


class ClientGrid(Grid):
    """The clients of a Roster as the nodes of a Grid. A client's node id is its position."""

    def __init__(self, grid: Grid, roster: Roster) -> None:
        self.grid, self.roster, self.config = grid, roster, roster.config
        self.queued: dict[int, deque[Batch]] = {}  # what each node gets once it has answered what it got before
        self.sent: dict[str, Batch] = {}  # by the id of the node's message
        self.lost: set[str] = set()  # the ids of clients' messages that found no node
        self.replies: dict[str, Message] = {}  # that nobody has pulled yet, by the ids of the clients' messages
        self.dropped = self.bytes_down = self.bytes_up = 0

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Return the positions of the clients that are online, in ascending order.

        Sampling therefore does not depend on the ids of nodes, which differ between runs.
        """
        return [client.position for client in self.roster.present()]

    # ---------------------------------------------------------------------------------------------------- sending

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
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
        self.bytes_down += sum(weights.size(a) for content in contents for a in content.array_records.values())
        content = bundle.pack(contents) if batch.is_bundle else contents[0]
        to = questions[0].metadata
        return Message(packing.pack(content), batch.node, to.message_type, group_id=to.group_id)

    def _address(self, client: Client, question: Message) -> RecordDict:
        """Return the content of a strategy's message, and what differs from client to client."""
        content = RecordDict(dict(question.content))
        content["server"], content["client"] = self.roster.facts, ConfigRecord({"position": client.position})
        if client.rows:
            split = "train" if question.metadata.message_type == MessageType.TRAIN else "test"
            content["rows"] = ArrayRecord({"mask": Array(self._mask(split, client.rows[split]))})
        return content

    def _mask(self, split: str, rows: partition.Rows) -> NDArray[np.uint8]:
        """Return a bit for each sample of a split: small enough for every message, so that no client need remember."""
        chosen = np.zeros(self.roster.counts[split], bool)
        chosen[rows] = True
        return np.packbits(chosen)

    # -------------------------------------------------------------------------------------------------- receiving

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to some messages that have arrived. Each has its client as its `src_node_id`."""
        return [*self._pull(list(message_ids)).values()]

    def _pull(self, ids: list[str]) -> dict[str, Message]:
        replies = list(self.grid.pull_messages([*self.sent])) if self.sent else []
        answered = [(reply, self.sent.pop(reply.metadata.reply_to_message_id)) for reply in replies]
        self._send_queued()  # first of all, so that no node waits for its models to be read
        for reply, batch in answered:
            if from_nobody(reply):
                self.lost |= batch.questions.keys()
                continue
            self.replies |= zip(batch.questions, _unwrap(reply, batch), strict=True)
        return {identity: self.replies.pop(identity) for identity in ids if identity in self.replies}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send `messages` and return the good replies, in order of position, whatever order they came in.

        Waits for `timeout` seconds at most (default: `round-timeout`), and not for clients that have left.
        """
        exchange = self._exchange(list(messages), self.config.round_timeout if timeout is None else timeout)
        return sorted(exchange.good, key=lambda reply: reply.metadata.src_node_id)

    def _exchange(self, messages: list[Message], timeout: float) -> Exchange:
        exchange = self._begin(messages)
        deadline, look = time.monotonic() + timeout, 0.0
        exchange.show_progress()
        while exchange.pending:
            self._receive(exchange)
            exchange.show_progress()
            if time.monotonic() > look:
                look = time.monotonic() + PRESENCE
                self._reject_absent(exchange)
            if time.monotonic() > deadline:
                self._reject_late(exchange, timeout)
            time.sleep(POLL if exchange.pending else 0)
        exchange.reject_minority()
        self._report_rejected(exchange)
        return exchange

    def _begin(self, questions: list[Message]) -> Exchange:
        pairs = [*zip(self.push_messages(questions), questions, strict=True)]
        doing = DOING.get(questions[0].metadata.message_type, "waiting") if questions else ""
        pending = {identity: question for identity, question in pairs if identity}
        exchange = Exchange(doing, len(questions), pending)
        for question in (question for identity, question in pairs if not identity):
            exchange.reject(question, "it has left")
        return exchange

    def _receive(self, exchange: Exchange) -> None:
        """Take the replies that have arrived."""
        for identity, reply in self._pull([*exchange.pending]).items():
            question = exchange.pending.pop(identity)
            client = self.roster.clients[question.metadata.dst_node_id]
            try:
                check_reply(question, reply, client.samples, exactly=client.rows is not None)
            except ValueError as error:
                exchange.reject(question, str(error), failed=True)
                continue
            self.bytes_up += sum(weights.size(arrays) for arrays in reply.content.array_records.values())
            exchange.good.append(reply)

    def _reject_absent(self, exchange: Exchange) -> None:
        self._withdraw(set(self.grid.get_node_ids()))
        for identity in self.lost & exchange.pending.keys():
            exchange.reject(exchange.pending.pop(identity), "it has left")
        self.lost.clear()

    def _withdraw(self, online: set[int]) -> None:
        """Give up all messages to nodes that are not online."""
        gone = [identity for identity, batch in self.sent.items() if batch.node not in online]
        batches = [self.sent.pop(identity) for identity in gone]
        batches += [batch for node in self.queued.keys() - online for batch in self.queued.pop(node)]
        self.lost.update(*(batch.questions for batch in batches))

    def _reject_late(self, exchange: Exchange, timeout: float) -> None:
        self._withdraw(online=set())
        self.lost.clear()
        for question in exchange.pending.values():
            exchange.reject(question, f"no reply within {timeout:g} s")
        exchange.pending.clear()

    def _report_rejected(self, exchange: Exchange) -> None:
        """Print who is left out and why; clients that share a reason with many others are not listed one by one."""
        for why, positions in exchange.rejected.items():
            self.dropped += len(positions)
            if len(positions) > MOST_LISTED:
                print_to_user(f"{len(positions)} clients are left out: {why}")
                continue
            for position in sorted(positions):
                name = self.roster.clients[position].name
                print_to_user(f"client {position}{f' ({name})' * bool(name)} is left out: {why}")

    def pop_counters(self) -> dict[str, float]:
        """Return what has been counted since the last call.

        That is rejected replies, bytes to and from all clients, and seconds that were spent waiting for clients.
        """
        counts: dict[str, float] = {"dropped": self.dropped, "bytes_down": self.bytes_down, "bytes_up": self.bytes_up}
        counts["waiting_seconds"] = round(self.roster.waited, 3)
        self.dropped = self.bytes_down = self.bytes_up = 0
        self.roster.waited = 0.0
        return counts

    # --------------------------------------------------------------------------------------------------- training

    def train(self, strategy: Strategy, server_round: int, arrays: ArrayRecord) -> list[Message]:
        """Return the replies of the clients that `strategy` asks to train; ask again where too few of them are good.

        Raises RuntimeError after `retries`.
        """
        for attempt in range(self.config.retries + 1):
            self.roster.wait_for(self.config.min_clients)
            seed_sampling(self.config.seed, server_round, attempt)
            questions = list(strategy.configure_train(server_round, arrays, ConfigRecord(), self))
            replies = self.send_and_receive(questions)
            needed = min(len(questions), self.config.min_clients)
            if len(replies) >= needed:
                return replies
            print_to_user(f"round {server_round}: {len(replies)} of {len(questions)} models are good, {needed} needed")
        raise RuntimeError(f"round {server_round}: too few good models, even after {self.config.retries} retries")

    def evaluate(self, strategy: Strategy, server_round: int, arrays: ArrayRecord) -> list[Message]:
        """Return the replies of the clients that `strategy` asks to evaluate. Raises RuntimeError if all fail."""
        questions = list(strategy.configure_evaluate(server_round, arrays, ConfigRecord(), self))
        exchange = self._exchange(questions, self.config.round_timeout)
        if not exchange.good and exchange.failed:
            raise RuntimeError(f"round {server_round}: no client could evaluate the model: {exchange.failed}")
        return sorted(exchange.good, key=lambda reply: reply.metadata.src_node_id)

    def check_agreement(self, replies: list[Message], results: dict[str, Any]) -> None:
        """Print a warning if clients whose test samples are all of the server's find something else than it does."""
        clients = [self.roster.clients[reply.metadata.src_node_id] for reply in replies]
        samples = 0 if self.config.validation_fraction else self.roster.counts["test"]
        if samples and sum(client.samples["test"] for client in clients if client.rows) == samples:
            print_to_user(
                disagreement(metrics.of_side("clients", results), metrics.of_side("server", results), samples)
            )


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


def seed_sampling(seed: int, server_round: int, attempt: int = 0) -> None:
    """Make the strategy's choice of clients a function of seed and round: it draws from Python's generator.

    A round that is tried again may choose others.
    """
    random.seed(f"{seed} {server_round}" + f" {attempt}" * bool(attempt))
