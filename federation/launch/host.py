"""Hosting a run: the SuperLink, the proxy before it, and the run itself."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from federation.app import hide_tensorflow
from federation.app.config import RunConfig, SettingError, Settings
from federation.app.layout import PACKAGE, SCRIPTS
from federation.launch import warm
from federation.launch.follower import follower
from federation.launch.fork_server import PREPARE
from federation.launch.key_registry import KeyRegistry
from federation.launch.network import Address, LaunchError, free_port, is_up, shown
from federation.launch.process_group import ROOT, ProcessGroup, process_group, relay
from federation.security import certificates


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
    with process_group(Path(run_config.out) / "log.txt", environment) as ours:
        console = ours.open_console()
        register = KeyRegistry(ours, tls / "clients") if tls and (tls / "clients").is_dir() else None
        needed = warm.frameworks_of(run_config.task, [Path.cwd(), SCRIPTS], with_tensorflow=not federation_config)
        ours.expect([] if run_config.bare else needed, at_once=True)
        superlink, ca = start_superlink(ours, inside, federation_config is not None, register is not None)
        preparation = Preparation(ours, run_config)
        found = preparation.found(tried=federation_config is None)
        await_server(ours, superlink, inside, ca, "the SuperLink")
        if register:
            register.update()
            register.show()
            Thread(target=register.watch, daemon=True).start()
        with follower(ours, run_config):
            run = submit(ours, run_config.changed(data=found["data"]), federation_config, found["files"])
            if not federation_config:
                start_proxy(ours, address, inside, ca, tls, found["imports"])
            preparation.found(tried=True)  # a simulation takes longer to start than this
            status = relay(run, ours.log, console)
        if status is None:
            raise LaunchError(f"the run broke off: {ours.last_error()}")
        return status


class Preparation:
    """A process that finds the task's data and files, and then tries the task."""

    def __init__(self, ours: ProcessGroup, config: RunConfig) -> None:
        self.task, self.report = config.task, ours.home / "task.json"
        forked = ours.home / "bin" / PREPARE
        command = [str(forked)] if forked.exists() else warm.PLAIN
        self.process = ours.popen(*command, json.dumps(config.values()), str(self.report), stdout=None, stderr=None)

    def found(self, tried: bool) -> dict[str, Any]:
        """Wait until the task has been read or also `tried`; return what `prepare` yields then.

        Raises ValueError where it cannot be federated.
        """
        while self.process.poll() is None and (tried or not self.report.exists()):
            time.sleep(0.02)
        if not self.report.exists() or self.process.poll():
            raise LaunchError(f"the process that tries {self.task} ended with status {self.process.poll()}")
        found: dict[str, Any] = json.loads(self.report.read_text("utf-8"))
        if "error" in found:
            raise (SettingError if found["setting"] else ValueError)(found["error"])
        return found


def start_superlink(
    ours: ProcessGroup, address: Address, simulates: bool, knows_clients: bool
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


def start_proxy(
    ours: ProcessGroup,
    address: Address,
    superlink: Address,
    superlink_ca: Path | None,
    tls: Path | None,
    imports: list[str],
) -> None:
    """Open the server to clients: what they may ask of the SuperLink, which modules to import, and no more."""
    (ours.home / "imports.json").write_text(json.dumps(imports), "utf-8")
    command = [sys.executable, "-m", "federation.launch.fleet_proxy", address[0], str(address[1])]
    command += [f"http{'s' * bool(superlink_ca)}://{shown(superlink)}"]
    command += ["--imports", str(ours.home / "imports.json")]
    command += ["--superlink-ca", str(superlink_ca)] if superlink_ca else []
    proxy = ours.start(*command, *(["--tls", str(tls)] if tls else []), cwd=ROOT)
    await_server(ours, proxy, address, tls and tls / "ca.crt", "the proxy")


def await_server(
    ours: ProcessGroup, process: "subprocess.Popen[str]", address: Address, ca: Path | None, name: str
) -> None:
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
    ours: ProcessGroup, run_config: RunConfig, federation_config: Settings | None, files: Mapping[str, str]
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
    shipped: dict[str, str | Path] = {**files}
    shipped |= {name: SCRIPTS / name for name in ("pyproject.toml", "client.py", "server.py")}
    shipped |= {str(path.relative_to(ROOT)): path for path in (PACKAGE / "__init__.py", *PACKAGE.glob("app/**/*.py"))}
    for name, path in shipped.items():
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
