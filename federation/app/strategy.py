"""Flower's strategies by the run config, their state for a checkpoint, and the guard in front of them."""

import math
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy

from federation.app import metrics
from federation.app.config import RunConfig
from federation.app.console import one_line
from federation.app.weights import check_compatible, restore_dtypes, stored_dtype

LOSS = {MessageType.TRAIN: "train-loss", MessageType.EVALUATE: "loss"}  # as a reply calls it
STATE = ("m_t", "v_t")  # where Flower's strategies keep what they carry from round to round
MOST_METRICS = 100  # of a client
GROWTH = 10  # by what a client's own data may have grown since it joined


def make_strategy(config: RunConfig, state: dict[str, ArrayRecord]) -> Strategy:
    """Return the strategy that `config` names, with the state that an earlier process has saved.

    "fedavg": McMahan et al. 2017, algorithm 1; "fedadam": Reddi et al. 2021, algorithm 2.
    """
    sampling: dict[str, Any] = {
        "fraction_train": config.fraction_train, "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1,
    }  # fmt: skip
    if config.strategy == "fedavg":
        return FedAvg(**sampling)
    strategy = FedAdam(
        **sampling, eta=config.server_learning_rate, beta_1=config.beta_1, beta_2=config.beta_2,
        tau=config.tau,
    )  # fmt: skip
    vars(strategy).update({name: {key: array.numpy() for key, array in state[name].items()} for name in state})
    return strategy


def strategy_state(strategy: Strategy) -> dict[str, ArrayRecord]:
    """Return what the next round depends on, besides the global model."""
    held = {name: getattr(strategy, name, None) for name in STATE}
    return {name: ArrayRecord({k: Array(np.asarray(v)) for k, v in old.items()}) for name, old in held.items() if old}


def aggregate_train(
    strategy: Strategy, server_round: int, replies: list[Message], before: ArrayRecord
) -> tuple[ArrayRecord, dict[str, Any]]:
    """Return the new global model that the strategy makes of the clients' models, and what metrics.json says of them.

    Its entries keep the dtypes that they had `before`. Raises RuntimeError where one is not finite.
    """
    arrays, averaged = strategy.aggregate_train(server_round, replies)
    assert arrays is not None and averaged is not None
    arrays = restore_dtypes(before, arrays)
    check_finite(arrays)
    trained = metrics.per_client(replies, "train-")
    results: dict[str, Any] = {f"train_{name}": averaged[f"train-{name}"] for name in metrics.names(trained)}
    results |= {"clients": len(replies), "samples": trained["samples"], "trained": trained}
    return arrays, results | {"client_seconds": max(trained["seconds"])}


def aggregate_evaluate(
    strategy: Strategy, server_round: int, replies: list[Message], results: dict[str, Any]
) -> dict[str, Any]:
    """Return the `results` of training, with those of the clients' evaluation added."""
    averaged = strategy.aggregate_evaluate(server_round, replies) or MetricRecord()
    tested = metrics.per_client(replies)
    found = {f"clients_{name}": averaged[name] for name in metrics.names(tested)}
    seconds = results["client_seconds"] + max(tested.get("seconds", [0.0]))
    return results | found | {"tested": tested, "fairness": metrics.fairness(tested), "client_seconds": seconds}


def check_finite(arrays: ArrayRecord) -> None:
    """Raise RuntimeError where a global model has an entry that is not finite: the sum of large numbers can be."""
    for name, array in arrays.items():
        if not np.isfinite(array.numpy()).all():
            raise RuntimeError(f"{name} of the new global model is not finite; a smaller learning rate may help")


def check_reply(question: Message, reply: Message, samples: dict[str, int], exactly: bool) -> None:
    """Raise ValueError, which says why in one line, unless a reply can be aggregated.

    `samples` is how many the client has by split, `exactly` so many or, with data of its own, about so many.
    """
    try:
        _check(question, reply, samples, exactly)
    except Exception as error:  # an untrusted reply must never stop the run
        raise ValueError(f"{one_line(error):.300}") from None


def _check(question: Message, reply: Message, samples: dict[str, int], exactly: bool) -> None:
    if reply.has_error():
        raise ValueError(one_line(reply.error.reason))
    training = question.metadata.message_type == MessageType.TRAIN
    records = {"arrays", "metrics"} if training else {"metrics"}
    if set(reply.content) != records:
        raise ValueError(f"its reply has the records {sorted(reply.content)}, not {sorted(records)}")
    _check_numbers(dict(reply.content.metric_records.get("metrics") or {}), LOSS[question.metadata.message_type])
    held = samples["train" if training else "test"]
    counted = reply.content.metric_records["metrics"]["num-examples"]
    if type(counted) is not int or not (counted == held if exactly else 0 < counted <= GROWTH * held):
        raise ValueError(f"num-examples={counted} cannot be: it has joined with {held} samples")
    if training:
        _check_model(reply.content.array_records.get("arrays") or ArrayRecord(), question)


def _check_numbers(found: dict[str, Any], loss: str) -> None:
    for name in sorted({*metrics.COUNTS, loss} - set(found)):
        raise ValueError(f"it reports no {name}")
    if len(found) > MOST_METRICS:
        raise ValueError(f"it reports {len(found)} metrics, more than {MOST_METRICS}")
    for name, value in found.items():
        if not metrics.NAME.fullmatch(name):
            raise ValueError(f"it reports a metric called {name!r:.60}")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    if not 0 <= found.get("accuracy", 0) <= 1:
        raise ValueError(f"accuracy is {found['accuracy']}, not in 0 to 1")


def _check_model(arrays: ArrayRecord, question: Message) -> None:
    expected = question.content.array_records["arrays"]
    check_compatible(arrays, expected)
    if list(arrays) != list(expected):  # that of the first reply would become the global model's, and change its digest
        raise ValueError(f"its arrays come in the order {list(arrays)}, not {list(expected)}")
    for name, array in arrays.items():
        try:
            values = array.numpy()
            found = values.shape, values.dtype  # an archive of arrays has neither
        except Exception as error:  # whatever the bytes of a stranger bring about
            raise ValueError(f"{name} cannot be read: {one_line(error)}") from None
        ours = tuple(expected[name].shape), stored_dtype(expected[name].dtype)
        if found != ours:
            raise ValueError(f"{name} holds {values.dtype} of shape {values.shape}, not {ours[1]} of {ours[0]}")
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite: {np.count_nonzero(~np.isfinite(values))} of {values.size} values")
