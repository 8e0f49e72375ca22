"""Federate cifar.py, or any other task, without changing a line of it: the server.

    python server.py                                     # waits for two clients, trains three rounds
    python server.py --clients 4 --rounds 10 --data DIR
    python server.py --simulate 10                       # ten clients on this machine, no further terminal

`main` is Federated Averaging (McMahan et al. 2017, algorithm 1) by means of Flower's FedAvg: in every round the clients
train the global model on their own data, and the mean of their models, weighted by sample numbers, is the next one.
"""

import argparse
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from federation import certificates, launch, network, simulation, weights
from federation.checkpoint import resumed
from federation.client_grid import ClientGrid
from federation.config import checked, parse
from federation.console import explained_run, reason
from federation.folder import run_folder
from federation.report import Report
from federation.roster import Roster
from federation.strategy import check_finite, make_strategy, strategy_state
from federation.task import build_net, find_data, load_task, read_data

app = ServerApp()


@app.main()
@explained_run
def main(grid: Grid, context: Context) -> None:
    """Run the federation. Flower calls this when a run has started."""
    config = checked(context.run_config)
    task = load_task(config["task"])
    root = find_data(task, config["data"])
    data = read_data(task, root)
    net = build_net(task, config["seed"])
    roster = Roster(grid, config, root, data)
    report = Report(config, root, data)
    roster.restore(report.metrics)
    clients = ClientGrid(grid, roster)
    arrays = report.arrays or weights.from_net(net)
    strategy = make_strategy(config, report.state)

    def test(arrays: ArrayRecord) -> dict[str, float]:
        weights.to_net(arrays, net)
        loss, accuracy = task.test(net, data[1])
        return {"server_loss": float(loss), "server_accuracy": float(accuracy)}

    try:
        if report.next_round == 0:
            report.round(arrays, {}, **test(arrays))
        roster.wait_for(config["num-clients"])
        report.partitions(roster.held_partitions(), data)
        for server_round in range(report.next_round, config["num-server-rounds"] + 1):
            arrays, results = play_round(server_round, arrays, strategy, clients)
            results |= test(arrays)
            clients.compare(results)
            report.round(arrays, strategy_state(strategy), **results)
        report.finish(net)
    except Exception as error:
        report.fail()
        roster.end_session(reason(error))
        raise
    roster.end_session(meanwhile=report.draw)


def play_round(
    server_round: int, arrays: ArrayRecord, strategy: Strategy, clients: ClientGrid
) -> tuple[ArrayRecord, dict[str, Any]]:
    """Let clients train the global model and test the outcome; return it, and what they report."""
    replies = clients.train(strategy, server_round, arrays)
    mean, training = strategy.aggregate_train(server_round, replies)
    assert mean is not None and training is not None
    new_arrays = weights.as_before(arrays, mean)
    check_finite(new_arrays)
    answers = clients.evaluate(strategy, server_round, new_arrays)
    testing = strategy.aggregate_evaluate(server_round, answers) or MetricRecord()
    return new_arrays, {
        "train_loss": training["train-loss"],
        "clients_loss": testing.get("loss"),
        "clients_accuracy": testing.get("accuracy"),
        "clients": len(replies),
        "samples": [reply.content.metric_records["metrics"]["num-examples"] for reply in replies],
        "client_seconds": slowest(replies) + slowest(answers),
        **clients.pop_counters(),
    }


def slowest(replies: list[Message]) -> float:
    """Return the seconds that the slowest client worked on its reply, from reading its data on."""
    return max((cast(float, reply.content.metric_records["metrics"]["seconds"]) for reply in replies), default=0.0)


def command() -> int:
    """Read the command line and host the run; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--rounds", type=int, metavar="N", dest="num-server-rounds")
    parser.add_argument("--clients", type=int, metavar="N", dest="num-clients", help="how many to wait for")
    parser.add_argument("--task", metavar="MODULE", help="what to federate (default: cifar)")
    parser.add_argument("--data", metavar="DIR", help="the data folder, as in cifar.py")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default: runs/federated)")
    parser.add_argument("--run-config", action="append", default=[], metavar="'KEY=VALUE …'", help="as for flwr run")
    parser.add_argument("--resume", action="store_true", default=None, help="go on with the run in the run folder")
    parser.add_argument("--simulate", type=int, metavar="N", help="play N clients on this machine")
    parser.add_argument("--gpus-per-client", type=float, metavar="F", help="with --simulate (default: all, shared)")
    parser.add_argument(
        "--federation-config", default="", metavar="'KEY=VALUE …'", help="with --simulate, as for flwr run"
    )
    parser.add_argument("--address", type=network.address, metavar="HOST:PORT", help="(default: 127.0.0.1:8080)")
    parser.add_argument("--tls", metavar="DIR", type=certificates.server_folder, help="with server.crt, server.key, …")
    parser.add_argument("--insecure", action="store_true", help="serve other machines without TLS")
    args = vars(parser.parse_args())
    simulate, address, tls, insecure = (args.pop(name) for name in ("simulate", "address", "tls", "insecure"))
    gpus_per_client, federation_config = args.pop("gpus_per_client"), args.pop("federation_config")
    if simulate is not None and simulate < 1:
        parser.error(f"--simulate {simulate}: 1 client or more is needed")
    if simulate is not None and (address or tls or args["num-clients"] is not None):
        parser.error("--simulate N plays all clients here: it goes with none of --clients, --address and --tls")
    if simulate is None and (gpus_per_client is not None or federation_config):
        parser.error("--gpus-per-client and --federation-config go with --simulate")
    address = address or ("127.0.0.1", 8080)
    try:
        network.check_exposed(address, tls is not None, insecure)
        overrides = {key: value for text in args.pop("run_config") for key, value in parse(text).items()}
        overrides |= {key: value for key, value in args.items() if value is not None}
        overrides |= {} if simulate is None else {"num-clients": simulate}
        config = resumed(overrides) if overrides.get("resume") else checked(overrides)
        nodes = simulation.plan(config["num-clients"], gpus_per_client, federation_config) if simulate else None
    except ValueError as error:
        parser.error(str(error))
    config["out"] = launch.writable(config["out"])
    if nodes:
        print(simulation.describe(config["num-clients"], nodes), flush=True)
    else:
        network.check_free(address)
    with run_folder(Path(config["out"])):
        return launch.host_run(address, config, nodes, tls)


if __name__ == "__main__":
    launch.run_command(command)
