"""The command line of server.py."""

import argparse
from pathlib import Path

from federation.app.checkpoint import resumed
from federation.app.config import RunConfig, Settings, defaults, parse, validate
from federation.app.run_folder import run_folder
from federation.launch import host, network, simulation
from federation.launch.command import run_command
from federation.security import certificates

DESCRIPTION = "Host a federated run: serve clients, or simulate them on this machine."


def main() -> None:
    run_command(server)


def server() -> int:
    """Read the command line and host the run; return its exit status."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, usage="%(prog)s [options]")
    add_options(parser)
    args = parser.parse_args()
    check_options(parser, args)
    address = args.address or ("127.0.0.1", 8080)
    try:
        network.check_exposed(address, args.tls is not None, args.insecure)
        config = run_config(args)
        nodes = plan(args, config)
    except ValueError as error:
        parser.error(str(error))
    config = config.changed(out=host.writable(config.out))
    if nodes:
        print(simulation.describe(config.num_clients, nodes), flush=True)
    else:
        network.check_free(address)
    with run_folder(Path(config.out)):
        return host.host_run(address, config, nodes, args.tls)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    keys = parser.add_argument_group("short for a key of the run config").add_argument
    keys("--rounds", type=int, metavar="N", dest="num-server-rounds")
    keys("--clients", type=int, metavar="N", dest="num-clients", help="how many to wait for")
    keys("--task", metavar="MODULE", help="what to federate (default: cifar)")
    keys("--data", metavar="DIR", help="the data folder, as in cifar.py")
    keys("--out", metavar="DIR", help="the run folder (default: runs/federated)")
    keys("--resume", action="store_true", default=None, help="go on with the run in the run folder")
    add("--run-config", action="append", default=[], metavar="'KEY=VALUE …'", help="as for flwr run")
    add("--simulate", type=int, metavar="N", help="play N clients on this machine")
    add("--gpus-per-client", type=float, metavar="F", help="with --simulate (default: all, shared)")
    add("--federation-config", default="", metavar="'KEY=VALUE …'", help="with --simulate, as for flwr run")
    add("--address", type=network.address, metavar="HOST:PORT", help="(default: 127.0.0.1:8080)")
    add("--tls", metavar="DIR", type=certificates.server_folder, help="with server.crt, server.key, …")
    add("--insecure", action="store_true", help="serve other machines without TLS")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where options do not go together."""
    if args.simulate is None and (args.gpus_per_client is not None or args.federation_config):
        parser.error("--gpus-per-client and --federation-config go with --simulate")
    if args.simulate is not None and args.simulate < 1:
        parser.error(f"--simulate {args.simulate}: 1 client or more is needed")
    if args.simulate is not None and (args.address or args.tls or vars(args)["num-clients"] is not None):
        parser.error("--simulate N plays all clients here: it goes with none of --clients, --address and --tls")


def plan(args: argparse.Namespace, config: RunConfig) -> Settings | None:
    """Return the nodes of a simulation, None where clients are served."""
    if args.simulate is None:
        return None
    return simulation.plan(config.num_clients, args.gpus_per_client, args.federation_config)


def run_config(args: argparse.Namespace) -> RunConfig:
    """Return the run config of a command line. Raises ValueError for an unknown key or a wrong value."""
    overrides: Settings = {}
    for text in args.run_config:
        overrides |= parse(text)
    given = vars(args) | {"num-clients": args.simulate or vars(args)["num-clients"]}
    overrides |= {key: given[key] for key in defaults().keys() & given.keys() if given[key] is not None}
    return resumed(overrides) if overrides.get("resume") else validate(overrides)
