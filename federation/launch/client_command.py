"""The command line of client.py."""

import argparse
import os
from pathlib import Path

from federation.app.config import Settings
from federation.launch import join, network
from federation.launch.command import run_command
from federation.security import certificates

DESCRIPTION = "Join a federated run, and train on this machine's data."


def main() -> None:
    run_command(client)


def client() -> int:
    """Read the command line and join a run; return the exit status."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, usage="%(prog)s [options]")
    parser.add_argument("--server", default="127.0.0.1:8080", metavar="HOST:PORT", type=network.address)
    parser.add_argument("--data", metavar="DIR", help="this client's data (default: the server's data folder)")
    parser.add_argument("--own-data", action="store_true", help="train on all of it, even if it is the server's")
    parser.add_argument("--clients", type=int, default=1, metavar="N", help="play N clients (default: 1)")
    parser.add_argument("--partition-id", type=int, metavar="I", help="take this partition (default: a free one)")
    parser.add_argument("--num-partitions", type=int, metavar="N", help="of N")
    parser.add_argument("--tls", metavar="DIR", type=certificates.client_folder, help="with ca.crt, and client.key")
    parser.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="how long to wait for a server")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the cores, divided by the clients here)")
    args = parser.parse_args()
    check_options(parser, args)
    check_data(args.data)
    return join.join_run(args.server, args.wait, node_config(args), args.threads, args.tls)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where options are out of range, or do not go together."""
    if (args.partition_id is None) != (args.num_partitions is None):
        parser.error("--partition-id and --num-partitions go together")
    if args.own_data and (args.clients > 1 or args.partition_id is not None):
        parser.error("--own-data goes with neither --clients nor --partition-id: the client trains on all of its data")
    if args.clients > 1 and args.partition_id is not None:
        parser.error("--clients and --partition-id exclude each other")
    for option in ("clients", "num_partitions", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} {value}: 1 or more is needed")
    if args.num_partitions and not 0 <= args.partition_id < args.num_partitions:
        parser.error(f"--partition-id {args.partition_id} is not one of 0 to {args.num_partitions - 1}")
    if not args.wait >= 0:
        parser.error(f"--wait {args.wait:g}: 0 or more is needed")


def check_data(data: str | None) -> None:
    """Raise LaunchError where `data` is a path and nothing is there. Other names are for the task to understand."""
    if data and (os.sep in data or data.startswith("~")) and not Path(data).expanduser().exists():
        raise network.LaunchError(f"--data {data}: there is no such file or folder")


def node_config(args: argparse.Namespace) -> Settings:
    """Return what the ClientApp is told about this client."""
    names = ("clients", "own_data", "data", "partition_id", "num_partitions")
    values = {name.replace("_", "-"): getattr(args, name) for name in names}
    return {key: value for key, value in values.items() if value is not None}
