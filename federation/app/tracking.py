"""Trackers: what the run config's key `tracking` names, and the process that sends a run to them.

That is a process of its own, so that a tracker that is slow or down delays no round; see federation/tracking.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from federation.app.console import FOLDER, PREFIX, print_to_user
from federation.app.layout import PACKAGE

TRACKERS = "tensorboard", "mlflow", "wandb"  # each is also the name of its package and of the extra that installs it


def split_names(text: str) -> list[str]:
    """Return the trackers that `text` names, apart by spaces or commas. Raises ValueError for any other name."""
    names = text.replace(",", " ").split()
    for name in names:
        if name not in (*TRACKERS, "none"):
            raise ValueError(f"tracking={text!r}: {name!r} is none of: none, {', '.join(TRACKERS)}")
    return [name for name in TRACKERS if name in names]


def check_installed(names: list[str]) -> None:
    """Raise ValueError for a tracker whose package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"tracking={name} needs the package {name}: pip install '.[{name}]'")


def command(folder: Path, names: list[str], since: float) -> list[str]:
    """Return the command, to be run in PACKAGE's parent, that sends a run until its standard input ends.

    It ignores what was written into the run folder before `since`, in seconds since 1970.
    """
    return [sys.executable, "-m", "federation.tracking", str(folder), ",".join(names), str(since)]


def follow(folder: Path, names: list[str]) -> "subprocess.Popen[str]":
    """Send a run that no launcher has started; this process's end is the run's end."""
    process = subprocess.Popen(
        command(folder, names, since=0), cwd=PACKAGE.parent, env=os.environ | {FOLDER: str(Path.home())},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip

    def pass_on() -> None:
        for line in process.stdout or ():
            print_to_user(line.removeprefix(PREFIX)) if line.startswith(PREFIX) else print(line, end="")

    Thread(target=pass_on, daemon=True).start()
    return process
