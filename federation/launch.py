"""Starting and stopping Flower's processes: for a server the SuperLink and a run, for a client a SuperNode."""

import functools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import filelock
import psutil
from threadpoolctl import threadpool_limits

from federation import certificates, hide_tensorflow
from federation.admission import Register
from federation.config import RunConfig, Settings
from federation.console import FOLDER
from federation.network import Address, LaunchError, free_port, is_up, shown
from federation.session import ROOT, Session, relay, session

LOST_AFTER = 20  # seconds without an answer, after which a client takes its server for gone
FORGOTTEN_AFTER = 65  # seconds after which a server has noticed that a client is gone
THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "PJRT_NPROC")  # PyTorch, Keras, JAX


def run_command(command: Callable[[], int]) -> None:
    """Run a program and exit with its status, with 1 and one line if it fails, 130 after Ctrl-C, SIGTERM or SIGHUP."""
    catch_signals()
    os.environ[FOLDER] = str(Path.cwd())
    name = Path(sys.argv[0]).name
    try:
        sys.exit(command())
    except (LaunchError, ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        say_stopped(name)
        sys.exit(130)


def catch_signals() -> None:
    """Take the signals that end a program for Ctrl-C; SIGINT is one of them even where a shell has it ignored, for `&`.

    SIGHUP is what a closed terminal sends; nohup has it ignored, and that is left so.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def say_stopped(name: str) -> None:
    try:
        print(f"{name}: stopped", file=sys.stderr)
    except OSError:  # the terminal has been closed: whatever is still to be printed would change the exit status
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


# ----------------------------------------------------------------------------------------------------- the server


def host_run(
    address: Address,
    run_config: RunConfig,
    federation_config: Settings | None = None,
    tls: Path | None = None,
) -> int:
    """Run the app in this folder on a SuperLink of its own and return the exit status: 0, or 1 if it failed.

    With `federation_config`, Flower's Simulation Engine plays the clients as this says. With `tls`, the folder of a
    server's certificate, clients are served over TLS, and if it has a folder `clients`, only those. No client can
    connect before the task has been tried. Raises ValueError where it cannot be federated.
    """
    inside = "127.0.0.1", free_port()
    environment = hide_tensorflow.environment() if federation_config else {}
    with session(Path(str(run_config.out)) / "log.txt", environment) as ours:
        register = Register(ours, tls / "clients") if tls and (tls / "clients").is_dir() else None
        superlink, ca = start_superlink(ours, inside, federation_config is not None, register is not None)
        found = prepare(ours, run_config)
        await_server(ours, superlink, inside, ca, "the SuperLink")
        if register:
            register.update()
            register.show()
            Thread(target=register.watch, daemon=True).start()
        run = submit(ours, run_config.changed(data=found["data"]), federation_config, found["files"])
        if not federation_config:
            start_gate(ours, address, inside, ca, tls)
        status = relay(run, ours.log)
        if status is None:
            raise LaunchError(f"the run broke off: {ours.last_error()}")
        return status


def prepare(ours: Session, run_config: RunConfig) -> dict[str, Any]:
    """Try the task; return where its `data` are, and its `files` by name. Raises ValueError where it cannot be used."""
    report = ours.home / "task.json"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from federation.prepare import main; main()"
    command = [sys.executable, "-P", "-c", code, json.dumps(run_config.values()), str(report)]
    status = ours.popen(*command, stdout=None, stderr=None).wait()
    if not report.exists():
        raise LaunchError(f"trying {run_config.task} on a few samples ended its process with status {status}")
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    if "error" in found:
        raise ValueError(found["error"])
    return found


def start_superlink(
    ours: Session, address: Address, simulates: bool, knows_clients: bool
) -> tuple["subprocess.Popen[str]", Path | None]:
    """Start a SuperLink; return it and the certificate to trust, if it speaks TLS: which it does only if it knows keys.

    That one is a certificate of the session's own: those of others need not be good for this machine's own calls.
    """
    options, ca = ["--insecure"], None
    if knows_clients:
        certificates.make_authority(ours.home, days=3650)
        certificates.make_server(ours.home, [*certificates.LOCAL], days=3650)
        ca = ours.home / "ca.crt"
        options = ["--enable-supernode-auth", "--ssl-ca-certfile", str(ca)]
        options += ["--ssl-certfile", str(ours.home / "server.crt"), "--ssl-keyfile", str(ours.home / "server.key")]
    trust = f"root-certificates = {json.dumps(str(ca))}" if ca else "insecure = true"
    (ours.home / "config.toml").write_text(f'[superlink.ours]\naddress = "{shown(address)}"\n{trust}\n', "utf-8")
    host, port = address
    superlink = ours.start(
        "flower-superlink", *options, "--host", host, "--port", str(port),
        "--disable-runtime-dependency-installation", *(["--simulation"] if simulates else []),
    )  # fmt: skip
    return superlink, ca


def start_gate(
    ours: Session, address: Address, superlink: Address, superlink_ca: Path | None, tls: Path | None
) -> None:
    """Open the server to clients: what they may ask of the SuperLink, and no more."""
    command = [sys.executable, "-m", "federation.gate", address[0], str(address[1])]
    command += [f"http{'s' * bool(superlink_ca)}://{shown(superlink)}"]
    command += ["--superlink-ca", str(superlink_ca)] if superlink_ca else []
    gate = ours.start(*command, *(["--tls", str(tls)] if tls else []), cwd=ROOT)
    await_server(ours, gate, address, tls and tls / "ca.crt", "the gate")


def await_server(ours: Session, process: "subprocess.Popen[str]", address: Address, ca: Path | None, name: str) -> None:
    """Return once a process of ours serves. Raises LaunchError if it has ended instead."""
    Thread(target=relay, args=(process, ours.log), daemon=True).start()
    while not is_up(reachable(address), ca, any_name=True):  # its certificate is for other machines
        if process.poll() is not None:
            raise LaunchError(f"{name} did not start: {ours.last_error()}")
        time.sleep(0.05)


def reachable(address: Address) -> Address:
    """Return the address by which this machine reaches a server of its own that listens at `address`."""
    host, port = address
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def submit(
    ours: Session, run_config: RunConfig, federation_config: Settings | None, files: Mapping[str, str]
) -> "subprocess.Popen[str]":
    """Start the run and return a process that lasts as long as it does, and prints what its ServerApp prints."""
    overrides = ours.home / "run-config.toml"
    overrides.write_text(assignments(run_config.values(), "\n"), "utf-8")
    app = bundle(ours.home / "app", files)
    command = ["flwr", "run", str(app), "ours", "--stream", "--run-config", str(overrides)]
    if federation_config:
        command += ["--federation-config", assignments(federation_config, " ")]
    return ours.start(*command)


def assignments(config: Settings, separator: str) -> str:
    return separator.join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in config.items())


def bundle(folder: Path, files: Mapping[str, str]) -> Path:
    """Gather in `folder` what clients need: client, server, and the files of the task, by name.

    Of the whole project, Flower would ship every script, and look through all environments in it first.
    """
    ours = [ROOT / name for name in ("pyproject.toml", "client.py", "server.py")] + [*ROOT.glob("federation/**/*.py")]
    for name, path in ({**files} | {str(path.relative_to(ROOT)): str(path) for path in ours}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return folder


def writable(folder: str) -> str:
    """Make `folder` and return its absolute path. Raises LaunchError where nothing can be written."""
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise LaunchError(f"cannot write to the run folder {path}: {error.strerror}; choose another --out") from None
    return str(path)


# ----------------------------------------------------------------------------------------------------- the client


def join_run(server: Address, wait: float, node_config: Settings, threads: int | None, tls: Path | None = None) -> int:
    """Run a SuperNode until its run has ended and return the exit status.

    Waits up to `wait` seconds for the server, at the start and whenever it goes away. Raises LaunchError after that,
    and where the server refuses this client. `tls` is the folder of the authority's certificate, and of a key.
    """
    environment = dict.fromkeys(THREADS, str(threads)) if threads else {}
    with place_on_host() as (name, log), session(log, environment) as ours:
        refusals = 0
        while True:
            wait_for_server(server, wait, tls)
            supernode = start_supernode(ours, server, node_config | identity(name, tls), tls)
            watcher = Thread(target=watch, args=(ours, supernode, server, tls), daemon=True)
            watcher.start()
            status = relay(supernode, ours.log)
            if status is not None:
                with suppress(subprocess.TimeoutExpired):
                    supernode.wait(5 * status)  # lets it deliver the reason of a failure
                return status
            watcher.join()  # it ends all that is ours: not the next SuperNode, please
            if "SuperNode ID" in Path(log).read_text("utf-8"):
                print(f"lost the server at {shown(server)}", flush=True)
                refusals = 0
            else:
                refused(server, ours, tls, again=refusals > 0)
                refusals += 1


def identity(name: str, tls: Path | None) -> Settings:
    """Return a client's name, and what tells it from all others: its key, or else its place and its machine."""
    key = certificates.client_key(tls)
    return {"name": name, "key": certificates.fingerprint(key) if key else f"{name} {uuid.getnode():x}"}


def start_supernode(ours: Session, server: Address, node_config: Settings, tls: Path | None) -> "subprocess.Popen[str]":
    ours.log.seek(0)
    ours.log.truncate()
    settings = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in node_config.items())
    security = ["--root-certificates", str(tls / "ca.crt")] if tls else ["--insecure"]
    if key := certificates.client_key(tls):
        security += ["--auth-supernode-private-key", str(key)]
    return ours.start(
        "flower-supernode", *security, "--superlink", shown(server),
        "--port", str(free_port()), "--node-config", settings,
    )  # fmt: skip


def refused(server: Address, ours: Session, tls: Path | None, again: bool) -> None:
    """Wait before a second try, where a server does not take a client's key. Raises LaunchError for all else.

    Flower has one answer for a key that it does not know, and for one whose client it takes for connected: for a minute
    after a kill, too. A client that came back within that minute would be there before the server has seen it go.
    So nobody on this side can tell which of the two it is.
    """
    key = certificates.client_key(tls)
    if "Failed to activate" not in Path(ours.log.name).read_text("utf-8") or not key:
        why = "it wants to know its clients by their keys" if tls and not key else ours.last_error()
        raise LaunchError(f"the server at {shown(server)} turned this client away: {why}")
    not_taken = f"the server at {shown(server)} does not take {key}"
    if again:
        raise LaunchError(f"{not_taken}: either its folder clients lacks the public one, so copy that there; "
                          "or another client with this key is connected, so give each a key of its own")  # fmt: skip
    print(f"{not_taken}: it does not know it, or a client with this key is connected, or was until it was killed "
          f"within the last minute; trying once more in {FORGOTTEN_AFTER} s", flush=True)  # fmt: skip
    time.sleep(FORGOTTEN_AFTER)


def watch(ours: Session, supernode: "subprocess.Popen[str]", server: Address, tls: Path | None) -> None:
    """End a SuperNode whose server has gone for some time: left to itself, it would wait for ever and say nothing."""
    answered = time.monotonic()
    while supernode.poll() is None and time.monotonic() - answered < LOST_AFTER:
        with suppress(LaunchError):
            if is_up(server, tls and tls / "ca.crt", timeout=LOST_AFTER / 2):  # a link may be slow
                answered = time.monotonic()
        time.sleep(2)
    ours.stop()  # what a SuperNode leaves behind holds its output open, and would be waited for in vain


def wait_for_server(server: Address, wait: float, tls: Path | None) -> None:
    """Return once a server answers. Raises LaunchError after `wait` seconds, or where TLS fails."""
    deadline, ca = time.monotonic() + wait, tls and tls / "ca.crt"
    if not is_up(server, ca):
        print(f"waiting for a server at {shown(server)} (up to {wait:g} s)", flush=True)
    while not is_up(server, ca, timeout=10):
        if time.monotonic() > deadline:
            raise LaunchError(f"no server at {shown(server)} within {wait:g} s; is it running, and is --server right?")
        time.sleep(0.2)


@contextmanager
def place_on_host() -> Iterator[tuple[str, Path]]:
    """Hold the lowest free place among the clients on this host: a name, the same after a restart, and a log file."""
    folder = private_folder()
    place = 0
    while True:
        try:
            with filelock.FileLock(folder / f"{place}.lock", timeout=0):
                yield f"{socket.gethostname()}/{place}", folder / f"{place}.log"
                return
        except filelock.Timeout:
            place += 1


def private_folder() -> Path:
    """Make a folder for what the clients on this host keep, unless it exists, and return it.

    Raises LaunchError where others could write to it: they could lead a client to overwrite a file of its user's.
    """
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and is_private(runtime):
        folder = runtime / "federation-clients"
    else:
        own = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(tempfile.gettempdir()) / f"federation-clients-{own}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_private(folder):
        raise LaunchError(f"{folder} is no folder of yours with mode 0700: remove it, or set TMPDIR to another folder")
    return folder


def is_private(folder: Path) -> bool:
    """Tell whether this is a folder, no link to one, that belongs to this user and is closed to all others."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # Windows: what is in a user's temporary folder is closed to others
        return stat.S_ISDIR(found.st_mode)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


@functools.cache
def share_cores() -> None:
    """Give this process its share of the cores, before a framework does any work: one of C clients here gets 1/C.

    Frameworks take all cores by default, and clients that share a host then slow each other down several times.
    Those that are imported already, for this process was forked, may have read their variables: they are told.
    """
    if THREADS[0] not in os.environ:
        commands = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
        clients = sum("flower-supernode" in command for command in commands)
        os.environ[THREADS[0]] = str(max(1, cores() // max(1, clients)))
    for variable in THREADS:
        os.environ.setdefault(variable, os.environ[THREADS[0]])
    threads = int(os.environ[THREADS[0]])
    threadpool_limits(threads)  # of NumPy's linear algebra, too
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
