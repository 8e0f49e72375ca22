"""How a vector of changes is made smaller: float16, int8 with stochastic rounding, or the largest entries only."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from federation.app.config import RunConfig

Vector = NDArray[Any]  # of floats, one-dimensional
Parts = Mapping[str, NDArray[Any]]  # what is sent of a vector
Layout = Mapping[str, tuple[Any, tuple[int, ...]]]  # the dtype and the shape of each part
Seed = Sequence[int]
LARGEST = 127  # of int8, in both directions


def by_entry(vector: Vector, sizes: Sequence[int]) -> list[Vector]:
    """Split a vector into parts of these sizes."""
    return np.split(vector, np.cumsum(sizes, dtype=int))[:-1]


class Compression(Protocol):
    """What is sent of a vector that has `sizes[i]` values of entry i, one entry after the other."""

    def layout(self, sizes: Sequence[int], dtype: Any) -> Layout:
        """Return the parts that a vector of `dtype` becomes."""

    def encode(self, vector: Vector, sizes: Sequence[int], dtype: Any, seed: Seed) -> Parts:
        """Return the parts of a vector. What is random in them is drawn from `seed`."""

    def decode(self, parts: Parts, sizes: Sequence[int]) -> Vector:
        """Return the vector. Raises ValueError where parts of the right layout hold values that cannot be."""


class Whole:
    """The vector as it is, or in a smaller floating-point type: "none" and "float16"."""

    def __init__(self, dtype: Any = None) -> None:
        self.dtype = dtype

    def layout(self, sizes: Sequence[int], dtype: Any) -> Layout:
        return {"values": (self.dtype or dtype, (sum(sizes),))}

    def encode(self, vector: Vector, sizes: Sequence[int], dtype: Any, seed: Seed) -> Parts:
        return {"values": vector.astype(self.dtype or dtype)}

    def decode(self, parts: Parts, sizes: Sequence[int]) -> Vector:
        return parts["values"]


class Int8:
    """Whole numbers of steps from -127 to 127, the step being the largest value of an entry by 127.

    Each value is rounded up or down at random, with the probabilities that make it right on average (QSGD, Alistarh
    et al. 2017, with the largest value in the place of the norm).
    """

    def layout(self, sizes: Sequence[int], dtype: Any) -> Layout:
        return {"values": (np.int8, (sum(sizes),)), "scales": (np.float32, (len(sizes),))}

    def encode(self, vector: Vector, sizes: Sequence[int], dtype: Any, seed: Seed) -> Parts:
        scales = np.array([np.abs(part).max(initial=0) / LARGEST for part in by_entry(vector, sizes)], np.float32)
        steps = np.repeat(np.where(scales > 0, scales, 1), sizes)
        raised = np.floor(vector / steps + np.random.default_rng(seed).random(len(vector)))
        return {"values": np.nan_to_num(raised).clip(-LARGEST, LARGEST).astype(np.int8), "scales": scales}

    def decode(self, parts: Parts, sizes: Sequence[int]) -> Vector:
        vector: Vector = parts["values"] * np.repeat(parts["scales"], sizes)
        return vector


class TopK:
    """The entries of the largest absolute values, of all together, and where they are."""

    def __init__(self, share: float) -> None:
        self.share = share

    def layout(self, sizes: Sequence[int], dtype: Any) -> Layout:
        kept = (self._kept(sum(sizes)),)
        return {"values": (np.float32, kept), "places": (np.uint32, kept)}

    def _kept(self, count: int) -> int:
        return math.ceil(self.share * count)

    def encode(self, vector: Vector, sizes: Sequence[int], dtype: Any, seed: Seed) -> Parts:
        places = _largest(vector, self._kept(len(vector)))
        return {"values": vector[places].astype(np.float32), "places": places.astype(np.uint32)}

    def decode(self, parts: Parts, sizes: Sequence[int]) -> Vector:
        places = parts["places"].astype(np.int64)
        if not (np.diff(places, prepend=-1, append=sum(sizes)) > 0).all():
            raise ValueError("the places of its values do not ascend within the model")
        vector = np.zeros(sum(sizes), np.float32)
        vector[places] = parts["values"]
        return vector


def _largest(vector: Vector, count: int) -> NDArray[np.int64]:
    """Return the places of the largest absolute values, in ascending order; of equal ones, the first."""
    if not count:
        return np.zeros(0, np.int64)
    sizes = np.nan_to_num(np.abs(vector), nan=np.inf)  # so that one that is not finite is sent, and refused
    least = np.partition(sizes, -count)[-count]
    larger, equal = np.flatnonzero(sizes > least), np.flatnonzero(sizes == least)
    return np.sort(np.concatenate([larger, equal[: count - len(larger)]]))


def compression(config: RunConfig) -> Compression:
    """Return the compression that `config` names."""
    if config.compression == "int8":
        return Int8()
    if config.compression == "top-k":
        return TopK(config.top_k)
    return Whole(np.float16 if config.compression == "float16" else None)
