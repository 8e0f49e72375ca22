"""The end of a run in a few lines: the strategy and its settings, where the time went, and how good the model is."""

from collections.abc import Iterator, Mapping
from typing import Any

from federation.app import metrics
from federation.app.config import RunConfig, defaults

ELSEWHERE = {"task", "data", "out", "initial", "resume", "strategy", "tracking"}  # keys that are no settings of it
Rows = list[dict[str, Any]]


def summary(config: RunConfig, rounds: Rows, best: Mapping[str, Any] | None) -> str:
    """Return aligned lines about a run that has ended, of which these are the rounds and the best one."""
    lines = {
        "strategy": " ".join([config.strategy, *_settings(config)]),
        "seconds": _seconds(rounds),
        "last": ", ".join(f"{name} {value:.4f}" for name, value in _results(rounds[-1])),
    }
    if best:
        lines["best"] = f"{best['metric']} {best['value']:.4f}, in round {best['round']}"
    return "\n".join(f"{name:8}  {text}" for name, text in lines.items() if text)


def _settings(config: RunConfig) -> Iterator[str]:
    """Yield the settings that are not the defaults."""
    for key, value in config.values().items():
        if key not in ELSEWHERE and value != defaults()[key]:
            yield f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}"


def _results(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for side in ("train", "clients", "server"):
        for name, value in metrics.of_side(side, row).items():
            if value is not None:
                yield f"{side}_{name}", value


def _seconds(rounds: Rows) -> str:
    """Return how long all rounds took, and what of that its parts did, each for the slowest client in each round."""
    waiting = sum(row["waiting_seconds"] or 0 for row in rounds)
    in_rounds = sum(row["seconds"] for row in rounds)
    training, evaluation = (sum(_slowest(row[kind]) for row in rounds) for kind in ("trained", "tested"))
    parts = {"waiting": waiting, "training": training, "evaluation": evaluation}
    parts["the server and the network"] = max(0.0, in_rounds - training - evaluation)
    return f"{in_rounds + waiting:.1f}: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items())


def _slowest(columns: Mapping[str, list[float]] | None) -> float:
    return max((columns or {}).get("seconds", []), default=0.0)
