"""The mods of the ClientApp: a node plays several clients, which see nothing of each other; errors are explained."""

from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federation.app import bundle
from federation.app.mods import explain, play_clients

pytestmark = pytest.mark.usefixtures("in_a_run")


def app(train: Callable[[Message, Context], Message]) -> ClientApp:
    ours = ClientApp(mods=[play_clients, explain])
    ours.train()(train)
    return ours


def context() -> Context:
    return Context(1, 1, {}, RecordDict(), {})


def questions(*positions: int) -> Message:
    contents = [RecordDict({"client": ConfigRecord({"position": position})}) for position in positions]
    return Message(bundle.pack(contents), 1, "train")


def count_calls(message: Message, context: Context) -> Message:
    """Reply with the position of the client, and how often it has been asked: it keeps that in its state."""
    seen = context.state.setdefault("seen", MetricRecord({"calls": 0}))
    context.state["seen"] = MetricRecord({"calls": int(seen["calls"]) + 1})
    position = int(message.content["client"]["position"])
    return Message(
        RecordDict({"metrics": MetricRecord({"position": position, "calls": context.state["seen"]["calls"]})}),
        reply_to=message,
    )


def metrics(reply: Message) -> list[object]:
    contents = bundle.unpack(reply.content)
    return [content if isinstance(content, str) else dict(content["metrics"]) for content in contents]


def test_each_client_of_a_node_answers_and_keeps_a_state_of_its_own() -> None:
    ours, node = app(count_calls), context()
    assert metrics(ours(questions(3, 5), node)) == [{"position": 3, "calls": 1}, {"position": 5, "calls": 1}]
    reply = ours(questions(5, 4), node)
    assert metrics(reply) == [{"position": 5, "calls": 2}, {"position": 4, "calls": 1}]
    assert {name: dict(record) for name, record in node.state.items()} == {
        "3/seen": {"calls": 1}, "5/seen": {"calls": 2}, "4/seen": {"calls": 1},
    }  # fmt: skip


def test_what_a_client_forgets_is_gone() -> None:
    def forget(message: Message, context: Context) -> Message:
        context.state.clear()
        return Message(RecordDict(), reply_to=message)

    node = context()
    app(count_calls)(questions(3, 13), node)
    app(forget)(questions(3), node)
    assert list(node.state) == ["13/seen"]


def test_a_client_that_fails_costs_its_own_reply_only(capsys: pytest.CaptureFixture[str]) -> None:
    def train(message: Message, context: Context) -> Message:
        if message.content["client"]["position"] == 1:
            raise MemoryError("out of memory")
        return count_calls(message, context)

    ours, node = app(train), context()
    assert metrics(ours(questions(0, 1, 2), node)) == [
        {"position": 0, "calls": 1}, "out of memory", {"position": 2, "calls": 1},
    ]  # fmt: skip
    assert "train failed: out of memory" in capsys.readouterr().out
    assert set(node.state) == {"0/seen", "2/seen"}


def test_a_message_that_is_no_bundle_passes_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    node, message = context(), Message(RecordDict({"client": ConfigRecord({"position": 2})}), 1, "train")
    assert dict(app(count_calls)(message, node).content["metrics"]) == {"position": 2, "calls": 1}
    assert list(node.state) == ["seen"]

    def fail(message: Message, context: Context) -> Message:
        raise ValueError("no\nsuch data")

    with pytest.raises(ValueError):
        app(fail)(message, node)
    assert "train failed: no such data\n" in capsys.readouterr().out
