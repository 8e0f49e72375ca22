"""What a net computes for samples, with the preprocessing of the script's own test().

PyTorch tells a hook what a net was called with and what it returned, while test() runs. Keras and Flax have no such
hook, so their nets are called with the samples themselves; whether that is what test() does is then checked.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.app import metrics, samples, weights
from federation.app.console import one_line

BATCH = 500
PROBED = 64  # samples that are computed a second time, in reversed order
TOLERANCE = 1e-3  # between two results for one sample, relative to the largest; rounding causes up to 1e-5
Values = NDArray[Any]


def outputs(task: ModuleType, net: Any, data: Any) -> Values:
    """Return the output of `net` for each sample of `data`, of shape (n, classes), in their order.

    Raises ValueError where it cannot be had, or is something else than scores of classes.
    """
    kind = weights.framework(net).model
    if kind == weights.Arrays.model:
        raise ValueError(f"{task.__name__}.Net() is a dictionary of arrays: only test() knows how to compute with it, "
                         "and returns no predictions")  # fmt: skip
    by_hook = kind == weights.Torch.model
    found = (_by_hook if by_hook else _by_call)(task, net, data)
    if found.ndim != 2 or found.shape[1] < 2 or not np.isfinite(found).all():
        shape = tuple(found.shape[1:])
        raise ValueError(f"{task.__name__}.Net() computes {'values' if np.isfinite(found).all() else 'NaN or Inf'} of "
                         f"shape {shape} for a sample; classes need one finite score each")  # fmt: skip
    (_check_order if by_hook else _check_test_agrees)(task, net, data, found)
    return found


def probabilities(scores: Values) -> Values:
    """Return probabilities, (n, classes), of logits or of what are probabilities already."""
    if (scores >= 0).all() and np.allclose(scores.sum(1), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def close(one: Values, other: Values) -> bool:
    """Tell whether two arrays of outputs are equal, except for rounding."""
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=TOLERANCE * max(1, np.abs(other).max()))


# ------------------------------------------------------------------------------------------------------------ PyTorch


def _by_hook(task: ModuleType, net: Any, data: Any) -> Values:
    """Return what `net` computes while test() runs, a row for each sample."""
    parts: list[Values] = []
    run_watched(task, net, data, lambda _, args, kwargs, output: parts.append(_scores(task, output)))
    count, wanted = sum(map(len, parts)), samples.count(data)
    if count != wanted:
        raise ValueError(f"{task.__name__}.test() has called the net itself for {count} samples instead of {wanted}")
    return np.concatenate(parts)


def _check_order(task: ModuleType, net: Any, data: Any, found: Values) -> None:
    """Raise ValueError unless each sample has its own output: some are computed again, the last of them first."""
    rows = np.arange(min(PROBED, samples.count(data)))[::-1].copy()  # torch takes no negative strides
    if not close(_by_hook(task, net, samples.take(data, rows)), found[rows]):
        raise ValueError(f"{task.__name__}.test() does not compute its samples one by one in their order: is it "
                         "shuffling, or is net.eval() missing?")  # fmt: skip


def run_watched(task: ModuleType, net: Any, data: Any, note: Callable[[Any, Any, Any, Any], None]) -> None:
    """Run the task's own test(); call `note(net, args, kwargs, output)` whenever it calls a torch.nn.Module."""
    hook = net.eval().register_forward_hook(note, with_kwargs=True)
    try:
        run_test(task, net, data)
    finally:
        hook.remove()


def run_test(task: ModuleType, net: Any, data: Any) -> metrics.Metrics:
    """Call the task's own test(). Raises ValueError if it fails."""
    try:
        returned = task.test(net, data)
    except Exception as error:  # whatever the script does
        raise ValueError(f"{task.__name__}.test() failed: {one_line(error)}") from None
    return metrics.named("test", returned)


def _scores(task: ModuleType, output: Any) -> Values:
    """Return an output as an array; of Transformers, its logits."""
    tensor = getattr(output, "logits", output)
    if not isinstance(tensor, sys.modules["torch"].Tensor) or tensor.ndim == 0:
        kind = type(output).__name__
        raise ValueError(f"{task.__name__}.Net() returns {kind}; a tensor or something with logits is needed")
    return np.asarray(tensor.detach().float().cpu().numpy())


# ----------------------------------------------------------------------------------------------------- Keras and Flax


def _by_call(task: ModuleType, net: Any, data: Any) -> Values:
    """Return what `net` computes for the samples themselves."""
    if not samples.is_arrays(data):
        raise ValueError(f"{task.__name__}: predictions of a Keras or Flax model need arrays from load_data()")
    try:
        return call(net, samples.take(data)[0])
    except Exception as error:  # a net that takes something else
        raise ValueError(f"{task.__name__}: Net() cannot be called with the samples: {one_line(error)}") from None


def call(net: Any, x: Any) -> Values:
    """Return what a Keras or Flax model computes for `x`."""
    if weights.framework(net).model == weights.Keras.model:
        return np.asarray(net.predict(x, batch_size=BATCH, verbose=0))
    net.eval()
    as_array = sys.modules["jax"].numpy.asarray
    return np.concatenate([np.asarray(net(as_array(x[at : at + BATCH]))) for at in range(0, len(x), BATCH)])


def _check_test_agrees(task: ModuleType, net: Any, data: Any, found: Values) -> None:
    """Raise ValueError unless test() computes the same: its cross-entropy, or else its accuracy on many samples."""
    tested, y = run_test(task, net, data), np.asarray(samples.labels(data)).ravel().astype(int)
    shares = probabilities(found)
    loss = -np.log(np.maximum(shares[np.arange(len(y)), y], 1e-7)).mean()
    accuracy = (shares.argmax(1) == y).mean()
    same_loss = abs(loss - tested["loss"]) <= TOLERANCE * max(1, abs(tested["loss"]))
    if not same_loss and (len(y) < PROBED or abs(tested.get("accuracy", 2) - accuracy) > 1e-6):
        raise ValueError(f"{task.__name__}.test() computes something else than the net does for the samples themselves "
                         "(preprocess them in load_data() or in the model)")  # fmt: skip
