"""What stands in for a command of Flower: it has a child of the fork server run it, and lives as long as that does.

Started by a script of the command's name (see warm.py) for every message. So it imports next to nothing, and takes
a hundredth of the time that Flower's own command needs until it has imported what it runs.
"""

import os
import signal
import socket
import sys
from types import FrameType


def main() -> None:
    """Run `sys.argv[2:]`, a command with its arguments, through the fork server that listens at `sys.argv[1]`."""
    path, *command = sys.argv[1:]
    folder = os.getcwd()  # noqa: PTH109 (to import pathlib takes longer than all the rest)
    request = ascii(("run", folder, command, dict(os.environ))).encode()
    pid, status = b"", b""
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [1, 2])
        connection.sendall(request)
        answers = connection.makefile("rb")
        pid = answers.readline()
    except OSError as error:
        print(f"the fork server cannot be reached: {error}", file=sys.stderr, flush=True)
    if not pid:  # nobody has begun with it: it was killed, or forking has turned out not to be safe
        os.execv(command[0], command)

    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(int(pid), number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, forward)
    status = answers.readline()  # or the end of file, if the fork server was killed meanwhile and the child has ended
    sys.exit(int(status or 1))


main()
