"""The curves of the page: each metric per round, with its spread over the clients, in as few points as show it."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

POINTS = 400  # of a curve, at most: a screen has hardly more pixels
SIDES = {
    "server": "server, whole test set",
    "clients": "clients, weighted mean",
    "train": "clients, training",
}
FURTHER = {  # other charts: title, and keys of a round with their labels
    "consensus distance": {"consensus": "consensus distance"},
    "epsilon spent": {"epsilon": "epsilon", "epsilon_next": "after another round, at most"},
    "seconds per round": {"seconds": "round", "client_seconds": "slowest client", "waiting_seconds": "waiting"},
    "bytes per round": {"bytes_down": "to the clients", "bytes_up": "from the clients"},
}
Row = dict[str, Any]


def metric_names(rounds: Sequence[Row]) -> list[str]:
    """Return the metrics of some rounds, the loss last."""
    keys = [key for row in rounds for key in row]
    found = dict.fromkeys(key.partition("_")[2] for key in keys if key.partition("_")[0] in SIDES and "_" in key)
    return [*(name for name in found if name not in ("loss", "seconds")), *(["loss"] if "loss" in found else [])]


def charts(rounds: Sequence[Row]) -> dict[str, Any]:
    """Return the rounds' numbers, and for each chart its title and curves: their labels, roles and values."""
    buckets = _buckets(len(rounds))
    drawn = [_metric(rounds, buckets, name) for name in metric_names(rounds)]
    drawn += [_further(rounds, buckets, title, keys) for title, keys in FURTHER.items()]
    numbers = [rounds[bucket[-1]].get("round", bucket[-1]) for bucket in buckets]
    return {"x": numbers, "step": len(buckets[0]) if buckets else 1, "charts": [one for one in drawn if one["curves"]]}


def _buckets(count: int) -> list[range]:
    """Split so many rounds into groups of neighbours, of which each is a point."""
    step = math.ceil(count / POINTS) or 1
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _metric(rounds: Sequence[Row], buckets: list[range], name: str) -> dict[str, Any]:
    spread = [(row.get("tested") or {}).get(name) or () for row in rounds]
    quarters = [quartiles(values) for values in spread]
    curves = []
    if any(quarters):
        for place, (role, choose) in enumerate((("lowest", min), ("low", min), ("high", max), ("highest", max))):
            curves.append({"role": role, "label": role, "values": _of_buckets(quarters, buckets, place, choose)})
    for side, label in SIDES.items():
        curves += _curve(rounds, buckets, f"{side}_{name}", label, side)
    return {"title": name, "curves": curves if any(curve["role"] in SIDES for curve in curves) else []}


def quartiles(values: Sequence[float]) -> tuple[float, ...]:
    """Return the smallest value, the first and third quartile and the largest, or () of fewer than two values."""
    if len(values) < 2:
        return ()
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[0], ordered[round(last / 4)], ordered[round(3 * last / 4)], ordered[last]


def _of_buckets(
    quarters: list[tuple[float, ...]], buckets: list[range], place: int, choose: Callable[[Iterable[float]], float]
) -> list[float | None]:
    found = [[quarters[at][place] for at in bucket if quarters[at]] for bucket in buckets]
    return [_short(choose(values)) if values else None for values in found]


def _further(rounds: Sequence[Row], buckets: list[range], title: str, keys: dict[str, str]) -> dict[str, Any]:
    curves = [_curve(rounds, buckets, *entry, role) for entry, role in zip(keys.items(), SIDES, strict=False)]
    return {"title": title, "curves": [*chain(*curves)]}


def _curve(rounds: Sequence[Row], buckets: list[range], key: str, label: str, role: str) -> list[dict[str, Any]]:
    """Return the values of a key, that of the last round of each bucket that has one; nothing if none has."""
    known = [[rounds[at][key] for at in bucket if rounds[at].get(key) is not None] for bucket in buckets]
    values = [_short(found[-1]) if found else None for found in known]
    return [{"role": role, "label": label, "values": values}] if any(known) else []


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def compared(runs: Sequence[tuple[str, Sequence[Row]]]) -> dict[str, Any]:
    """Return charts with a curve for each run: the server's metrics, or the clients' where the server tests nothing."""
    longest = max((rows for _, rows in runs), key=len, default=())
    buckets = _buckets(len(longest))
    x = [longest[bucket[-1]].get("round", bucket[-1]) for bucket in buckets]
    drawn = []
    for name in metric_names([row for _, rows in runs for row in rows[-1:]]):
        curves = [_run_curve(run, rows, buckets, name, at) for at, (run, rows) in enumerate(runs)]
        drawn.append({"title": name, "curves": [*chain(*curves)]})
    return {"x": x, "step": len(buckets[0]) if buckets else 1, "charts": [one for one in drawn if one["curves"]]}


def _run_curve(run: str, rows: Sequence[Row], buckets: list[range], name: str, at: int) -> list[dict[str, Any]]:
    own = [range(bucket.start, min(bucket.stop, len(rows))) for bucket in buckets]
    for side in ("server", "clients"):
        if found := _curve(rows, own, f"{side}_{name}", run, f"run{at % 7}"):
            return found
    return []
