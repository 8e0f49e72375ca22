"""Whole runs in one process, for studies of many: the real server and client code, without an engine between them.

A round then takes little longer than its training, on one thread. With more processes, each is a node of one thread.
"""

import argparse
import functools
import io
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: more threads mostly wait for one another
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import client
import server
from benchmarks.cells import FOLDER
from federation.app.checkpoint import checkpoints
from federation.app.config import Settings
from federation.app.packing import unpack
from federation.launch.network import LaunchError
from tests.in_memory import InMemoryGrid, in_a_run


def play(config: Settings, app: ClientApp = client.app) -> dict[str, Any]:
    """Run the federation of `config` in a temporary run folder, and return its metrics.json.

    One node with `app` plays all clients. A run that fails, because its model is not finite or because too few of the
    clients' models are good, is of the status "failed", with the rounds that it finished.
    """
    with tempfile.TemporaryDirectory() as folder:
        return play_in(Path(folder), config, app)


def play_in(
    folder: Path, config: Settings, app: ClientApp = client.app, processes: int = 0, shown: bool = False
) -> dict[str, Any]:
    """Run the federation of `config` in a run folder as `play` does, or continue with the one that is there.

    If there are to be `processes`, each is a node, and plays its share of the clients with `client.app`. What the
    server prints can be `shown`.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    own = {**config, "out": str(folder.absolute()), "resume": bool(checkpoints(folder))}
    count = max(1, processes)
    nodes: dict[int, Settings] = {1 + i: {"partition-id": i, "num-partitions": count} for i in range(count)}
    output = sys.stdout if shown else io.StringIO()
    with in_a_run(), redirect_stdout(output), redirect_stderr(output):
        try:
            grid = NodeProcesses(own, nodes) if processes else InMemoryGrid(own, nodes, app=app)
            server.main(grid, Context(1, 0, {}, RecordDict(), own))
        except BrokenProcessPool:
            raise LaunchError("a node's process has been killed; start this again, and it continues") from None
        except RuntimeError:  # the run has failed, and its metrics.json says so
            pass
    return dict(json.loads((folder / "metrics.json").read_text("utf-8")))


class NodeProcesses(InMemoryGrid):
    """A Grid in memory whose nodes are processes of their own, which answer their messages at the same time."""

    def __init__(self, config: Settings, nodes: dict[int, Settings]) -> None:
        super().__init__(config, nodes)
        self.numbers = itertools.count(1)
        self.pending: dict[str, Future[Message]] = {}
        for node, context in self.contexts.items():
            process_of(node).submit(_become, context)

    def push(self, message: Message) -> str:
        identity = message.metadata.__dict__["_message_id"] = str(next(self.numbers))
        self.pending[identity] = process_of(message.metadata.dst_node_id).submit(_answer, message)
        return identity

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [identity for identity in message_ids if identity in self.pending and self.pending[identity].done()]
        return [self.pending.pop(identity).result() for identity in ready]


@functools.cache
def process_of(node: int) -> ProcessPoolExecutor:
    """Return the process that is a node in one run after another: to start one takes seconds."""
    return ProcessPoolExecutor(1, get_context("spawn"), _begin)  # a fork could not use a GPU that this one has opened


def _begin() -> None:
    """Prepare a node's process, which ends with the one that has started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches it, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    in_a_run().__enter__()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


_contexts: list[Context] = []  # in a node's process: the one of the run that goes on


def _become(context: Context) -> None:
    _contexts[:] = [context]


def _answer(message: Message) -> Message:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        reply = client.app(message, *_contexts)
    if reply.has_content():
        reply.content = unpack(reply.content)
    return reply


def cpu_seconds() -> float:
    """Return the seconds of CPU of this process and of the nodes that it has started."""
    times = [one.cpu_times() for one in psutil.Process().children()]
    return time.process_time() + sum(one.user + one.system for one in times)


def options(description: str, name: str, **choices: Iterable[str]) -> argparse.ArgumentParser:
    """Return the options of a study with results in `name`.json; `choices` are what it can be limited to."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", default="", metavar="DIR", help="as in cifar.py")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--rounds", type=int, metavar="N", help="(default: as above)")
    for option, names in choices.items():
        parser.add_argument(f"--{option}", choices=list(names), action="append", help="(default: all in turn)")
    parser.add_argument("--out", type=Path, default=FOLDER / f"{name}.json", metavar="FILE")
    return parser


def shortened(args: argparse.Namespace) -> Settings:
    """Return the settings that the options of a study change."""
    return {"data": args.data} | ({"num-server-rounds": args.rounds} if args.rounds else {})


def some_of(rounds: int) -> list[int]:
    """Return the rounds that a table shows: an early one, the middle and the last."""
    return sorted({min(5, rounds), (rounds + 1) // 2, rounds})


def spread(values: list[float]) -> str:
    """Return the mean, and the standard deviation if there is one."""
    return (f"{mean(values):.1f}" if values else "-") + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
