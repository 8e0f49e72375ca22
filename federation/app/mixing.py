"""Where no server averages, a client does: its own model with those of its neighbours, which the server relays."""

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord

from federation.app.weights import restore_dtypes

MIXING = "mixing"  # the record that has the weights: the client's own, and one for each neighbour


def relayed(own: ArrayRecord, neighbours: Sequence[ArrayRecord], weights: Sequence[float]) -> dict[str, ArrayRecord]:
    """Return the records of a message that brings a client its own model and its neighbours', with their weights."""
    others = {f"neighbour-{number}": model for number, model in enumerate(neighbours)}
    return {"arrays": own, MIXING: ArrayRecord({"weights": Array(np.array(weights))}), **others}


def mixed(records: Mapping[str, ArrayRecord]) -> ArrayRecord:
    """Return the weighted mean of the models that a message brings; the only one of a message without weights."""
    own = records["arrays"]
    weights: list[float] = records[MIXING]["weights"].numpy().tolist() if MIXING in records else [1.0]
    if len(weights) == 1:
        return own
    models = [own, *(records[f"neighbour-{number}"] for number in range(len(weights) - 1))]
    return restore_dtypes(own, mean(models, weights))


def mean(models: Sequence[ArrayRecord], weights: Sequence[float]) -> ArrayRecord:
    """Return the weighted mean of models in double precision, integers and counters like all other entries."""
    means = {}
    for name in models[0]:
        terms = (weight * model[name].numpy() for model, weight in zip(models, weights, strict=True))
        means[name] = Array(np.asarray(sum(terms, np.zeros(models[0][name].shape))))
    return ArrayRecord(means)
