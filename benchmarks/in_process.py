"""Whole runs in one process, for studies of many: the real server and client code, without an engine between them.

A round then takes little longer than its training, on one thread.
"""

import argparse
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: more threads mostly wait for one another
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

import client
import server
from benchmarks.cells import FOLDER
from federation.app.checkpoint import checkpoints
from federation.app.config import Settings
from tests.in_memory import InMemoryGrid, in_a_run


def play(config: Settings, app: ClientApp = client.app) -> dict[str, Any]:
    """Run the federation of `config` in a temporary run folder, and return its metrics.json.

    One node with `app` plays all clients. A run that fails, because its model is not finite or because too few of the
    clients' models are good, is of the status "failed", with the rounds that it finished.
    """
    with tempfile.TemporaryDirectory() as folder:
        return play_in(Path(folder), config, app)


def play_in(folder: Path, config: Settings, app: ClientApp = client.app) -> dict[str, Any]:
    """Run the federation of `config` in a run folder as `play` does, or continue with the one that is there."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    own = {**config, "out": str(folder.absolute()), "resume": bool(checkpoints(folder))}
    with in_a_run():
        grid = InMemoryGrid(own, {1: {"partition-id": 0, "num-partitions": 1}}, app=app)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(RuntimeError):
            server.main(grid, Context(1, 0, {}, RecordDict(), own))
    return dict(json.loads((folder / "metrics.json").read_text("utf-8")))


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
