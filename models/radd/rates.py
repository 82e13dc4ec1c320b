"""How likely a masked position is unmasked in a step, and how many network calls follow from it.

Dimensions: N steps.

Everything is float64 NumPy on the host: differences of nearby times cancel in float32.
"""

import logging
from typing import Any, Protocol

import jax
import numpy as np

METHODS = ("tweedie", "euler")
GRIDS = ("even", "uniform", "cosine")
LAST_TIME = 1e-5  # of the even grid


class Schedule(Protocol):
    """sbar and sigma of Ou et al.: functions of arrays of times, NumPy's or JAX's."""

    @property
    def total(self) -> Any:
        """sbar(t)."""

    @property
    def rate(self) -> Any:
        """sigma(t)."""


def unmask_rates(
    schedule: Schedule, n: int, method: str = "tweedie", grid: str = "even"
) -> np.ndarray:
    """psi [N]: the probability that a position which is masked before step i is not after it.

    Args:
      schedule: total(t) = sbar and rate(t) = sigma.
      n: steps.
      method: tweedie: (alpha(s) - alpha(t)) / (1 - alpha(t)) for a step from t to s;
        euler: (t - s) sigma(t) alpha(t) / (1 - alpha(t)), at most 1.
      grid: see :func:`time_grid`.

    The last step fills what is left: its psi is 1. Where sigma / (e^sbar - 1) is 1 / t, as it is
    for the log-linear schedule, both methods are (t - s) / t, and are computed so.

    Raises:
      ValueError: for n < 1, or an unknown method or grid.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    t_N, dt_N = _steps(n, grid)
    s_N = np.maximum(t_N - dt_N, 0)
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        total_N, total_next_N, rate_N = (
            np.asarray(f(x), np.float64)
            for f, x in (
                (schedule.total, t_N),
                (schedule.total, s_N),
                (schedule.rate, t_N),
            )
        )
    hazard_N = rate_N / np.expm1(total_N)
    if np.allclose(hazard_N * t_N, 1, rtol=0, atol=1e-10):
        psi_N = dt_N / t_N
    elif method == "euler":
        psi_N = dt_N * hazard_N
    else:
        psi_N = np.exp(-total_next_N) * np.expm1(total_next_N - total_N) / np.expm1(-total_N)
    psi_N[-1] = 1
    above = int((psi_N > 1).sum())
    if above:
        logging.getLogger(__name__).warning(
            "%d of %d steps of %s would unmask with a probability above 1, up to %.3g: clamped to"
            " 1; take more steps, or tweedie",
            *(above, n, method, psi_N.max()),
        )
    return np.clip(psi_N, 0, 1)


def time_grid(n: int, grid: str = "even") -> np.ndarray:
    """The times [N + 1] of N steps, falling from 1.

    even: to 1e-5, as RADD and SEDD sample; uniform: to 0, and cosine: cos(pi / 2 (1 - t)) of it,
    as MD4 samples (Shi et al. 2024).

    Raises:
      ValueError: for n < 1 or an unknown grid.
    """
    if n < 1:
        raise ValueError(f"a sampler makes at least one step, got n={n}")
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}; got {grid!r}")
    if grid == "even":
        return np.linspace(1, LAST_TIME, n + 1)
    times = np.arange(n, -1, -1) / n
    return times if grid == "uniform" else np.sin(np.pi / 2 * times)


def step_probabilities(psi_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p [N], the probability that a position is unmasked in step i, and its cumulative sum [N].

    Raises:
      ValueError: unless psi is in [0, 1] and ends with 1.
    """
    psi_N = np.asarray(psi_N, np.float64)
    if psi_N.ndim != 1 or not (psi_N.min() >= 0 and psi_N.max() <= 1 and psi_N[-1] == 1):
        raise ValueError("rates of unmasking must be in [0, 1], and the last 1")
    left_N = np.cumprod(1 - psi_N)
    return psi_N * np.concatenate([[1.0], left_N[:-1]]), 1 - left_N


def expected_evaluations(p_N: np.ndarray, length: int) -> float:
    """Mean number of steps in which a row of ``length`` masks changes: the event sampler's calls.

    For the log-linear schedule N (1 - (1 - 1 / N)^length) of Ou et al., up to the grid's end.
    """
    return float(_changes(p_N, length).sum())


def expected_loop_evaluations(p_N: np.ndarray, length: int) -> float:
    """Mean calls of a loop over steps that reuses a row's result until the row changes.

    It calls in the first step, and after every change but one in the last step.
    """
    return float(1 + _changes(p_N[:-1], length).sum())


def expected_batch_evaluations(p_N: np.ndarray, length: int, batch: int) -> float:
    """The same for a loop that calls for the whole batch when any of its rows has changed."""
    return expected_loop_evaluations(p_N, length * batch)


def _changes(p_N: np.ndarray, count: int) -> np.ndarray:
    """[N] 1 - (1 - p)^count."""
    with np.errstate(divide="ignore"):
        return -np.expm1(count * np.log1p(-np.minimum(p_N, 1)))


def _steps(n: int, grid: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each step begins, and its length, without a difference where it is known."""
    times = time_grid(n, grid)
    if grid == "cosine":
        return times[:-1], times[:-1] - times[1:]
    return times[:-1], np.full(n, (1 - (LAST_TIME if grid == "even" else 0)) / n)
