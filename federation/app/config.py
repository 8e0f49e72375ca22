"""The run config: its defaults in pyproject.toml, its syntax, and the values that it takes."""

import functools
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from federation.app.combinations import check_combinations
from federation.app.layout import SCRIPTS
from federation.app.tracking import split_names

Settings = dict[str, Any]  # bool, int, float or str by their keys

Count = Annotated[int, Field(ge=1, le=10**9)]
Clients = Annotated[int, Field(ge=1, le=100_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(ge=1e-9, le=1)]


class SettingError(ValueError):
    """A setting of a run does not go with its task or its data."""


class RunConfig(BaseModel):
    """The settings of a run: `config.num_clients` is the value of the key num-clients. They do not change.

    pyproject.toml has the defaults, and says what each is for.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"), extra="forbid", strict=True, frozen=True
    )

    task: str
    data: str
    out: str
    num_server_rounds: Count
    num_clients: Clients
    fraction_train: Positive
    fraction_evaluate: Fraction
    clients_per_round: Annotated[int, Field(ge=0, le=100_000)]
    local_epochs: Count
    local_steps: Annotated[int, Field(ge=0, le=10**9)]
    learning_rate: Rate
    learning_rate_schedule: Literal["constant", "step", "cosine"]
    learning_rate_decay: Positive
    decay_rounds: Count
    batch_size: Count
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    strategy: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")]
    strategy_arguments: str
    round_timeout: Count
    min_clients: Clients
    retries: Annotated[int, Field(ge=0, le=1000)]
    partitioner: Literal[
        "iid", "dirichlet", "inner-dirichlet", "pathological", "shards", "size-skewed", "linear", "square",
        "exponential", "by-column", "grouped-natural-id",
    ]  # fmt: skip
    alpha: Annotated[float, Field(ge=1e-3, le=1e6)]
    min_partition_size: Count
    labels_per_client: Count
    shards_per_client: Count
    group_size: Count
    train_arguments: str
    initial: str
    server_evaluation: bool
    best_metric: Annotated[str, Field(pattern=r"^(server|clients|train)_[A-Za-z][\w.@%/-]*(:min|:max)?$")]
    patience: Annotated[int, Field(ge=0, le=10**9)]
    validation_fraction: Annotated[float, Field(ge=0, le=0.9)]
    personal: str
    topology: Literal["star", "ring", "random", "full"]
    neighbours: Clients
    upload: Literal["weights", "delta"]
    compression: Literal["none", "float16", "int8", "top-k"]
    top_k: Positive
    dp: Literal["none", "server-fixed", "client-fixed", "server-adaptive", "client-adaptive", "local"]
    dp_noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e6)]
    dp_clipping_norm: Annotated[float, Field(ge=1e-9, le=1e9)]
    dp_clipped_quantile: Fraction
    dp_delta: Annotated[float, Field(ge=1e-15, le=0.5)]
    dp_epsilon: Annotated[float, Field(ge=1e-6, le=1e9)]
    dp_target_epsilon: Annotated[float, Field(ge=0, le=1e9)]
    tracking: str
    resume: bool

    @field_validator("train_arguments", "strategy_arguments")
    @classmethod
    def _in_order(cls, text: str) -> str:
        """Return the arguments in the order of their names, so that the order in which they are given is no setting."""
        return " ".join(f"{key}={json.dumps(value)}" for key, value in sorted(parse(text).items()))

    @field_validator("tracking")
    @classmethod
    def _known_trackers(cls, text: str) -> str:
        return " ".join(split_names(text)) or "none"

    @model_validator(mode="after")
    def _check_clients(self) -> Self:
        if self.min_clients > self.num_clients:
            raise ValueError(f"min-clients={self.min_clients} is more than num-clients={self.num_clients}")
        check_combinations(self)
        return self

    @property
    def bare(self) -> bool:
        """Whether the server needs no framework and no data: it begins with saved weights and tests no model."""
        return self.initial.endswith(".npz") and not self.server_evaluation

    @property
    def keeps_state(self) -> bool:
        """Whether a client keeps something of one round for the next."""
        return bool(self.personal or self.strategy == "scaffold" or self.compression == "top-k")

    @property
    def central_dp(self) -> bool:
        """Whether the server adds noise to the mean of the clients' models."""
        return self.dp not in ("none", "local")

    @property
    def clients_asked(self) -> int:
        """How many clients a round asks to train, where all `num-clients` are present."""
        return self.clients_per_round or max(1, int(self.num_clients * self.fraction_train))

    def rate_in(self, server_round: int) -> float:
        """Return the clients' learning rate in a round, counted from 1; 0 leaves that to the task.

        "cosine" goes down to 0 after the last round (Loshchilov and Hutter 2017, SGDR, equation 5, without restarts).
        """
        done = server_round - 1
        if self.learning_rate_schedule == "step":
            return self.learning_rate * self.learning_rate_decay ** (done // self.decay_rounds)
        if self.learning_rate_schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * done / self.num_server_rounds)) / 2
        return self.learning_rate

    @property
    def trackers(self) -> list[str]:
        """The names of the trackers that the run is sent to."""
        return split_names(self.tracking)

    @property
    def best_key(self) -> str:
        """The metric by which the best model is kept: the loss that there is, unless another one is chosen."""
        if self.best_metric != "server_loss" or self.server_evaluation:
            return self.best_metric
        return "clients_loss" if self.fraction_evaluate else "train_loss"

    def values(self) -> Settings:
        """Return all values by their keys, as in pyproject.toml."""
        return self.model_dump(by_alias=True)

    def train_settings(self) -> Settings:
        """Return what a task's train() is called with, besides net, data and seed; no `lr` leaves that to the task."""
        rate = {"lr": self.learning_rate} if self.learning_rate else {}
        return {"epochs": self.local_epochs, "batch_size": self.batch_size, **rate, **parse(self.train_arguments)}

    def changed(self, **values: Any) -> Self:
        """Return a copy with other values, which are not checked."""
        return self.model_copy(update=values)


ASSIGNMENT = re.compile(r"""[^\s=]+=(?:"[^"]*"|'[^']*'|[^\s"']+)(?=\s|$)""")


def defaults() -> Settings:
    """Return the run config that pyproject.toml declares."""
    return dict(_pyproject()["tool"]["flwr"]["app"]["config"])


def version() -> str:
    """Return the version of this project, which stands in pyproject.toml alone."""
    return str(_pyproject()["project"]["version"])


@functools.cache
def _pyproject() -> dict[str, Any]:
    return tomllib.loads((SCRIPTS / "pyproject.toml").read_text("utf-8"))


def parse(text: str) -> Settings:
    """Read `key=value key="text"`, or the TOML file of that name: the syntax of `flwr run --run-config`.

    Raises ValueError where it has another form, or the file cannot be read.
    """
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


def validate(overrides: Mapping[str, Any]) -> RunConfig:
    """Return the defaults with `overrides`. Raises ValueError for an unknown key, a wrong type or a wrong value."""
    if isinstance(task := overrides.get("task"), str):
        overrides = {**overrides, "task": module_name(task)}
    try:
        return RunConfig.model_validate({**defaults(), **overrides})
    except ValidationError as error:
        raise ValueError(f"run config {_explain(error.errors()[0])}") from None


PATTERNS = {
    "best-metric": "no metric: server_loss, clients_accuracy and the like, and :min or :max, are allowed",
    "strategy": "no name of a strategy, nor the dotted name of a class",
}


def _explain(error: Any) -> str:
    """Say in one line what is wrong, and what is allowed."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    key, value = str(error["loc"][0]), error["input"]
    field = RunConfig.model_fields.get(key.replace("-", "_"))
    if field is None:
        return f"has no key {key!r}; its keys are: {', '.join(defaults())}"
    if error["type"] == "literal_error" and isinstance(value, str):
        return f"{key}={value!r} is none of: {', '.join(choices(key))}"
    if error["type"] == "string_pattern_mismatch":
        return f"{key}={value!r} is {PATTERNS[key]}"
    if error["type"] in ("greater_than_equal", "less_than_equal"):
        low, high = limits(key)
        return f"{key}={value!r} is out of range: {low:g} to {high:g} is allowed"
    return f"{key}={value!r} should be of type {type(defaults()[key]).__name__}"


def choices(key: str) -> tuple[str, ...]:
    """Return the values of a key that has a few of them."""
    return get_args(RunConfig.model_fields[key].annotation)


def limits(key: str) -> tuple[float, float]:
    """Return the smallest and the largest value of a number."""
    low, high = RunConfig.model_fields[key.replace("-", "_")].metadata
    return low.ge, high.le


def module_name(task: str) -> str:
    """Return the name under which Python imports a task: a file below the current folder may be named instead."""
    if not task.endswith(".py"):
        return task
    path = Path(task)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"task {task!r}: change to its folder and give its name, {path.stem}")
    return ".".join(path.with_suffix("").parts)
