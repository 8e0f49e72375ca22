"""The run config: its defaults in pyproject.toml, its syntax, and the values that it takes."""

import functools
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Config = dict[str, Any]  # values are bool, int, float or str

POSITIVE = (1, 10**9)
CHOICES = {
    "strategy": ("fedavg", "fedadam"),
    "partitioner": ("iid", "dirichlet", "pathological", "shards", "size-skewed"),
}
LIMITS: dict[str, tuple[float, float]] = {
    "num-server-rounds": POSITIVE,
    "num-clients": (1, 100_000),
    "fraction-train": (1e-9, 1),
    "fraction-evaluate": (0, 1),
    "local-epochs": POSITIVE,
    "learning-rate": (0, 1e6),
    "batch-size": POSITIVE,
    "seed": (0, 2**31 - 1),
    "server-learning-rate": (1e-9, 1e6),
    "beta-1": (0, 0.999999),
    "beta-2": (0, 0.999999),
    "tau": (1e-12, 1e6),
    "round-timeout": POSITIVE,
    "min-clients": (1, 100_000),
    "retries": (0, 1000),
    "alpha": (1e-3, 1e6),
    "min-partition-size": POSITIVE,
    "labels-per-client": POSITIVE,
    "shards-per-client": POSITIVE,
}
ASSIGNMENT = re.compile(r"""[^\s=]+=(?:"[^"]*"|'[^']*'|[^\s"']+)(?=\s|$)""")


def defaults() -> Config:
    """Return the run config that pyproject.toml declares."""
    return dict(_declared())


@functools.cache
def _declared() -> Config:
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    return dict(tomllib.loads(pyproject.read_text("utf-8"))["tool"]["flwr"]["app"]["config"])


def parse(text: str) -> dict[str, Any]:
    """Read `key=value key="text"`, or the TOML file of that name: the syntax of `flwr run --run-config`."""
    try:
        if text.endswith(".toml"):
            return tomllib.loads(Path(text).expanduser().read_text("utf-8"))
        if ASSIGNMENT.sub("", text).strip():
            raise ValueError
        return tomllib.loads("\n".join(ASSIGNMENT.findall(text)))
    except OSError as error:
        raise ValueError(f"run config {text}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f'run config {text!r} is not of the form key=value key="text"') from None


def checked(overrides: Mapping[str, Any]) -> Config:
    """Return the defaults with `overrides`. Raises ValueError for an unknown key, a wrong type or a wrong value."""
    config = defaults()
    for key, value in overrides.items():
        if key == "task" and isinstance(value, str):
            value = module_name(value)
        if key not in config:
            raise ValueError(f"run config has no key {key!r}; its keys are: {', '.join(config)}")
        config[key] = _checked_value(key, value, type(config[key]))
    if config["min-clients"] > config["num-clients"]:
        raise ValueError(f"run config min-clients={config['min-clients']} is more than "
                         f"num-clients={config['num-clients']}")  # fmt: skip
    return config


def module_name(task: str) -> str:
    """Return the name under which Python imports a task: a file below the current folder may be named instead."""
    if not task.endswith(".py"):
        return task
    path = Path(task)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"task {task!r}: change to its folder and give its name, {path.stem}")
    return ".".join(path.with_suffix("").parts)


def _checked_value(key: str, value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"run config {key}={value!r} should be of type {kind.__name__}")
    if value not in CHOICES.get(key, (value,)):
        raise ValueError(f"run config {key}={value!r} is none of: {', '.join(CHOICES[key])}")
    if key in LIMITS and not LIMITS[key][0] <= value <= LIMITS[key][1]:
        low, high = LIMITS[key]
        raise ValueError(f"run config {key}={value!r} is out of range: {low:g} to {high:g} is allowed")
    return value
