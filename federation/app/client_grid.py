"""A Flower Grid whose nodes are clients, on top of the Grid of the nodes that play them.

A strategy samples from it and sends through it as from any other Grid, and need not know that a node may play several
clients (see delivery.py). It returns only replies that can be aggregated.
"""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from federation.app import metrics, weights
from federation.app.agreement import disagreement
from federation.app.console import print_to_user
from federation.app.delivery import Delivery
from federation.app.exchange import Exchange
from federation.app.replies import check_reply
from federation.app.roster import POLL, Roster
from federation.app.strategy import least_models
from federation.app.upload import restore_model

PRESENCE = 2.0  # seconds between two looks at who is still there
MOST_LISTED = 10  # clients with the same reason
Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]  # a strategy's configure_train, …
DOING = {MessageType.TRAIN: "training", MessageType.EVALUATE: "testing"}


class ClientGrid(Grid):
    """The clients of a Roster as the nodes of a Grid. A client's node id is its position."""

    def __init__(self, grid: Grid, roster: Roster) -> None:
        self.grid, self.roster, self.config = grid, roster, roster.config
        self.delivery = Delivery(grid, roster)
        self.least = least_models(roster.config)
        self.exchange: Exchange | None = None  # that is going on
        self.live = roster.live
        self.live.sources["now"] = self.now
        self.dropped = self.bytes_up = 0

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

        Sampling therefore does not depend on the ids of nodes, which differ between runs. A strategy that waits for
        more of them asks again and again, and those that have come meanwhile are admitted.
        """
        self.roster.poll_new_nodes()
        return [client.position for client in self.roster.present()]

    # ------------------------------------------------------------------------------------------ sending and receiving

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each client its message and return the ids, "" for a client that has left."""
        return self.delivery.push(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to some messages that have arrived. Each has its client as its `src_node_id`."""
        return [*self.delivery.pull(message_ids).values()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send `messages` and return the good replies, in order of position, whatever order they came in.

        Waits for `timeout` seconds at most (default: `round-timeout`), and not for clients that have left.
        """
        exchange = self._exchange(list(messages), self.config.round_timeout if timeout is None else timeout)
        return sorted(exchange.good, key=lambda reply: reply.metadata.src_node_id)

    def _exchange(self, messages: list[Message], timeout: float) -> Exchange:
        exchange = self.exchange = self._begin(messages)
        self.live.begin(exchange.doing)
        deadline, look = time.monotonic() + timeout, 0.0
        exchange.show_progress()
        while exchange.pending:
            self._receive(exchange)
            exchange.show_progress()
            self.live.tick()
            if time.monotonic() > look:
                look = time.monotonic() + PRESENCE
                self._reject_absent(exchange)
            if time.monotonic() > deadline:
                self._reject_late(exchange, timeout)
            time.sleep(POLL if exchange.pending else 0)
        exchange.reject_minority()
        self._report_rejected(exchange)
        self.exchange = None
        self.live.begin("aggregating" if exchange.doing == "training" else "testing on the server")
        return exchange

    def now(self) -> dict[str, Any]:
        """Return, for metrics.json, what goes on since when, and which of the clients that were asked still work."""
        pending = [message.metadata.dst_node_id for message in self.exchange.pending.values()] if self.exchange else []
        asked = self.exchange.count if self.exchange else 0
        times = {"since": self.live.since, "round_since": self.live.began}
        return {"doing": self.live.doing, **times, "asked": asked, "pending": sorted(pending)}

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
        for identity, reply in self.delivery.pull(list(exchange.pending)).items():
            question = exchange.pending.pop(identity)
            client = self.roster.clients[question.metadata.dst_node_id]
            sent = 0 if reply.has_error() else sum(map(weights.size, reply.content.array_records.values()))
            try:
                restore_model(question, reply, self.config)
                check_reply(question, reply, client.samples, exactly=client.rows is not None)
            except ValueError as error:
                exchange.reject(question, str(error), failed=True)
                continue
            self.bytes_up += sent
            exchange.good.append(reply)

    def _reject_absent(self, exchange: Exchange) -> None:
        self.delivery.withdraw(self.roster.look())
        for identity in self.delivery.pop_lost() & exchange.pending.keys():
            exchange.reject(exchange.pending.pop(identity), "it has left")

    def _reject_late(self, exchange: Exchange, timeout: float) -> None:
        self.delivery.withdraw(online=set())
        self.delivery.pop_lost()
        for question in exchange.pending.values():
            exchange.reject(question, f"no reply within {timeout:g} s")
        exchange.pending.clear()

    def _report_rejected(self, exchange: Exchange) -> None:
        """Print who is left out and why; clients that share a reason with many others are not listed one by one."""
        for why, positions in exchange.rejected.items():
            self.dropped += len(positions)
            self.live.leave_out(exchange.doing, why, positions)
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
        counts: dict[str, float] = {"dropped": self.dropped, "bytes_up": self.bytes_up}
        counts |= {"bytes_down": self.delivery.pop_bytes(), "waiting_seconds": round(self.roster.waited, 3)}
        self.dropped = self.bytes_up = 0
        self.roster.waited = 0.0
        return counts

    # --------------------------------------------------------------------------------------------------- training

    def train(self, strategy: Strategy, server_round: int, arrays: ArrayRecord) -> list[Message]:
        """Return the replies of the clients that `strategy` asks to train; ask again where too few of them are good.

        Raises RuntimeError after `retries`.
        """
        for attempt in range(self.config.retries + 1):
            self.roster.wait_for(max(self.config.min_clients, self.config.clients_per_round, self.least))
            seed_sampling(self.config.seed, server_round, attempt)
            questions = self._questions(strategy.configure_train, server_round, arrays)
            replies = self.send_and_receive(questions)
            needed = max(min(len(questions), self.config.min_clients), self.least)
            if len(replies) >= needed:
                self.roster.trained |= {reply.metadata.src_node_id: server_round for reply in replies}
                return replies
            print_to_user(f"round {server_round}: {len(replies)} of {len(questions)} models are good, {needed} needed")
        raise RuntimeError(f"round {server_round}: too few good models, even after {self.config.retries} retries")

    def evaluate(self, strategy: Strategy, server_round: int, arrays: ArrayRecord) -> list[Message]:
        """Return the replies of the clients that `strategy` asks to evaluate. Raises RuntimeError if all fail."""
        questions = self._questions(strategy.configure_evaluate, server_round, arrays)
        exchange = self._exchange(questions, self.config.round_timeout)
        if not exchange.good and exchange.failed:
            raise RuntimeError(f"round {server_round}: no client could evaluate the model: {exchange.failed}")
        return sorted(exchange.good, key=lambda reply: reply.metadata.src_node_id)

    def _questions(self, configure: Configure, server_round: int, arrays: ArrayRecord) -> list[Message]:
        """Return a strategy's messages, and in them the personal entries that clients begin with."""
        shared, personal = weights.split(arrays, self.config.personal)
        rate = self.config.rate_in(server_round)
        config = ConfigRecord({"lr": rate} if rate != self.config.learning_rate else {})
        questions = list(configure(server_round, shared, config, self))
        for question in questions if personal else ():
            question.content["personal"] = personal
        return questions

    def check_agreement(self, replies: list[Message], results: dict[str, Any]) -> None:
        """Print a warning if clients whose test samples are all of the server's find something else than it does."""
        clients = [self.roster.clients[reply.metadata.src_node_id] for reply in replies]
        one_model = not (self.config.validation_fraction or self.config.personal or self.config.topology != "star")
        samples = self.roster.counts["test"] if one_model else 0
        if samples and sum(client.samples["test"] for client in clients if client.rows) == samples:
            print_to_user(
                disagreement(metrics.of_side("clients", results), metrics.of_side("server", results), samples)
            )


def seed_sampling(seed: int, server_round: int, attempt: int = 0) -> None:
    """Make the strategy's choice of clients a function of seed and round: it draws from Python's generator.

    A round that is tried again may choose others.
    """
    random.seed(f"{seed} {server_round}" + f" {attempt}" * bool(attempt))
