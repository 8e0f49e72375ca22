"""The task of the studies that need many runs: cifar.py with every fifth training and test image, the others left out.

That is 10,000 training and 2,000 test images of CIFAR-10, all ten classes in about equal numbers. The network, the
training and the test are those of cifar.py: `python server.py --task benchmarks.small_cifar`.
"""

import functools

from cifar import Net, test, train
from cifar_data import Data, find_data
from cifar_data import load_data as load_all

__all__ = ["Net", "find_data", "load_data", "test", "train"]

EVERY = 5


@functools.cache
def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return every fifth image of both splits, in memory."""
    (x_train, y_train), (x_test, y_test) = load_all(root)
    return (x_train[::EVERY].clone(), y_train[::EVERY].clone()), (x_test[::EVERY].clone(), y_test[::EVERY].clone())
