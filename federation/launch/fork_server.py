"""The fork server: has imported Flower once, and forks a child for each command of Flower that is to run.

To import Flower and a framework takes a command seconds, and Flower starts one for every message. A forked child has
them already, and is a process of its own as before: what it does to its memory, no other child sees.

A request comes from stand_in.py, with the standard output and error of the caller. The child takes on the arguments,
environment and working directory of the caller, and runs the command's own entry point. At its end it tells the fork
server which frameworks it has imported, so that the next child is forked with these. The launcher may also name
frameworks in advance. The fork server only imports: to
run anything of theirs would start threads, or open a GPU, which no child inherits in a usable state.
"""

import ast
import atexit
import functools
import gc
import importlib
import os
import random
import selectors
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Container
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

READY = ("flwr", "flower-superlink", "flower-supernode", "flower-superexec", "flwr-clientapp", "flwr-serverapp")
PREPARE = "prepare"  # the command that is not Flower's
COMMANDS = (*READY, "flwr-simulation")  # that one's child imports by itself what it needs: no client has any
ONCE = {"flwr-serverapp", "flwr-simulation", PREPARE}  # no second one will need what they have imported
FRAMEWORKS = {"triton", "torch", "torchvision", "jax", "jaxlib", "flax", "optax", "keras", "tensorflow"}  # tried
CRASHES = {getattr(signal, f"SIG{name}", None) for name in ("SEGV", "ABRT", "BUS", "ILL", "FPE")}  # no BUS on Windows
INTERRUPTED = 130  # the exit status after Ctrl-C
UNSAFE = 3  # the exit status after which no other fork server should be started

expected: deque[str] = deque()  # modules of frameworks that are imported as soon as no request waits
ended_with: list[int] = []  # in a child: the exit status of its command, once that has ended

Command = Callable[[], int | str | None]
Request = tuple[list[Any], socket.socket, list[int]]  # what is asked, the connection to answer on, output and error


def main() -> None:
    """Serve at the socket whose descriptor and path are on the command line."""
    atexit.register(leave_at_once)  # first, for what is registered first is called last
    listener, path = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    entries = {entry.name: entry for entry in entry_points(group="console_scripts") if entry.name in COMMANDS}
    for name in READY:
        entries[name].load()
    commands: dict[str, Command] = {name: functools.partial(run_entry, entry) for name, entry in entries.items()}
    run_commands(commands | {PREPARE: prepare}, listener, path)


def run_entry(entry: EntryPoint) -> int | str | None:
    status: int | str | None = entry.load()()
    return status


def prepare() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    importlib.import_module("federation.launch.prepare").main()


def run_commands(commands: dict[str, Command], listener: socket.socket, path: str) -> None:
    """Run commands, by name, in a forked child each, until killed."""
    gc.freeze()  # what all have in common is not looked through in each child, and so not copied for it
    command = become(commands, *serve(listener, commands))
    inherited = set(sys.modules)
    ended_with.append(status_of(command))
    if Path(sys.argv[0]).name not in ONCE:
        request_imports(path, [name for name in frameworks() if name not in inherited])
    sys.exit(ended_with[0])


def serve(listener: socket.socket, names: Container[str]) -> Request:
    """Fork a child for each request to run one of the commands. Only the children return, each with its request."""
    watched = selectors.DefaultSelector()
    watched.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in watched.select(0 if expected else None):
            if key.data:
                key.data()
            elif (request := receive(listener, names)) and not fork(request, watched):
                return request
        if expected and not watched.select(0):
            import_all([expected.popleft()])


def receive(listener: socket.socket, names: Container[str]) -> Request | None:
    """Return the next request, if it is one to run a command of these names."""
    connection, _ = listener.accept()
    streams: list[int] = []
    with suppress(OSError, SyntaxError, ValueError):  # the caller was killed before it had said all
        head, streams, _, _ = socket.recv_fds(connection, 8, 2)
        text = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        kind, *request = ast.literal_eval(text.decode())
        if kind == "import":
            import_all(*request)
        elif kind == "expect":
            expected.extend(*request)
        elif Path(request[1][0]).name in names:
            return request, connection, streams
    for stream in streams:
        os.close(stream)
    connection.close()
    return None


def fork(request: Request, watched: selectors.BaseSelector) -> int:
    """Fork a child for a request; return 0 in the child, which keeps no descriptor of the fork server."""
    _, connection, streams = request
    pid = os.fork()
    if not pid:
        for key in list(watched.get_map().values()):
            key.fileobj.close() if isinstance(key.fileobj, socket.socket) else os.close(key.fd)
        watched.close()
        connection.sendall(b"%d\n" % os.getpid())
        return 0
    for stream in streams:
        os.close(stream)
    watch(pid, connection, watched)
    return pid


def watch(pid: int, connection: socket.socket, watched: selectors.BaseSelector) -> None:
    """Tell the stand-in how its child ends, and end the child if the stand-in is killed."""
    child = os.pidfd_open(pid)

    def kill() -> None:
        if connection.fileno() < 0:  # the child has ended meanwhile
            return
        watched.unregister(connection)
        signal.pidfd_send_signal(child, signal.SIGKILL)

    def tell() -> None:
        watched.unregister(child)
        with suppress(KeyError):
            watched.unregister(connection)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(child)
        with suppress(OSError), connection:
            connection.sendall(b"%d\n" % (status if status >= 0 else 128 - status))
        if -status in CRASHES:
            print(f"a forked child died of {signal.Signals(-status).name}: no more are forked", flush=True)
            sys.exit(UNSAFE)

    watched.register(child, selectors.EVENT_READ, tell)
    watched.register(connection, selectors.EVENT_READ, kill)  # it says nothing more: what there is to read is its end


def become(commands: dict[str, Command], request: list[Any], connection: socket.socket, streams: list[int]) -> Command:
    """Make this child what the caller would have been; return the command to run."""
    folder, arguments, environment = request
    os.setsid()  # a signal to its process group is for nobody else
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    with suppress(OSError):  # it may have been removed since
        os.chdir(folder)
    sys.argv = arguments
    name = Path(arguments[0]).name
    Path("/proc/self/comm").write_text(name)
    random.seed()
    for framework, seed in (("numpy.random", "seed"), ("torch", "seed")):
        if framework in sys.modules:
            getattr(sys.modules[framework], seed)()  # two processes should not draw the same numbers
    connection.detach()  # stays open until this process ends: that is how the stand-in learns of it
    return commands[name]


def status_of(command: Command) -> int:
    """Run a command and return its exit status, as Python sets it."""
    try:
        result = command()
    except SystemExit as end:
        result = end.code
    except KeyboardInterrupt:  # Flower sends itself SIGINT, at times twice: the second one leaves its threads running
        ended_with.append(INTERRUPTED)
        leave_at_once()
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    if isinstance(result, str):
        print(result, file=sys.stderr)
    return result if isinstance(result, int) else int(result is not None)


def leave_at_once() -> None:
    """End a child whose command has ended: to take all modules down first costs half a second, with PyTorch."""
    if ended_with:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended_with[0])


def frameworks() -> list[str]:
    """Return the modules of frameworks that this process has imported, in that order."""
    return [name for name in sys.modules if name.partition(".")[0] in FRAMEWORKS]


def request_imports(path: str, names: list[str], kind: str = "import") -> None:
    """Ask the fork server at a socket to import modules of frameworks: the next child has them.

    Or, where `kind` is "expect", each of them as soon as no request waits.
    """
    request = ascii((kind, names)).encode()
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(len(request).to_bytes(8, "big") + request)


def import_all(names: list[str]) -> None:
    """Import those of the modules that belong to a framework: who names them may be a server."""
    for name in names:
        if name not in sys.modules and name.partition(".")[0] in FRAMEWORKS:
            with suppress(Exception):  # some only look like modules
                importlib.import_module(name)
    gc.freeze()


if __name__ == "__main__":
    main()
