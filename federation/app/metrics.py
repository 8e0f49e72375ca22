"""What train() and test() return: a loss, and other numbers under names of their own."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import pstdev
from typing import Any, SupportsFloat

from flwr.app import Message, MetricRecord

NAME = re.compile(r"[A-Za-z][\w.@%/-]{0,39}")
TAKEN = {"loss", "seconds", "samples", "client", "num-examples"}
COUNTS = "num-examples", "seconds"  # what each reply has besides the metrics
SHAPES = {
    "train": "train the net that it is given, and return the mean loss per sample, or (loss, {name: number})",
    "test": "return (mean loss per sample, accuracy), or (loss, {name: number})",
}
Metrics = dict[str, float]  # the loss first


def named(function: str, returned: Any) -> Metrics:
    """Return, by name, the numbers that `function`, "train" or "test", has returned.

    What train() may return is a mean loss per sample, or a loss and a dictionary of other numbers; test() may return a
    loss and the accuracy in 0..1, or a loss and such a dictionary. Raises ValueError for anything else.
    """
    loss, others = returned if isinstance(returned, tuple | list) and len(returned) == 2 else (returned, {})
    if function == "test" and returned is loss:
        raise _wrong(function, returned)
    if function == "test" and isinstance(others, SupportsFloat):
        others = {"accuracy": _in_unit_range(others)}
    if not isinstance(loss, SupportsFloat) or not isinstance(others, Mapping):
        raise _wrong(function, returned)
    for name, value in others.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN:
            raise ValueError(f"{function}() returns a metric called {name!r}; a name is a letter, and then up to 39 "
                             f"letters, digits and _ . @ % / -, and none of: {', '.join(sorted(TAKEN))}")  # fmt: skip
        if not isinstance(value, SupportsFloat):
            raise ValueError(f"{function}() returns {name} of type {type(value).__name__}, but it should be a number")
    return {"loss": float(loss)} | {name: float(value) for name, value in others.items()}


def _wrong(function: str, returned: Any) -> ValueError:
    shown = type(returned).__name__ if function == "train" else f"{returned!r:.100}"
    return ValueError(f"{function}() returns {shown}, but it should {SHAPES[function]}")


def _in_unit_range(accuracy: SupportsFloat) -> float:
    if float(accuracy) < 0 or float(accuracy) > 1:
        raise ValueError(f"test() returns an accuracy of {float(accuracy):g}; it should lie in 0..1")
    return float(accuracy)


def of_server(returned: Any) -> Metrics:
    """Return what test() has returned as the server's metrics. Raises RuntimeError where one is not finite."""
    found = named("test", returned)
    for name, value in found.items():
        if not math.isfinite(value):
            raise RuntimeError(f"the {name} of the global model is {value}; a smaller learning rate may help")
    return {f"server_{name}": value for name, value in found.items()}


def of_side(side: str, results: Mapping[str, Any]) -> Metrics:
    """Return the metrics of "train", "clients" or "server" in a row of metrics.json."""
    found = {key.removeprefix(f"{side}_"): value for key, value in results.items() if key.startswith(f"{side}_")}
    return {name: found[name] for name in names(found)}


def minority(replies: Sequence[Message]) -> list[Message]:
    """Return the replies that report other metrics than most of them: a strategy can average only what all report."""
    reported = [frozenset(_record(reply)) for reply in replies]
    usual = Counter(reported).most_common(1)[0][0] if reported else None
    return [reply for reply, names in zip(replies, reported, strict=True) if names != usual]


def per_client(replies: Sequence[Message], prefix: str = "") -> dict[str, list[Any]]:
    """Return columns with a value for each client that has replied: its number, samples, metrics and seconds."""
    records = [_record(reply) for reply in replies]
    if not records:
        return {}
    columns: dict[str, list[Any]] = {"client": [reply.metadata.src_node_id for reply in replies]}
    columns["samples"] = [record["num-examples"] for record in records]
    for name in (*(name for name in records[0] if name not in COUNTS), "seconds"):
        columns[name.removeprefix(prefix)] = [_short(record[name]) for record in records]
    return columns


def _record(reply: Message) -> MetricRecord:
    return reply.content.metric_records["metrics"]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def fairness(tested: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the clients with the largest and the smallest loss, and how far each metric is spread over the clients.

    The spread is the standard deviation, each client counting as one (Li et al. 2020, q-FFL, section 4).
    """
    clients = tested.get("client", [])
    if len(clients) < 2:
        return {}
    by_loss = sorted(range(len(clients)), key=tested["loss"].__getitem__)
    spread = {name: _short(pstdev(tested[name])) for name in names(tested)}
    return {"worst": clients[by_loss[-1]], "best": clients[by_loss[0]], "standard_deviation": spread}


def names(columns: Iterable[str]) -> list[str]:
    """Return which of these columns are metrics."""
    return [name for name in columns if name == "loss" or name not in TAKEN]
