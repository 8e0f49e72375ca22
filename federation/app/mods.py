"""Flower mods of the ClientApp: what happens around each of its functions."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from federation.app import bundle
from federation.app.console import emit_event, one_line, print_to_user
from federation.app.memory import give_back


def explain(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Say in one line why a message could not be answered. A client that cannot even join ends."""
    kind = message.metadata.message_type
    try:
        return call_next(message, context)
    except Exception as error:
        print_to_user(f"{kind.removeprefix('query.')} failed: {one_line(error)}")
        if kind == "query.join":
            emit_event(end=1)
        raise


def play_clients(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer a bundle for each of its clients in turn: each gets its own message, and keeps a state of its own.

    A client that fails costs its own reply only. Messages that are not bundles pass unchanged.
    """
    if bundle.INDEX not in message.content:
        return call_next(message, context)
    whole = message.content
    replies = [_reply(content, message, context, call_next) for content in bundle.unpack(whole)]
    message.content = whole
    give_back()
    return Message(bundle.pack(replies), reply_to=message)


def _reply(content: bundle.Content, message: Message, context: Context, call_next: ClientAppCallable) -> bundle.Content:
    assert isinstance(content, RecordDict), "a question is no error"
    position = content.config_records["client"]["position"]
    prefix = f"{position!r}/"
    mine = {name: record for name, record in context.state.items() if name.startswith(prefix)}
    state = RecordDict({name.removeprefix(prefix): record for name, record in mine.items()})
    own = Context(context.run_id, context.node_id, context.node_config, state, context.run_config)
    message.content = content
    try:
        reply = call_next(message, own).content
    except Exception as error:
        return one_line(error)
    for name in mine:
        del context.state[name]
    for name, record in own.state.items():
        context.state[prefix + name] = record
    return reply
