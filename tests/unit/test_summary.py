"""What is said of a run at its end."""

from federation.app.config import validate
from federation.app.summary import summary
from tests.runs import row

BEST = {"round": 2, "metric": "server_loss", "value": 0.66666}


def test_a_summary_has_the_settings_the_seconds_and_the_last_metrics() -> None:
    config = validate({"strategy": "fedavgm", "strategy-arguments": "server_momentum=0.9", "alpha": 0.1, "out": "x"})
    assert summary(config, [row(number) for number in range(3)], BEST).splitlines() == [
        "strategy  fedavgm strategy-arguments='server_momentum=0.9' alpha=0.1",
        "seconds   7.0: waiting 1.0, training 1.0, evaluation 1.0, the server and the network 4.0",
        "last      train_loss 0.5000, server_loss 0.6667, server_accuracy 0.2000",
        "best      server_loss 0.6667, in round 2",
    ]


def test_a_run_of_which_nothing_was_tested_has_no_best_round() -> None:
    untested = row(0) | {"server_loss": None, "server_accuracy": None}
    assert summary(validate({}), [untested], None).splitlines() == [
        "strategy  fedavg",
        "seconds   2.0: waiting 0.0, training 0.0, evaluation 0.0, the server and the network 2.0",
    ]
