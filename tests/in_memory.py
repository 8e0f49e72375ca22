"""A federation in one process: Flower's Grid, the nodes of which are calls of the real ClientApp."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

import client
from federation.app import bundle
from federation.app.config import Settings
from federation.app.packing import unpack
from federation.app.task import open_data


class InMemoryGrid(Grid):
    """Nodes that answer at once, each with a context of its own, which it keeps as a SuperNode does.

    `nodes` are their ids, with their node configs. Each pull hands out those of the waiting replies that `deliver`
    picks of their ids, in its order. `tamper` may change a reply on its way; `app` may be another ClientApp.
    """

    def __init__(
        self,
        run_config: Settings,
        nodes: Mapping[int, Settings],
        deliver: Callable[[list[str]], list[str]] = list,
        tamper: Callable[[Message], object] = id,
        app: ClientApp = client.app,
    ) -> None:
        self.contexts = {node: Context(1, node, own, RecordDict(), run_config) for node, own in nodes.items()}
        self.deliver, self.tamper, self.app = deliver, tamper, app
        self.messages: list[Message] = []
        self.replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        self.messages.append(message)
        identity = message.metadata.__dict__["_message_id"] = str(len(self.messages))  # as the SuperLink does
        with another_process():
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
        if reply.has_content():
            reply.content = unpack(reply.content)
        self.tamper(reply)
        self.replies[identity] = reply
        return identity

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [identity for identity in message_ids if identity in self.replies]
        return [self.replies.pop(identity) for identity in self.deliver(ready)]

    def models(self, message_type: str) -> list[ArrayRecord]:
        """Return the models that messages of this type have carried to the clients, in the order of sending."""
        sent = (message for message in self.messages if message.metadata.message_type == message_type)
        contents = [unpack(message.content) for message in sent]
        one_each = [bundle.unpack(content)[0] if bundle.INDEX in content else content for content in contents]
        return [content.array_records["arrays"] for content in one_each if isinstance(content, RecordDict)]

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    send_and_receive = set_run = create_message
    run = property(create_message)


@contextmanager
def in_a_run() -> Iterator[None]:
    """Let messages be made in this process: without the identity of a task, Flower makes none outside of a run."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    yield
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None


def generators() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Callable[[], object]]]:
    """Yield how to save, restore and scramble the global state of each random generator that is loaded."""
    yield random.getstate, random.setstate, random.seed
    yield np.random.get_state, np.random.set_state, np.random.seed
    if torch := sys.modules.get("torch"):
        yield torch.get_rng_state, torch.set_rng_state, torch.seed
    if keras := sys.modules.get("keras"):  # it has no way to read its state, and nothing here depends on it
        yield lambda: None, lambda _: None, lambda: keras.utils.set_random_seed(random.SystemRandom().randrange(2**31))


@contextmanager
def another_process() -> Iterator[None]:
    """Run a block with random generators in a state that nothing depends on, and no data read: as in a new process."""
    open_data.cache_clear()
    kept = [(restore, save()) for save, restore, _ in generators()]
    for _, _, scramble in generators():
        scramble()
    try:
        yield
    finally:
        for restore, state in kept:
            restore(state)
