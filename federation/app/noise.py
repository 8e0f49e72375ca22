"""What Flower's clipping and noise need around them: a secret key, and updates that can be clipped.

Flower draws noise from NumPy's global generator. A process that builds a model seeds that with the seed of the run,
which everybody knows, and who knows the noise can subtract it. So it is seeded from a secret key just before.
"""

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist

import numpy as np
from flwr.app import Array, ArrayRecord

from federation.app.config import SettingError

KEY_SIZE = 32  # bytes
CLIPPED = ("float32", "float64")  # the dtypes of entries that Flower clips and adds noise to


def new_key() -> bytes:
    return secrets.token_bytes(KEY_SIZE)


@contextmanager
def secret_noise(key: bytes, server_round: int, models: list[ArrayRecord]) -> Iterator[None]:
    """Let NumPy's global generator draw what depends on `key`, the round and the `models` alone.

    The same models in the same round, as after a resume, thus get the same noise; others get noise of their own, since
    the difference of two results with the same noise would show what is under it.
    """
    digest = hashlib.blake2b(server_round.to_bytes(8), key=key, digest_size=KEY_SIZE)
    for array in (array for model in models for array in model.values()):
        digest.update(array.data)
    before = np.random.get_state()
    np.random.seed(np.frombuffer(digest.digest(), np.uint32))
    try:
        yield
    finally:
        np.random.set_state(before)


def check_entries(arrays: ArrayRecord) -> None:
    """Raise SettingError where a model has an entry that Flower would send without clipping, or could not clip."""
    for name, array in arrays.items():
        if array.dtype not in CLIPPED or not array.shape:
            held = array.dtype if array.shape else f"a single {array.dtype}"
            raise SettingError(f"dp cannot clip {name}, which holds {held}: only arrays of float32 or float64 can be "
                             f"clipped; personal={name!r} keeps it with each client")  # fmt: skip


def moved(after: ArrayRecord, before: ArrayRecord) -> ArrayRecord:
    """Return the model `after`, changed by a rounding error if it is where `before` was: Flower divides by the way."""
    values = {name: array.numpy() for name, array in after.items()}
    if sum(np.linalg.norm(np.ravel(value - before[name].numpy())) ** 2 for name, value in values.items()):
        return after
    largest = max(values, key=lambda name: float(np.abs(values[name]).max(initial=0)))
    changed = values[largest].copy()
    at = np.unravel_index(np.abs(changed).argmax(), changed.shape)
    changed[at] += max(np.spacing(np.abs(changed[at])), 1e-15)  # the square of which is still a float32
    return ArrayRecord({**after, largest: Array(changed)})


def gaussian_deviation(epsilon: float, delta: float) -> float:
    """Return a standard deviation of noise, in sensitivities, that is (epsilon, delta)-differentially private.

    Noise of the deviation s is, if and only if Phi(1 / 2s - epsilon s) - e^epsilon Phi(-1 / 2s - epsilon s) <= delta
    (Balle and Wang 2018, theorem 8). This is the s for which the first term alone is delta. It holds for every epsilon,
    while sqrt(2 ln(1.25 / delta)) / epsilon holds for those below 1 (Dwork and Roth 2014, theorem A.1).
    """
    quantile = NormalDist().inv_cdf(1 - delta)
    return float((quantile + (quantile**2 + 2 * epsilon) ** 0.5) / (2 * epsilon))
