"""Federate cifar.py, or any other task, without changing a line of it: the server.

    python server.py                                     # waits for two clients, trains three rounds
    python server.py --clients 4 --rounds 10 --data DIR
    python server.py --simulate 10                       # ten clients on this machine, no further terminal

`main` is Federated Averaging (McMahan et al. 2017, algorithm 1) by means of Flower's FedAvg: in every round the clients
train the global model on their own data, and the mean of their models, weighted by sample numbers, is the next one.
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.app.client_grid import ClientGrid
from federation.app.config import validate
from federation.app.console import announce_end
from federation.app.global_model import load_global_model
from federation.app.report import Report
from federation.app.roster import Roster
from federation.app.strategy import aggregate_evaluate, aggregate_train, make_strategy, strategy_state

app = ServerApp()


@app.main()
@announce_end
def main(grid: Grid, context: Context) -> None:
    """Run the federation. Flower calls this when a run has started."""
    config = validate(context.run_config)
    model = load_global_model(config)
    report = Report(config, model)
    arrays = report.arrays or model.initial()
    strategy = make_strategy(config, report.state)
    roster = Roster(grid, config, model, report.past())
    clients = ClientGrid(grid, roster)

    with roster.session(meanwhile=report.draw), report.marking_failure():
        if report.next_round == 0:
            report.round(arrays, strategy_state(strategy), roster.places, **model.test(arrays))
        roster.wait_for(config.num_clients)
        report.partitions(roster.held_partitions(), model.data)
        for server_round in report.remaining_rounds():
            models = clients.train(strategy, server_round, arrays)
            arrays, trained = aggregate_train(strategy, server_round, models, arrays)
            del models  # those of the next round take as much memory again
            answers = clients.evaluate(strategy, server_round, arrays)
            results = aggregate_evaluate(strategy, server_round, answers, trained) | model.test(arrays)
            clients.check_agreement(answers, results)
            report.round(arrays, strategy_state(strategy), roster.places, **results, **clients.pop_counters())
        report.finish()


if __name__ == "__main__":
    from federation.launch import server_command  # here, because a process that runs the ServerApp launches nothing

    server_command.main()
