"""The process that follows a run: its arguments are those of federation.app.tracking.command."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from federation.app import hide_tensorflow
from federation.app.console import FOLDER, PREFIX
from federation.tracking.follow import follow

NICENESS = 10  # training goes first


def main() -> None:
    folder, names, since = sys.argv[1:]
    hide_tensorflow.reveal()  # MLflow looks for it, and a simulation, which has started this, hides it
    os.chdir(os.environ[FOLDER])  # where the trackers' own defaults lead
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    follow(Path(folder), names.split(","), float(since), say)


def say(line: str) -> None:
    with suppress(OSError):  # who would have read it has gone
        print(PREFIX + line, flush=True)


if __name__ == "__main__":
    main()
