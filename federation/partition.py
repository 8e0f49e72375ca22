"""Who holds which samples."""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int32]


def iid(samples: int, partitions: int, seed: int) -> list[Rows]:
    """Deal `samples` row numbers out at random: sizes differ by one at most, and each part is in ascending order.

    Raises ValueError if there are fewer samples than partitions.
    """
    if samples < partitions:
        raise ValueError(f"{samples} samples cannot be split among {partitions} clients: each needs one at least")
    order = np.random.default_rng(seed).permutation(samples).astype(np.int32)
    return [np.sort(part) for part in np.array_split(order, partitions)]
