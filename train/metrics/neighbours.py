"""Precision, recall, density and coverage: whose nearest neighbours are where.

Dimensions: N real, M generated vectors, D features.
"""

from typing import NamedTuple

import numpy as np

from . import pairs


class Neighbours(NamedTuple):
    """What :func:`neighbour_metrics` found.

    Attributes:
      precision: share of generated vectors inside a ball of a real one: are they realistic?
      recall: share of real vectors inside a ball of a generated one: is all of the data there?
      density: balls of real vectors around a generated one, divided by k; 1 for equal
        distributions, and beyond 1 where samples crowd.
      coverage: share of real vectors with a generated one in their ball.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_metrics(real_ND: np.ndarray, generated_MD: np.ndarray, *, k: int = 3) -> Neighbours:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The ball of a vector reaches to the k-th neighbour in its own set, itself not counted, that
    neighbour included. Published: k = 3 for precision and recall, 5 for density and coverage.

    Args:
      real_ND, generated_MD: [N, D] and [M, D], any real dtype. All pairs are taken, in blocks.
      k: neighbours.

    Raises:
      ValueError: if a set has no k-th neighbour, the sets differ in width, or for NaN.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    a_ND, b_MD = pairs.centred(*pairs.checked(real_ND, generated_MD, least=k + 1))
    ball_N, ball_M = _balls(a_ND, k), _balls(b_MD, k)
    precise, counted = 0, 0
    recalled_N, covered_N = np.zeros((2, len(a_ND)), bool)
    for rows in pairs.blocks(len(b_MD), len(a_ND)):
        squares_mN = pairs.squared_distances(b_MD[rows], a_ND)
        near_real_mN = squares_mN <= ball_N[None]
        precise += int(np.sum(np.any(near_real_mN, axis=1)))
        counted += int(np.sum(near_real_mN))
        covered_N |= np.any(near_real_mN, axis=0)
        recalled_N |= np.any(squares_mN <= ball_M[rows, None], axis=0)
    m = len(b_MD)
    means = float(np.mean(recalled_N)), counted / (k * m), float(np.mean(covered_N))
    return Neighbours(precise / m, *means)


def _balls(x_ND: np.ndarray, k: int) -> np.ndarray:
    """[N] squared distances to the k-th neighbour; a vector is its own 0-th."""
    found = [
        np.partition(pairs.squared_distances(x_ND[rows], x_ND), k, axis=1)[:, k]
        for rows in pairs.blocks(len(x_ND), len(x_ND))
    ]
    return np.concatenate(found)
