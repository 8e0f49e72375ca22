"""How a client joins a run and leaves it: its answers to the server's queries."""

from importlib.metadata import version

from flwr.app import ConfigRecord, Context, Message, RecordDict

from federation.app.console import emit_event, print_to_user
from federation.app.fingerprint import difference
from federation.app.job import Job
from federation.app.sources import digests


def join(message: Message, context: Context) -> Message:
    """Tell the server who this is, which partition it wants (-1: any), and whether its data are a copy."""
    job, node = Job(message, context), context.node_config
    _, found = job.data()
    own = "it was started with --own-data" if node.get("own-data") else difference(found, job.order["fingerprint"])
    whose = f"of its own: {own}" if own else "at hand, a copy of the server's"
    sizes = job.sizes()
    print_to_user(f"joining with {sizes['train']:,} training and {sizes['test']:,} test samples {whose}")
    facts = {
        "name": node.get("name", ""),
        "partition-id": node.get("partition-id", -1),
        "num-partitions": node.get("num-partitions", 0),
        "key": node.get("key", ""),
        "clients": node.get("clients", 0),
        "flwr": version("flwr"),
        "files": digests(job.order["files"]),
        "own-data": own,
        "train-samples": sizes["train"],
        "test-samples": sizes["test"],
    }
    return Message(RecordDict({"client": ConfigRecord({**facts})}), reply_to=message)


def leave(message: Message, context: Context) -> Message:
    """Hear from the server that the run is over."""
    error = str(message.content.config_records["goodbye"]["error"])
    print_to_user(f"the server ended the run: {error}" if error else "the run has finished")
    emit_event(end=1 if error else 0)
    return Message(RecordDict(), reply_to=message)
