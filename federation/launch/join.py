"""Joining a run: the SuperNode of a client, as long as the run lasts."""

import json
import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path
from threading import Thread

from federation.app.config import Settings
from federation.app.cores import THREADS
from federation.launch.network import Address, LaunchError, free_port, imports_of, is_up, shown
from federation.launch.place import place_on_host
from federation.launch.process_group import ProcessGroup, process_group, relay
from federation.security import certificates

LOST_AFTER = 20  # seconds without an answer, after which a client takes its server for gone
FORGOTTEN_AFTER = 65  # seconds after which a server has noticed that a client is gone


def join_run(server: Address, wait: float, node_config: Settings, threads: int | None, tls: Path | None = None) -> int:
    """Run a SuperNode until its run has ended and return the exit status.

    Waits up to `wait` seconds for the server, at the start and whenever it goes away. Raises LaunchError after that,
    and where the server refuses this client. `tls` is the folder of the authority's certificate, and of a key.
    """
    environment = dict.fromkeys(THREADS, str(threads)) if threads else {}
    with place_on_host() as (name, log), process_group(log, environment) as ours:
        refusals = 0
        while True:
            wait_for_server(server, wait, tls)
            supernode = start_supernode(ours, server, node_config | identity(name, tls), tls)
            ours.expect(imports_of(server, tls and tls / "ca.crt"))
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


def start_supernode(
    ours: ProcessGroup, server: Address, node_config: Settings, tls: Path | None
) -> "subprocess.Popen[str]":
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


def refused(server: Address, ours: ProcessGroup, tls: Path | None, again: bool) -> None:
    """Wait before a second try, where a server does not take a client's key. Raises LaunchError for all else.

    Flower has one answer for a key that it does not know, and for one whose client it takes for connected: for a minute
    after a kill, too. A client that came back within that minute would be there before the server has seen it go.
    So nobody on this side can tell which of the two it is.
    """
    key = certificates.client_key(tls)
    if "Failed to activate" not in Path(ours.log.name).read_text("utf-8") or not key:
        why = "it requires a client key" if tls and not key else ours.last_error()
        raise LaunchError(f"the server at {shown(server)} turned this client away: {why}")
    not_taken = f"the server at {shown(server)} does not take {key}"
    if again:
        raise LaunchError(f"{not_taken}: either its folder clients lacks the public one, so copy that there; "
                          "or another client with this key is connected, so give each a key of its own")  # fmt: skip
    print(f"{not_taken}: it does not know it, or a client with this key is connected, or was until it was killed "
          f"within the last minute; trying once more in {FORGOTTEN_AFTER} s", flush=True)  # fmt: skip
    time.sleep(FORGOTTEN_AFTER)


def watch(ours: ProcessGroup, supernode: "subprocess.Popen[str]", server: Address, tls: Path | None) -> None:
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
