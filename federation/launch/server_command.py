"""The command line of `python server.py` and `federate server`."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

import click

from federation.launch import log
from federation.launch.command_line import FORMATS, misuse, options, run_script

if TYPE_CHECKING:
    from federation.app.config import RunConfig, Settings
    from federation.launch.network import Address

Key = options("Short for a key of the run config")
Setting = options("Any key of the run config")
Simulation = options("Simulation")
Network = options("Clients in other terminals and on other machines")
Page = options("A page that shows the run in a browser")
Output = options("What is printed")


def main() -> None:
    run_script(server)


def server(
    rounds: Annotated[int | None, Key(metavar="N", help="how many (default: 3)")] = None,
    clients: Annotated[int | None, Key(metavar="N", help="how many to wait for (default: 2)")] = None,
    task: Annotated[str | None, Key(metavar="MODULE", help="the script to federate (default: cifar)")] = None,
    data: Annotated[str | None, Key(metavar="DIR", help="the data folder (default: the script's own choice)")] = None,
    initial: Annotated[str | None, Key(metavar="FILE", help="begin with the weights in FILE")] = None,
    out: Annotated[str | None, Key(metavar="DIR", help="the run folder (default: runs/federated)")] = None,
    resume: Annotated[bool, Key("--resume", help="go on with the run in the run folder")] = False,
    run_config: Annotated[list[str] | None, Setting(metavar="'KEY=VALUE …'", help="as for flwr run")] = None,
    simulate: Annotated[int | None, Simulation(metavar="N", help="play N clients on this machine")] = None,
    gpus_per_client: Annotated[float | None, Simulation(metavar="F", help="(default: all, shared)")] = None,
    federation_config: Annotated[str, Simulation(metavar="'KEY=VALUE …'", help="as for flwr run")] = "",
    address: Annotated[str | None, Network(metavar="HOST:PORT", help="(default: 127.0.0.1:8080)")] = None,
    tls: Annotated[str | None, Network(metavar="DIR", help="the folder of server.crt, server.key, …")] = None,
    insecure: Annotated[bool, Network("--insecure", help="serve other machines without TLS")] = False,
    page: Annotated[str | None, Page(metavar="HOST:PORT|off", help="where (default: 127.0.0.1:8081)")] = None,
    verbose: Annotated[bool, Output("--verbose", help="show Flower's own lines, too")] = False,
    log_format: Annotated[str, Output(click_type=FORMATS, help="json: an object per line (default: text)")] = "text",
) -> int:
    """Host a federated run, or simulate one on this machine.

    \b
    federate server --clients 4 --rounds 10
    federate server --task my_script --simulate 10
    federate server --address 0.0.0.0:8080 --tls keys
    """
    return serve(SimpleNamespace(**locals()))


def serve(args: SimpleNamespace) -> int:
    """Host the run that these options describe; return its exit status."""
    log.style.set(args.log_format, args.verbose)
    check_options(args)
    from federation.app.checkpoint import load_checkpoint
    from federation.app.client_state import check_kept
    from federation.app.config import SettingError
    from federation.app.run_folder import run_folder  # here, so that --help need not wait for Flower
    from federation.app.strategy import check_strategy
    from federation.app.tracking import check_installed
    from federation.launch import host, network, page, simulation

    address, tls = read_network(args)
    with misuse("--page"):
        where = page.read_address(args.page or page.DEFAULT, tls is not None)
    with misuse():
        network.check_exposed(address, tls is not None, args.insecure)
        config = run_config(args)
        nodes = plan(args, config)
        check_initial(config, nodes is not None)
        check_installed(config.trackers)
        if "." not in config.strategy:  # a class of the user's own is for a process that may hold a framework
            check_strategy(config)
        if nodes and config.resume and config.keeps_state:
            check_kept(Path(config.out), load_checkpoint(Path(config.out))[0])
    config = config.changed(
        out=host.writable(config.out), initial=config.initial and str(Path(config.initial).expanduser().absolute())
    )
    if nodes:
        log.say(simulation.describe(config.num_clients, nodes))
    else:
        network.check_free(address)
    taken = 0 if nodes else address[1]
    with page.page(where, Path(config.out), tls, taken), run_folder(Path(config.out)), misuse(of=SettingError):
        return host.host_run(address, config, nodes, tls)


def check_options(args: SimpleNamespace) -> None:
    """Raise UsageError where options do not go together."""
    if args.simulate is None and (args.gpus_per_client is not None or args.federation_config):
        raise click.UsageError("--gpus-per-client and --federation-config go with --simulate")
    if args.simulate is not None and args.simulate < 1:
        raise click.UsageError(f"--simulate {args.simulate}: 1 client or more is needed")
    if args.simulate is not None and {args.address, args.tls, args.clients} != {None}:
        raise click.UsageError("--simulate N plays all clients here: it goes with none of --clients, --address, --tls")


def check_initial(config: "RunConfig", simulates: bool) -> None:
    """Raise ValueError where the weights to begin with are missing, or leave a simulation without data."""
    if simulates and config.bare:
        raise ValueError(
            f"initial={config.initial} and server-evaluation=false: such a server reads no data, and --simulate needs "
            "them; set server-evaluation=true"
        )
    if config.initial and not Path(config.initial).expanduser().is_file():
        raise ValueError(f"initial={config.initial}: there is no such file")


def read_network(args: SimpleNamespace) -> "tuple[Address, Path | None]":
    """Return the address to listen on, and the folder of the server's certificate."""
    from federation.launch import network
    from federation.security import certificates

    with misuse("--address"):
        address = network.address("127.0.0.1:8080" if args.address is None else args.address)
    with misuse("--tls"):
        return address, None if args.tls is None else certificates.server_folder(args.tls)


def plan(args: SimpleNamespace, config: "RunConfig") -> "Settings | None":
    """Return the nodes of a simulation, None where clients are served."""
    from federation.launch import simulation

    if args.simulate is None:
        return None
    return simulation.plan(config.num_clients, args.gpus_per_client, args.federation_config)


def run_config(args: SimpleNamespace) -> "RunConfig":
    """Return the run config of a command line. Raises ValueError for an unknown key or a wrong value."""
    from federation.app.checkpoint import resumed
    from federation.app.config import parse, validate

    overrides: Settings = {}
    for text in args.run_config or []:
        overrides |= parse(text)
    clients = args.clients if args.simulate is None else args.simulate
    keys = {"num-server-rounds": args.rounds, "num-clients": clients, "resume": args.resume or None}
    keys |= {key: getattr(args, key) for key in ("task", "data", "out", "initial")}
    overrides |= {key: value for key, value in keys.items() if value is not None}
    return resumed(overrides) if overrides.get("resume") else validate(overrides)
