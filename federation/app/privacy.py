"""Differential privacy of the global model: Flower's wrappers of a strategy, and Flower's accountant.

What is protected is a client as a whole: neighbours are runs with and without it. Every round is accounted in full, as
if all clients took part in it.
"""

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import (
    GaussianPrivacyEvent,
    Grid,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from federation.app.config import RunConfig, SettingError
from federation.app.console import one_line
from federation.app.noise import check_entries, moved, new_key, secret_noise

RECORD = "privacy"  # of a checkpoint
CLIP_RATE = 0.2  # of the adaptive norm, in the exponent: Flower's default
LOWEST = 6.0  # the count of clipped updates may fall below 0 by so many standard deviations of its noise: once in 1e9
NORM_BIT = "norm_bit"  # as Flower calls a client's report of whether its update was clipped


def make_accountant(config: RunConfig) -> PrivacyAccountant:
    """Return an accountant that has seen no round. Raises SettingError where the package that it needs is missing."""
    from flwr.serverapp import RdpAccountant  # here, because this fails where the package is missing

    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    try:
        return RdpAccountant(PrivacyConfig(config.dp_delta, config.num_clients, relation, sampling))
    except ImportError:
        raise SettingError(f"dp={config.dp} needs the package dp-accounting: pip install '.[dp]'") from None


class Private(Strategy):
    """FedAvg or FedProx with fixed clipping, of which the mean is private. All clients weigh the same in it.

    A round needs a model from each client that it asks: the noise is meant for so many.
    """

    wrappers: Mapping[str, Callable[..., Strategy]] = {
        "server-fixed": flower.DifferentialPrivacyServerSideFixedClipping,
        "client-fixed": flower.DifferentialPrivacyClientSideFixedClipping,
    }

    def __init__(self, strategy: FedAvg, config: RunConfig, saved: ArrayRecord | None = None) -> None:
        """`saved` is what `to_record` has returned in an earlier process.

        Raises SettingError where already the first round would spend more than dp-target-epsilon.
        """
        self.strategy, self.config, self.asked = strategy, config, config.clients_asked
        self.accountant = make_accountant(config)
        self.key, self.clipping_norm = new_key(), config.dp_clipping_norm
        if saved:
            self.key, self.clipping_norm = saved["key"].numpy().tobytes(), float(saved["clipping-norm"].numpy()[0])
            self.accountant.load_state_dict(json.loads(saved["accountant"].numpy().tobytes()))
        elif 0 < config.dp_target_epsilon < (first := self.epsilon_next()):
            raise SettingError(f"dp-target-epsilon={config.dp_target_epsilon:g} is less than one round spends with "
                               f"dp-noise-multiplier={config.dp_noise_multiplier:g}: epsilon {first:.4g}")  # fmt: skip

    def to_record(self) -> ArrayRecord:
        """Return what the next round depends on: the secret key, the accountant and the clipping norm."""
        ledger = json.dumps(self.accountant.state_dict()).encode()
        return ArrayRecord({
            "key": Array(np.frombuffer(self.key, np.uint8)), "accountant": Array(np.frombuffer(ledger, np.uint8)),
            "clipping-norm": Array(np.array([self.clipping_norm])),
        })  # fmt: skip

    def spent(self) -> dict[str, float]:
        """Return the epsilon that all rounds so far have spent, and what it would be, at most, after another one."""
        return {"epsilon": self.accountant.get_epsilon(self.config.dp_delta), "epsilon_next": self.epsilon_next()}

    def epsilon_next(self) -> float:
        """Return what epsilon would be after another round, at most."""
        projected = make_accountant(self.config)
        projected.load_state_dict(self.accountant.state_dict())
        projected.compose(self.event(self.least_multiplier()))
        return projected.get_epsilon(self.config.dp_delta)

    def event(self, multiplier: float) -> GaussianPrivacyEvent:
        """Return a round of which the noise, in clipping norms, has this standard deviation."""
        return GaussianPrivacyEvent(multiplier, self.asked, self.config.num_clients)

    def least_multiplier(self) -> float:
        """Return the least noise multiplier that a round can have."""
        return self.config.dp_noise_multiplier

    def wrapped(self) -> Any:
        """Return Flower's wrapper for a round: a new one, since a round that is tried again is none to the old one."""
        return self.wrappers[self.config.dp](
            self.strategy, self.config.dp_noise_multiplier, self.clipping_norm, self.asked, accountant=self.accountant
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model. Raises SettingError where it has entries that cannot be clipped."""
        check_entries(arrays)
        self.arrays, self.wrapper = arrays, self.wrapped()
        messages: Iterable[Message] = self.wrapper.configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next model. The metrics are means weighted by sample numbers as ever, and not private."""
        replies = list(replies)
        if len(replies) != self.asked:
            raise RuntimeError(f"round {server_round}: {len(replies)} models, but the noise is meant for {self.asked}")
        metrics = self.strategy.train_metrics_aggr_fn([reply.content for reply in replies], "num-examples")
        equal = [self._equal(reply) for reply in replies]
        with secret_noise(self.key, server_round, [reply.content.array_records["arrays"] for reply in equal]):
            arrays, _ = self.wrapper.aggregate_train(server_round, equal)
        self.account(server_round)
        return arrays, metrics

    def _equal(self, reply: Message) -> Message:
        """Return a reply that counts one sample. It takes over the model, of which clipping makes another one."""
        arrays = moved(reply.content.array_records.pop("arrays"), self.arrays)
        metrics = reply.content.metric_records["metrics"]
        equal = copy.copy(reply)
        equal.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({**metrics, "num-examples": 1})})
        metrics.pop(NORM_BIT, None)  # it is a secret without noise
        return equal

    def account(self, server_round: int) -> None:
        """Add a round that has made a model: with fixed clipping, Flower has done so."""

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()


class Adaptive(Private):
    """The same with a clipping norm that goes to where dp-clipped-quantile of the updates are clipped.

    Two things are private here: the mean, and how many updates were clipped. Noise of the multipliers z and s protects
    as much as noise of (z^-2 + s^-2)^-1/2 does alone, since the Renyi divergences of Gaussian noise add up.
    """

    wrappers: Mapping[str, Callable[..., Strategy]] = {
        "server-adaptive": flower.DifferentialPrivacyServerSideAdaptiveClipping,
        "client-adaptive": flower.DifferentialPrivacyClientSideAdaptiveClipping,
    }

    @property
    def count_deviation(self) -> float:
        """The standard deviation of the noise on the count: a twentieth of the clients, as in the paper, or more."""
        return max(self.asked / 20, 2 * self.config.dp_noise_multiplier)

    @property
    def mean_multiplier(self) -> float:
        """The noise multiplier of the mean, with which both together have dp-noise-multiplier, if the norm stays."""
        return float((self.config.dp_noise_multiplier**-2 - self.count_deviation**-2) ** -0.5)

    def multiplier(self, ratio: float) -> float:
        """Return the noise multiplier of a round after which the norm is `ratio` of what it was.

        Flower clips with the norm before the round, and scales the noise with the one after it. One client changes the
        count by 1.
        """
        return float(((self.mean_multiplier * ratio) ** -2 + self.count_deviation**-2) ** -0.5)

    def least_multiplier(self) -> float:
        lowest = -LOWEST * self.count_deviation / self.asked
        return self.multiplier(math.exp(CLIP_RATE * (lowest - self.config.dp_clipped_quantile)))

    def wrapped(self) -> Any:
        """Return Flower's wrapper, which takes the count's noise for that of bits that are 1/2 or -1/2."""
        multiplier = (self.mean_multiplier**-2 + (2 * self.count_deviation) ** -2) ** -0.5
        wrapper: Any = self.wrappers[self.config.dp](
            self.strategy, multiplier, self.asked, self.clipping_norm, self.config.dp_clipped_quantile,
            CLIP_RATE, self.count_deviation,
        )  # fmt: skip
        # Flower's bits are 1 for updates that were clipped, but its rule is for the paper's, which are 1 for others:
        # the more are clipped, the smaller the norm would get. The other sign makes it larger.
        wrapper.clip_norm_lr = -CLIP_RATE
        return wrapper

    def account(self, server_round: int) -> None:
        """Add a round that has made a model. Raises RuntimeError where that must not be published."""
        event, most = (
            self.event(self.multiplier(self.wrapper.clipping_norm / self.clipping_norm)),
            self.config.dp_target_epsilon,
        )
        if most and self.accountant.would_exceed(event, most):
            raise RuntimeError(f"round {server_round}: the clipping norm has fallen so far that "
                               f"dp-target-epsilon={most:g} would be exceeded; its model is dropped")  # fmt: skip
        self.accountant.compose(event)
        self.clipping_norm = self.wrapper.clipping_norm


def protect(strategy: Strategy, config: RunConfig, saved: ArrayRecord | None) -> Strategy:
    """Return a strategy that does what `dp` says, with what an earlier process has saved of that."""
    if not config.central_dp:
        return strategy
    assert isinstance(strategy, FedAvg), "the run config is checked"
    kind = Private if config.dp in Private.wrappers else Adaptive
    try:
        return kind(strategy, config, saved)
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"dp={config.dp}: {one_line(error)}") from None


def note_local(config: RunConfig, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Add to a `row` of metrics.json what dp=local has spent, with the `rows` before it: dp-epsilon for each reply.

    `epsilon` is that of the client that has spent most, and "trained" has one for each client.
    """
    columns = [one["trained"] or {} for one in (*rows, row)]
    replies = Counter(client for column in columns for client in column.get("client", ()))
    if replies:
        row["trained"]["epsilon"] = [replies[client] * config.dp_epsilon for client in row["trained"]["client"]]
        row["epsilon"] = max(replies.values()) * config.dp_epsilon
