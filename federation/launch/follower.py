"""The process that sends a run to trackers, beside the run."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from federation.app.config import RunConfig
from federation.app.tracking import command
from federation.launch.process_group import ROOT, ProcessGroup, relay

LEFT = {True: 60, False: 2}  # seconds for what is still to be sent, after a run that has ended, and one that is stopped
GRACE = 3


@contextmanager
def follower(ours: ProcessGroup, config: RunConfig) -> Iterator[None]:
    """Have the run that the block hosts sent to the trackers of its config. That delays nothing but the very end."""
    if not config.trackers:
        yield
        return
    process = ours.popen(*command(Path(config.out), config.trackers, time.time()), cwd=ROOT, stdin=subprocess.PIPE)
    relayed = Thread(target=relay, args=(process, ours.log), daemon=True)
    relayed.start()
    has_ended = False
    try:
        yield
        has_ended = True
    finally:
        assert process.stdin
        with suppress(OSError), process.stdin as stream:  # it may have been killed
            stream.write(str(LEFT[has_ended]))
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEFT[has_ended] + GRACE)
        relayed.join(GRACE)
