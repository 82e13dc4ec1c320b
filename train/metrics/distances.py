"""Distances between two sets of feature vectors, on the host in float64.

Dimensions: N real, M generated vectors, D features, L projections.

V forms are averages over all pairs, never negative and 0 for equal sets; U forms leave out pairs
of a vector with itself: without bias, and negative at times.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import pairs

LINES = 32  # projections at a time


def energy_distance(
    real_ND: np.ndarray, generated_MD: np.ndarray, *, unbiased: bool = False
) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| (Szekely and Rizzo 2013).

    Args:
      real_ND, generated_MD: A [N, D] and B [M, D], any real dtype.
      unbiased: the U form instead of the V form.

    Raises:
      ValueError: for fewer than two vectors, sets of different width, or NaN.
    """
    a_ND, b_MD = pairs.centred(*pairs.checked(real_ND, generated_MD, least=2))
    kernel = lambda x, y: -np.sqrt(pairs.squared_distances(x, y))
    return _discrepancy(kernel, a_ND, b_MD, unbiased)


def mmd2_rbf(
    real_ND: np.ndarray, generated_MD: np.ndarray, sigma: float, *, unbiased: bool = True
) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012), kernel exp(-|x - y|^2 / 2 sigma^2).

    Args:
      real_ND, generated_MD: [N, D] and [M, D], any real dtype.
      sigma: width of the kernel, in units of the features.
      unbiased: the U form (lemma 6 of the paper) instead of the V form.

    Raises:
      ValueError: as for :func:`energy_distance`, or if sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    a_ND, b_MD = pairs.centred(*pairs.checked(real_ND, generated_MD, least=2))
    kernel = lambda x, y: np.exp(-pairs.squared_distances(x, y) / (2 * sigma**2))
    return _discrepancy(kernel, a_ND, b_MD, unbiased)


def kid(real_ND: np.ndarray, generated_MD: np.ndarray) -> float:
    """The kernel distance: MMD^2 with (x y / D + 1)^3, U form (Binkowski et al. 2018).

    "Kernel inception distance" only of Inception's features.

    Args:
      real_ND, generated_MD: [N, D] and [M, D], any real dtype. All pairs are taken.

    Raises:
      ValueError: as for :func:`energy_distance`.
    """
    return _discrepancy(_cubic, *pairs.checked(real_ND, generated_MD, least=2), unbiased=True)


class Estimate(NamedTuple):
    """A mean, and its standard error."""

    mean: float
    standard_error: float


def kid_of_subsets(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """:func:`kid` of random subsets: mean, and standard deviation / sqrt(subsets).

    Subsets overlap, so the error is that of the drawing; it does not count what other real and
    generated images would change.

    Args:
      real_ND, generated_MD: [N, D] and [M, D], any real dtype.
      subsets: how many; at least 2.
      subset_size: vectors of each set in a subset, drawn without replacement.
      seed: of the drawing.

    Raises:
      ValueError: as for :func:`energy_distance`, or for subsets that cannot be drawn.
    """
    if subsets < 2 or subset_size < 2:
        raise ValueError(
            f"{subsets} subsets of {subset_size} vectors: there must be two of each at least"
        )
    a_ND, b_MD = pairs.checked(real_ND, generated_MD, least=2)
    if subset_size > min(len(a_ND), len(b_MD)):
        raise ValueError(
            f"subset_size is {subset_size}, but there are {len(a_ND)} real and {len(b_MD)}"
            " generated vectors: make it smaller"
        )
    generator = np.random.default_rng(seed)
    draw = lambda x: x[generator.choice(len(x), subset_size, replace=False)]
    values = [_discrepancy(_cubic, draw(a_ND), draw(b_MD), True) for _ in range(subsets)]
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(subsets)))


def sliced_wasserstein(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    *,
    order: int,
    projections: np.ndarray | int = 512,
    seed: int = 0,
) -> float:
    """(mean over projections of W_p^p)^(1/p), p = 1 or 2 (Rabin et al. 2011; Bonneel et al. 2015).

    W_p^p = integral over q in [0, 1] of |F^-1(q) - G^-1(q)|^p; for N = M a mean over sorted pairs.

    Args:
      real_ND, generated_MD: [N, D] and [M, D], any real dtype; N and M may differ.
      order: p.
      projections: [L, D], used as they are; or how many unit vectors to draw.
      seed: of the drawing.

    Raises:
      ValueError: for no vectors, sets of different width, NaN, another order, or projections
        that do not fit.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    a_ND, b_MD = pairs.checked(real_ND, generated_MD, least=1)
    lines_LD = _lines(projections, a_ND.shape[1], seed)
    # The quantile functions are constant between multiples of 1/N and of 1/M: in units of 1/(NM).
    n, m = len(a_ND), len(b_MD)
    ends = np.union1d(np.arange(m, n * m + 1, m), np.arange(n, n * m + 1, n))
    weights = np.diff(ends, prepend=0) / (n * m)
    from_a, from_b = (ends - 1) // m, (ends - 1) // n
    total = 0.0
    for start in range(0, len(lines_LD), LINES):
        some_lD = lines_LD[start : start + LINES]
        sorted_lN, sorted_lM = (np.sort(some_lD @ x.T, axis=1) for x in (a_ND, b_MD))
        gaps = np.abs(sorted_lN[:, from_a] - sorted_lM[:, from_b])
        total += float(np.sum(gaps**order @ weights))
    return float((total / len(lines_LD)) ** (1 / order))


def _lines(projections: np.ndarray | int, width: int, seed: int) -> np.ndarray:
    """Projections [L, D]."""
    if isinstance(projections, int):
        if projections < 1:
            raise ValueError(f"projections must be at least 1, got {projections}")
        lines_LD = np.random.default_rng(seed).standard_normal((projections, width))
        return lines_LD / np.linalg.norm(lines_LD, axis=1, keepdims=True)
    lines_LD = np.asarray(projections, np.float64)
    if lines_LD.ndim != 2 or lines_LD.shape[1] != width or not len(lines_LD):
        raise ValueError(f"projections must be [L, {width}], got shape {lines_LD.shape}")
    return lines_LD


def _cubic(x_nD: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    return (x_nD @ y_MD.T / x_nD.shape[1] + 1) ** 3


def _discrepancy(
    kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
    a_ND: np.ndarray,
    b_MD: np.ndarray,
    unbiased: bool,
) -> float:
    """E k(A, A') + E k(B, B') - 2 E k(A, B)."""
    within = sum(_mean(kernel, x, x, without_self=unbiased) for x in (a_ND, b_MD))
    return within - 2 * _mean(kernel, a_ND, b_MD, without_self=False)


def _mean(kernel, x_ND: np.ndarray, y_MD: np.ndarray, without_self: bool) -> float:
    """Mean of k(x_i, y_j) over all pairs, or over those with i != j."""
    total = 0.0
    for rows in pairs.blocks(len(x_ND), len(y_MD)):
        values_nM = kernel(x_ND[rows], y_MD)
        total += float(np.sum(values_nM))
        if without_self:
            total -= float(np.trace(values_nM, offset=rows.start))
    return total / (len(x_ND) * (len(y_MD) - int(without_self)))
