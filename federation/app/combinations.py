"""Settings that do not go together. They are refused before anything starts, in one line that says why."""

from collections.abc import Callable
from typing import Any

REFUSED: list[tuple[str, str, Callable[[Any], bool]]] = [  # two settings, why not, and whether a config has both
    ("clients-per-round", "is more than num-clients", lambda c: c.clients_per_round > c.num_clients),
    ("learning-rate-schedule", "needs a learning-rate to begin with",
     lambda c: c.learning_rate_schedule != "constant" and not c.learning_rate),
    ("local-steps", "and local-epochs exclude each other", lambda c: c.local_steps > 0 and c.local_epochs > 1),
    ("compression", "is of what has changed: it needs upload=delta",
     lambda c: c.compression != "none" and c.upload == "weights"),
    ("topology", "has no server that averages: it goes with strategy=fedavg only",
     lambda c: c.topology != "star" and c.strategy != "fedavg"),
    ("topology", "goes without personal, upload=delta and dp: neighbours exchange whole models",
     lambda c: c.topology != "star" and (c.personal or c.upload == "delta" or c.dp != "none")),
    ("topology", "lets every client train in every round: it goes without fraction-train and clients-per-round",
     lambda c: c.topology != "star" and (c.fraction_train < 1 or c.clients_per_round > 0)),
    ("topology", "needs three clients or more", lambda c: c.topology == "ring" and c.num_clients < 3),
    ("topology", "needs two clients or more: there is nobody to average with",
     lambda c: c.topology in ("random", "full") and c.num_clients < 2),
    ("neighbours", "is not less than num-clients: with all others, it is topology=full",
     lambda c: c.topology == "random" and c.neighbours >= c.num_clients),
    ("dp", "accounts for a mean in which all clients weigh the same: it goes with strategy=fedavg only",
     lambda c: c.dp not in ("none", "local") and c.strategy not in ("fedavg", "fedprox")),
    ("dp", "and compression exclude each other: what is not sent cannot be covered by noise",
     lambda c: c.dp != "none" and c.compression != "none"),
    ("dp", "clips what clients send: it goes without strategy=scaffold, whose variates are not clipped",
     lambda c: c.dp == "local" and c.strategy == "scaffold"),
    ("dp-target-epsilon", "needs dp, and not dp=local, whose clients account for themselves",
     lambda c: c.dp_target_epsilon > 0 and c.dp in ("none", "local")),
    ("strategy", "keeps control variates for the whole model: it goes without personal",
     lambda c: c.strategy == "scaffold" and bool(c.personal)),
    ("strategy", "sends control variates, which are not compressed: it goes with upload=weights only",
     lambda c: c.strategy == "scaffold" and c.upload == "delta"),
]  # fmt: skip


def check_combinations(config: Any) -> None:
    """Raise ValueError where two settings of a run config do not go together."""
    for key, why, refused in REFUSED:
        if refused(config):
            raise ValueError(f"{key}={getattr(config, key.replace('-', '_'))} {why}")
