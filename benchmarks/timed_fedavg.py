"""FedAvg that notes when it is asked, for seconds.py."""

from typing import Any

from flwr.serverapp.strategy import FedAvg

from benchmarks.timed_cifar import noting


class TimedFedAvg(FedAvg):
    def configure_train(self, server_round: int, *args: Any) -> Any:
        with noting("configure train", server_round):
            return super().configure_train(server_round, *args)

    def aggregate_train(self, server_round: int, *args: Any) -> Any:
        with noting("aggregate train", server_round):
            return super().aggregate_train(server_round, *args)

    def configure_evaluate(self, server_round: int, *args: Any) -> Any:
        with noting("configure evaluate", server_round):
            return super().configure_evaluate(server_round, *args)

    def aggregate_evaluate(self, server_round: int, *args: Any) -> Any:
        with noting("aggregate evaluate", server_round):
            return super().aggregate_evaluate(server_round, *args)
