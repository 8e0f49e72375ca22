"""Join a run: start a client's SuperNode, and restart it if the server goes away and comes back."""

import json
import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path
from threading import Thread

from federation.app.config import Settings
from federation.app.cores import THREADS
from federation.launch.log import say
from federation.launch.network import Address, LaunchError, free_port, imports_of, is_up, shown
from federation.launch.place import place_on_host
from federation.launch.process_group import ProcessGroup, process_group, relay
from federation.security import certificates

LOST_AFTER = 20  # seconds without an answer after which a client considers its server gone
FORGOTTEN_AFTER = 65  # seconds after which a server considers a client gone


def join_run(server: Address, wait: float, node_config: Settings, threads: int | None, tls: Path | None = None) -> int:
    """Run a SuperNode until the run has ended, and return the exit status.

    Waits up to `wait` seconds for the server, at the start and whenever it goes away. Raises LaunchError if it does not
    come, or if it refuses this client. `tls` is the folder with the authority's certificate and the client's key.
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
                    supernode.wait(5 * status)  # so that it can send the reason of a failure
                return status
            watcher.join()  # it stops all processes of this client, so the next SuperNode must start later
            if "SuperNode ID" in Path(log).read_text("utf-8"):
                say(f"lost the server at {shown(server)}")
                refusals = 0
            else:
                refused(server, ours, tls, again=refusals > 0)
                refusals += 1


def identity(name: str, tls: Path | None) -> Settings:
    """Return a client's name and its unique identity: its key or, without one, its place and machine."""
    key = certificates.client_key(tls)
    return {"name": name, "key": certificates.fingerprint(key) if key else f"{name} {uuid.getnode():x}"}


def start_supernode(
    ours: ProcessGroup, server: Address, node_config: Settings, tls: Path | None
) -> "subprocess.Popen[str]":
    ours.log.clear()
    settings = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in node_config.items())
    security = ["--root-certificates", str(tls / "ca.crt")] if tls else ["--insecure"]
    if key := certificates.client_key(tls):
        security += ["--auth-supernode-private-key", str(key)]
    return ours.start(
        "flower-supernode", *security, "--superlink", shown(server),
        "--port", str(free_port()), "--node-config", settings,
    )  # fmt: skip


def refused(server: Address, ours: ProcessGroup, tls: Path | None, again: bool) -> None:
    """Wait for a second attempt if the server rejects a client's key. Raises LaunchError in all other cases.

    Flower gives the same answer for an unknown key and for the key of a client that it considers connected, which it
    still does for a minute after that client was killed. The client cannot tell these cases apart, so it tries again
    after that minute.
    """
    key = certificates.client_key(tls)
    if "Failed to activate" not in Path(ours.log.name).read_text("utf-8") or not key:
        why = "it requires a client key" if tls and not key else ours.last_error()
        raise LaunchError(f"the server at {shown(server)} refused this client: {why}")
    rejected = f"the server at {shown(server)} rejected {key}"
    if again:
        raise LaunchError(f"{rejected}: either the public key is not in its folder clients, then copy it there; "
                          "or another client uses this key now, then give each client its own key")  # fmt: skip
    say(f"{rejected}: it does not know this key, or a client with this key is connected, or was killed within the "
          f"last minute; trying again in {FORGOTTEN_AFTER} s")  # fmt: skip
    time.sleep(FORGOTTEN_AFTER)


def watch(ours: ProcessGroup, supernode: "subprocess.Popen[str]", server: Address, tls: Path | None) -> None:
    """Stop a SuperNode if its server does not answer for some time; it would wait forever, without any message."""
    answered = time.monotonic()
    while supernode.poll() is None and time.monotonic() - answered < LOST_AFTER:
        with suppress(LaunchError):
            if is_up(server, tls and tls / "ca.crt", timeout=LOST_AFTER / 2):  # the network may be slow
                answered = time.monotonic()
        time.sleep(2)
    ours.stop()  # including processes that the SuperNode leaves behind, which would keep its output open


def wait_for_server(server: Address, wait: float, tls: Path | None) -> None:
    """Return once the server answers. Raises LaunchError after `wait` seconds, or if TLS fails."""
    deadline, ca = time.monotonic() + wait, tls and tls / "ca.crt"
    if not is_up(server, ca):
        say(f"waiting for a server at {shown(server)} (up to {wait:g} s)")
    while not is_up(server, ca, timeout=10):
        if time.monotonic() > deadline:
            raise LaunchError(f"no server at {shown(server)} within {wait:g} s; is it running, and is --server right?")
        time.sleep(0.2)
