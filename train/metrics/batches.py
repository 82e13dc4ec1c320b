"""Functions of whole batches on any number of images: one compiled program, no big array.

Dimensions: N images, H height, W width, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

BATCH = 256  # images that the device sees at a time


def in_batches(function: Callable[[np.ndarray], Any], images: np.ndarray) -> Any:
    """A function of [BATCH, H, W, C] for any N: the last batch is filled up.

    The function returns an array [BATCH, ...] or a tuple of them; so does this, with N.
    """
    found = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        rows = np.minimum(np.arange(BATCH), len(part) - 1)
        found.append(jax.device_get(function(part[rows])))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *found)
