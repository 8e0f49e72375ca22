"""The command line of `python client.py` and `federate client`."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

import click

from federation.launch import log
from federation.launch.command_line import FORMATS, misuse, options, run_script

if TYPE_CHECKING:
    from federation.app.config import Settings

Server = options("The server")
Data = options("Data and partitions")
Machine = options("This machine")
Output = options("What is printed")
STATE = "runs/client-state"


def main() -> None:
    run_script(client)


def client(
    server: Annotated[str, Server(metavar="HOST:PORT", help="(default: 127.0.0.1:8080)")] = "127.0.0.1:8080",
    tls: Annotated[str | None, Server(metavar="DIR", help="the folder of ca.crt, and client.key")] = None,
    wait: Annotated[float, Server(metavar="SECONDS", help="how long to wait for it (default: 300)")] = 300,
    data: Annotated[str | None, Data(metavar="DIR", help="this client's data (default: the server's folder)")] = None,
    own_data: Annotated[bool, Data("--own-data", help="train on all of it, even if it is the server's")] = False,
    partition_id: Annotated[int | None, Data(metavar="I", help="take this partition (default: a free one)")] = None,
    num_partitions: Annotated[int | None, Data(metavar="N", help="of N")] = None,
    state: Annotated[str, Data(metavar="DIR", help="where it keeps its state (default: runs/client-state)")] = STATE,
    clients: Annotated[int, Machine(metavar="N", help="play N clients (default: 1)")] = 1,
    threads: Annotated[int | None, Machine(metavar="N", help="(default: the cores, shared by the clients)")] = None,
    verbose: Annotated[bool, Output("--verbose", help="show Flower's own lines, too")] = False,
    log_format: Annotated[str, Output(click_type=FORMATS, help="json: an object per line (default: text)")] = "text",
) -> int:
    """Join a federated run, and train on this machine's data.

    \b
    federate client
    federate client --server HOST:8080 --tls keys/berlin --data DIR
    """
    return take_part(SimpleNamespace(**locals()))


def take_part(args: SimpleNamespace) -> int:
    """Join the run that these options name; return the exit status."""
    log.style.set(args.log_format, args.verbose)
    check_options(args)
    from federation.launch import join, network  # here, so that --help need not wait for Flower
    from federation.security import certificates

    with misuse("--server"):
        server = network.address(args.server)
    with misuse("--tls"):
        tls = None if args.tls is None else certificates.client_folder(args.tls)
    check_data(args.data)
    return join.join_run(server, args.wait, node_config(args), args.threads, tls)


def check_options(args: SimpleNamespace) -> None:
    """Raise UsageError where options are out of range, or do not go together."""
    if (args.partition_id is None) != (args.num_partitions is None):
        raise click.UsageError("--partition-id and --num-partitions go together")
    if args.own_data and (args.clients > 1 or args.partition_id is not None):
        raise click.UsageError(
            "--own-data goes with neither --clients nor --partition-id: the client trains on all of its data"
        )
    if args.clients > 1 and args.partition_id is not None:
        raise click.UsageError("--clients and --partition-id exclude each other")
    for option in ("clients", "num_partitions", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise click.UsageError(f"--{option.replace('_', '-')} {value}: 1 or more is needed")
    if args.num_partitions and not 0 <= args.partition_id < args.num_partitions:
        raise click.UsageError(f"--partition-id {args.partition_id} is not one of 0 to {args.num_partitions - 1}")
    if not args.wait >= 0:
        raise click.UsageError(f"--wait {args.wait:g}: 0 or more is needed")


def check_data(data: str | None) -> None:
    """Raise OSError where `data` is a path and nothing is there. Other names are for the task to understand."""
    if data and any(sign in data for sign in (os.sep, "/", "~")) and not Path(data).expanduser().exists():
        raise FileNotFoundError(f"--data {data}: there is no such file or folder")


def node_config(args: SimpleNamespace) -> "Settings":
    """Return what the ClientApp is told about this client."""
    names = ("clients", "own_data", "data", "partition_id", "num_partitions")
    values = {name.replace("_", "-"): getattr(args, name) for name in names}
    values["state"] = str(Path(args.state).expanduser().absolute())
    return {key: value for key, value in values.items() if value is not None}
