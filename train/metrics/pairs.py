"""Pairs of feature vectors, a block at a time: never all pairs at once, never [N, M, D].

Dimensions: N, M vectors of two sets, n of them at a time, D features.
"""

from collections.abc import Iterator

import numpy as np

BLOCK = 1 << 22  # pairs at a time: an array of them takes 32 MB
ROUNDING = 1e-13  # relative; squared distances below it are rounding, and 0


def checked(
    real_ND: np.ndarray, generated_MD: np.ndarray, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as float64.

    Args:
      real_ND, generated_MD: [N, D], [M, D], any real dtype.
      least: vectors that each set must have.

    Raises:
      ValueError: if they are not matrices of the same width, too few, or not finite.
    """
    sets = {"real": np.asarray(real_ND), "generated": np.asarray(generated_MD)}
    for name, x in sets.items():
        check_features(name, x, least)
    widths = {name: x.shape[1] for name, x in sets.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"real features have {widths['real']} entries, generated ones"
            f" {widths['generated']}: take both from the same extractor"
        )
    return sets["real"].astype(np.float64), sets["generated"].astype(np.float64)


def check_features(name: str, x: np.ndarray, least: int) -> None:
    """Raises a ValueError unless x is a finite matrix [N, D] of at least ``least`` rows."""
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} features must be a matrix [N, D], got shape {x.shape}")
    if len(x) < least:
        raise ValueError(f"{len(x)} {name} feature vectors; this needs at least {least}")
    bad = int(np.sum(~np.isfinite(x).all(axis=1)))
    if bad:
        raise ValueError(
            f"{bad} of {len(x)} {name} feature vectors are not finite: look for NaN in the"
            " images, or in the extractor"
        )


def blocks(number: int, others: int) -> Iterator[slice]:
    """Slices of ``number`` rows that meet ``others`` in at most BLOCK pairs (or one row)."""
    size = max(BLOCK // max(others, 1), 1)
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))


def centred(x_ND: np.ndarray, y_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets moved so that distances between them lose the fewest digits."""
    centre_1D = np.mean(x_ND, axis=0, keepdims=True)
    return x_ND - centre_1D, y_MD - centre_1D


def squared_distances(x_nD: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """|x_i - y_j|^2 = |x_i|^2 + |y_j|^2 - 2 x_i y_j: [n, M]; exactly 0 where x_i equals y_j."""
    norms_nM = np.sum(x_nD**2, axis=1)[:, None] + np.sum(y_MD**2, axis=1)[None]
    squares_nM = norms_nM - 2 * (x_nD @ y_MD.T)
    squares_nM[squares_nM < ROUNDING * norms_nM] = 0
    return squares_nM
