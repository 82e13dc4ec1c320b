"""How sure and how diverse a classifier finds generated images.

Dimensions: N images, K classes.
"""

import numpy as np

from .distances import Estimate


def class_score(probabilities_NK: np.ndarray, *, splits: int = 10) -> Estimate:
    """exp E_x KL(p(y|x) || p(y)), between 1 and K (Salimans et al. 2016).

    "Inception score" only with Inception's probabilities.

    Args:
      probabilities_NK: [N, K] p(y|x), any real dtype.
      splits: parts of N / splits rows in order; p(y) is the mean over a part.

    Returns:
      The mean over parts, and its standard error (the published figure is the standard
      deviation, sqrt(splits) times that); 0 for one part.

    Raises:
      ValueError: if rows are no probabilities, or fewer than the splits.
    """
    p_NK = np.asarray(probabilities_NK, np.float64)
    if p_NK.ndim != 2 or splits < 1 or len(p_NK) < splits:
        raise ValueError(
            f"probabilities must be [N, K] with N >= splits, got {p_NK.shape} and {splits} splits"
        )
    if not np.all(p_NK >= 0) or np.max(np.abs(np.sum(p_NK, axis=1) - 1)) > 1e-3:
        raise ValueError("probabilities must be finite, not negative, and every row sum to 1")
    scores = [_score(part) for part in np.array_split(p_NK, splits)]
    error = np.std(scores, ddof=1) / np.sqrt(splits) if splits > 1 else 0.0
    return Estimate(float(np.mean(scores)), float(error))


def _score(p_NK: np.ndarray) -> float:
    marginal_1K = np.mean(p_NK, axis=0, keepdims=True)
    ratio_NK = p_NK / np.where(marginal_1K > 0, marginal_1K, 1)
    divergence_N = np.sum(p_NK * np.log(np.where(p_NK > 0, ratio_NK, 1)), axis=1)
    return float(np.exp(np.mean(divergence_N)))
