"""The strategies, by name, and a class of the user's own; their state for a checkpoint; and what they make of a round.

Adding a strategy is a row of STRATEGIES.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from federation.app import metrics
from federation.app.config import RunConfig, SettingError, parse
from federation.app.console import one_line
from federation.app.gossip import Gossip
from federation.app.privacy import RECORD, Private, protect
from federation.app.scaffold import Scaffold
from federation.app.task import add_task_folders
from federation.app.weights import restore_dtypes, view

Arguments = Mapping[str, Any]
Limits = tuple[float, float]
STEP: Limits = (1e-9, 1e6)
DECAY: Limits = (0.0, 0.999999)
ADAPTIVE: dict[str, Limits] = {"eta": STEP, "tau": (1e-12, 1e6)}  # Reddi et al. 2021, algorithm 2
MOMENTS: dict[str, Limits] = {"beta_1": DECAY, "beta_2": DECAY}
REPORTED = ("consensus",)  # what a strategy may say of a round, besides means of the clients' metrics
BAD: dict[str, Limits] = {"num_malicious_nodes": (0, 100_000)}  # a whole number, as these limits are


@dataclass(frozen=True)
class Row:
    """A strategy: its class, and what there is to know about it."""

    make: Callable[..., Strategy]
    limits: Mapping[str, Limits] = field(default_factory=dict)  # the smallest and the largest value of each parameter
    defaults: Arguments = field(default_factory=dict)  # where the class has none, or one that makes it FedAvg
    given: Callable[[RunConfig], Arguments] = lambda config: {}  # what the run config settles
    state: tuple[str, ...] = ()  # the attributes that it carries from round to round: lists or dictionaries of arrays
    renewed: tuple[str, ...] = ()  # attributes that it would otherwise carry along, though the global model is known
    least: Callable[[Arguments], int] = lambda arguments: 1  # how many models a round needs
    hooks: bool = False  # whether clients change gradients
    bounded: bool = True  # whether only the parameters in `limits` can be set


STRATEGIES = {
    "fedavg": Row(flower.FedAvg),
    "fedprox": Row(flower.FedProx, {"proximal_mu": (0.0, 1e6)}, {"proximal_mu": 0.01}, hooks=True),
    "scaffold": Row(Scaffold, {"server_learning_rate": STEP}, given=lambda config: {"num_clients": config.num_clients},
                    state=("variates",), hooks=True),
    "fedavgm": Row(flower.FedAvgM, {"server_learning_rate": STEP, "server_momentum": DECAY}, {"server_momentum": 0.9},
                   state=("momentum_vector",), renewed=("current_arrays",)),
    "fedadagrad": Row(flower.FedAdagrad, ADAPTIVE, state=("m_t", "v_t")),
    "fedadam": Row(flower.FedAdam, ADAPTIVE | MOMENTS, state=("m_t", "v_t")),
    "fedyogi": Row(flower.FedYogi, ADAPTIVE | MOMENTS, state=("m_t", "v_t")),
    "qfedavg": Row(flower.QFedAvg, {"q": (0.0, 100.0)},
                   given=lambda config: {"client_learning_rate": _rate(config), "train_loss_key": "train-loss"}),
    "fedmedian": Row(flower.FedMedian, least=lambda _: 3),
    "fedtrimmedavg": Row(flower.FedTrimmedAvg, {"beta": (0.001, 0.499)},
                         least=lambda given: max(3, math.ceil(1 / given["beta"]))),
    "krum": Row(flower.Krum, BAD, {"num_malicious_nodes": 1}, least=lambda given: 2 * _bad(given) + 3),
    "multikrum": Row(flower.MultiKrum, BAD | {"num_nodes_to_select": (1, 100_000)},
                     {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
                     least=lambda given: max(2 * _bad(given) + 3, _bad(given) + int(given["num_nodes_to_select"]))),
    "bulyan": Row(flower.Bulyan, BAD, {"num_malicious_nodes": 1}, least=lambda given: 4 * _bad(given) + 3),
}  # fmt: skip
GOSSIP = Row(
    Gossip,  # in the place of fedavg, where no server averages
    given=lambda config: {"topology": config.topology, "neighbours": config.neighbours, "seed": config.seed},
)


def _rate(config: RunConfig) -> float:
    if not config.learning_rate:
        raise SettingError("strategy=qfedavg weighs clients by their learning rate: it needs a learning-rate")
    return config.learning_rate


def _bad(given: Arguments) -> int:
    return int(given["num_malicious_nodes"])


def make_strategy(config: RunConfig, state: Mapping[str, ArrayRecord]) -> Strategy:
    """Return the strategy that `config` names, with the state that an earlier process has saved.

    Raises SettingError where there is none of that name, where it cannot be made with its strategy-arguments, or where
    a round has too few clients for it.
    """
    row = find(config.strategy) if config.topology == "star" else GOSSIP
    check_strategy(config)
    state = dict(state)
    private = state.pop(RECORD, None)
    number = config.clients_asked if config.central_dp else config.clients_per_round
    sampling: dict[str, Any] = {
        "fraction_train": 1e-9 if number else config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate, "min_train_nodes": number or 1,
        "min_evaluate_nodes": 1, "min_available_nodes": 1,
    }  # fmt: skip
    parameters = inspect.signature(row.make).parameters
    passes_on = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    sampling = {name: value for name, value in sampling.items() if name in parameters or passes_on}
    try:
        strategy = row.make(**sampling, **row.given(config), **arguments(config))
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"strategy={config.strategy} with {config.strategy_arguments!r}: {one_line(error)}"
        ) from None
    for name, saved in state.items():
        attribute, _, kind = name.partition(" ")
        values = {key: array.numpy() for key, array in saved.items()}
        setattr(strategy, attribute, [*values.values()] if kind == "list" else values)
    return protect(strategy, config, private)


def find(name: str) -> Row:
    """Return the row of a strategy, or one for a class of the user's own."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, _, attribute = name.rpartition(".")
    try:
        add_task_folders()
        made = getattr(importlib.import_module(module), attribute) if module else None
    except Exception as error:  # whatever the user's module does when it is imported
        raise SettingError(f"strategy={name!r} cannot be imported: {one_line(error)}") from None
    if not (inspect.isclass(made) and issubclass(made, Strategy)):
        known = ", ".join(STRATEGIES)
        raise SettingError(
            f"strategy={name!r} is none of: {known}; nor the dotted name of a class of Flower's Strategy"
        )
    return _row_of(made)


def _row_of(made: type[Strategy]) -> Row:
    """Return the row of a class: of the table, or a new one for a class of the user's own."""
    rows = [row for row in STRATEGIES.values() if row.make is made]
    return rows[0] if rows else Row(made, state=tuple(getattr(made, "state", ())), bounded=False)


def arguments(config: RunConfig) -> dict[str, Any]:
    """Return the parameters of a strategy: its defaults, and what strategy-arguments sets. Raises SettingError."""
    row, given = find(config.strategy), parse(config.strategy_arguments)
    for name, value in given.items() if row.bounded else ():
        if name not in row.limits:
            known = ", ".join(row.limits) or "none"
            raise SettingError(f"strategy-arguments: {config.strategy} takes no {name}; what can be set: {known}")
        low, high = row.limits[name]
        kinds = (int,) if isinstance(high, int) else (int, float)
        if type(value) not in kinds or not low <= value <= high:
            raise SettingError(f"strategy-arguments: {name}={value!r} is out of range: {low:g} to {high:g} is allowed")
    own = {name: one.default for name, one in inspect.signature(row.make).parameters.items() if name in row.limits}
    return {**own, **row.defaults, **given}


def least_models(config: RunConfig) -> int:
    """Return how many models the strategy needs to make a new one; with noise, it is meant for all that are asked."""
    return config.clients_asked if config.central_dp else find(config.strategy).least(arguments(config))


def check_strategy(config: RunConfig) -> None:
    """Raise SettingError where there is no such strategy, or with other arguments, or for more clients than there are.

    It is not made for that: some of Flower's classes log a warning when they are.
    """
    find(config.strategy).given(config)
    trained = config.clients_asked
    if (least := least_models(config)) > trained:
        how = f" with {config.strategy_arguments}" * bool(config.strategy_arguments)
        raise SettingError(f"strategy={config.strategy}{how} needs {least} clients in a round, and there are {trained}")


def strategy_state(strategy: Strategy) -> dict[str, ArrayRecord]:
    """Return what the next round depends on, besides the global model."""
    if isinstance(strategy, Private):
        return strategy_state(strategy.strategy) | {RECORD: strategy.to_record()}
    records = {}
    for name in _row_of(type(strategy)).state:
        if (held := getattr(strategy, name, None)) is not None:
            pairs = held.items() if isinstance(held, Mapping) else zip(map(str, range(len(held))), held, strict=True)
            kind = "" if isinstance(held, Mapping) else " list"
            records[name + kind] = ArrayRecord({key: Array(np.asarray(value)) for key, value in pairs})
    return records


def aggregate_train(
    strategy: Strategy, server_round: int, replies: list[Message], before: ArrayRecord
) -> tuple[ArrayRecord, dict[str, Any]]:
    """Return the new global model that the strategy makes of the clients' models, and what metrics.json says of them.

    Its entries keep the dtypes that they had `before`. Raises RuntimeError where one is not finite.
    """
    arrays, averaged = strategy.aggregate_train(server_round, replies)
    vars(strategy).update(dict.fromkeys(_row_of(type(strategy)).renewed))
    if arrays is None or averaged is None:
        raise RuntimeError(f"round {server_round}: {type(strategy).__name__} made no model of {len(replies)} good ones")
    arrays = ArrayRecord({**before, **restore_dtypes(before, arrays)})  # personal entries have no mean
    check_finite(arrays)
    trained = metrics.per_client(replies, "train-")
    results: dict[str, Any] = {f"train_{name}": averaged[f"train-{name}"] for name in metrics.names(trained)}
    results |= {"clients": len(replies), "samples": trained["samples"], "trained": trained}
    results |= {name: averaged[name] for name in REPORTED if name in averaged}
    results |= strategy.spent() if isinstance(strategy, Private) else {}
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
        if not np.isfinite(view(array)).all():
            raise RuntimeError(f"{name} of the new global model is not finite; a smaller learning rate may help")
