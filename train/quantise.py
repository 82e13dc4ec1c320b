"""Generated images to grey levels: what metrics, grids and files see.

Dimensions: any.
"""

from typing import NamedTuple

import numpy as np


class Quantised(NamedTuple):
    """Images as uint8, and the share of values that had to be clipped.

    A value counts as clipped if it lay more than half a grey level outside [-1, 1].
    """

    images: np.ndarray
    clipped: float


def quantise(images: np.ndarray) -> Quantised:
    """floor(127.5 x + 128), clipped to 0 .. 255: the nearest of the levels u / 127.5 - 1.

    Args:
      images: any shape, a floating dtype; data lies in [-1, 1], samples may leave it a little.

    Raises:
      ValueError: for NaN or infinities, or another dtype.
    """
    if not np.issubdtype(np.asarray(images).dtype, np.floating):
        raise ValueError(f"images must be floats in [-1, 1], not {np.asarray(images).dtype}")
    x = np.asarray(images, np.float64)
    bad = int(np.sum(~np.isfinite(x)))
    if bad:
        raise ValueError(
            f"{bad} of {x.size} values of the images are NaN or infinite: the model has diverged,"
            " or its input was wrong"
        )
    levels = np.clip(np.floor(127.5 * x + 128), 0, 255).astype(np.uint8)
    clipped = np.mean(np.abs(x) > 1 + 1 / 255) if x.size else 0.0
    return Quantised(levels, float(clipped))
