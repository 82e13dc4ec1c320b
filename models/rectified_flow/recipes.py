"""The published ways of sampling, by name: ``recipe("rfpp_heun:5")`` is a ``Solver``.

N is a number of steps, NFE of evaluations. eps = 1e-3 unless said otherwise.

  name                        NFE        what it is
  euler:N, heun:N             N, 2N-1    t = i / N from 0 to 1: exact velocities, toys
  rk45[:TOL]                  adaptive   the same, rtol = atol = TOL, 1e-5 if not given

  Liu, Gong and Liu 2022 (RF)
  rf_euler:N                  N          t = eps + i / N (1 - eps), but each step moves by v / N
  rf_rk45[:TOL]               adaptive   from eps to 1, the batch as one system
  rf_sde:N:SIGMA              N          its SDE on the same times
  rf_invert_euler:N           N          data to noise: t = 1 - i / N (1 - eps)
  rf_invert_rk45[:TOL]        adaptive   data to noise, from 1 to eps

  Zhu, Liu and Liu 2024 (SlimFlow)
  slimflow_one_step           1          x + (1 - eps) v(x, eps): not rf_euler:1
  slimflow_euler:N            N          rf_euler
  slimflow_heun:N             2N-1       last step Euler; the public code makes one more call that
                                         changes nothing, and does not count it either
  cm_stochastic:N             N          to the predicted data and back with fresh noise

  Lee, Lin and Fanti 2024 (2-RF++), from eps = 1e-5, noise scaled by 1 - 1e-5
  rfpp_euler:N                N          t = i / N
  rfpp_heun:NFE               NFE, odd   (NFE + 1) / 2 steps, the last one Euler
  rfpp_new_euler:N            N          with the rule "renoise", their new one
  rfpp_new_heun:NFE           NFE, odd   likewise
  rfpp_invert_euler:N         N          data to noise from t = 0.999, data mixed with noise
  rfpp_invert_heun:NFE        NFE, odd   likewise

  Karras et al. 2022 (EDM), from sigma = 80 to 0.002 and 0, to make pairs of a diffusion model
  edm_euler:N, edm_heun:N     N, 2N-1    the published pairs are of N = 18 (CIFAR-10) or 40

Published one-step results of RF and SlimFlow are of ``rf_euler:1``.
"""

from collections.abc import Callable
from typing import NamedTuple

from .diffusion import edm_sigmas
from .solvers import Solver
from .times import EPS, EPS_BOTH

TOLERANCE = 1e-5


def recipe(text: str) -> Solver:
    """The solver that a name of the table at the top of the module stands for.

    Raises:
      ValueError: for an unknown name, or a number that the recipe does not allow.
    """
    name, *numbers = text.split(":")
    if name not in RECIPES:
        raise ValueError(
            f"unknown solver {text!r}; choose one of"
            f" {', '.join(known + entry.usage for known, entry in RECIPES.items())}"
        )
    entry = RECIPES[name]
    try:
        return entry.make(*(float(number) for number in numbers))
    except TypeError:
        raise ValueError(f"solver {text!r}: use {name}{entry.usage}") from None
    except ValueError as error:
        raise ValueError(f"solver {text!r}: use {name}{entry.usage} ({error})") from None


def uniform_grid(steps: int, start: float, end: float) -> tuple[float, ...]:
    """start + i / N (end - start), i = 0, ..., N; the last is exactly ``end``."""
    _check_steps(steps)
    return (*(start + (end - start) * i / steps for i in range(steps)), end)


def even_grid(steps: int, start: float, end: float) -> tuple[float, ...]:
    """Multiples of 1 / N between ``start`` and ``end``, which stand in for 0 and 1."""
    return (start, *uniform_grid(steps, float(start > end), float(start < end))[1:-1], end)


def warped_grid(steps: int, start: float, end: float, rho: float) -> tuple[float, ...]:
    """(start^rho + i / N (end^rho - start^rho))^(1 / rho); rho = 1 is the uniform grid."""
    if not rho > 0:
        raise ValueError(f"rho of a grid must be positive, got {rho}")
    warped = uniform_grid(steps, start**rho, end**rho)
    return (start, *(t ** (1 / rho) for t in warped[1:-1]), end)


class _Recipe(NamedTuple):
    """What follows the name; its numbers -> solver."""

    usage: str
    make: Callable[..., Solver]


def _rf_euler(steps):
    return Solver("euler", uniform_grid(_whole(steps), EPS, 1.0), displacement="unit")


def _rk45(start: float, end: float):
    return lambda tolerance=TOLERANCE: Solver("rk45", (start, end), rtol=tolerance, atol=tolerance)


def _rf_sde(steps, sigma):
    grid = uniform_grid(_whole(steps), EPS, 1.0)
    return Solver("sde", grid, displacement="unit", sigma=sigma)


def _rf_invert_euler(steps):
    return Solver("euler", uniform_grid(_whole(steps), 1.0, EPS), displacement="unit")


def _rfpp(method: str, rule: str):
    def make(number):
        grid = even_grid(_rfpp_steps(method, number), EPS_BOTH, 1.0)
        return Solver(method, grid, rule, input_scale=1 - EPS_BOTH)

    return make


def _rfpp_invert(method: str):
    def make(number):
        grid = even_grid(_rfpp_steps(method, number), 1 - EPS, 0.0)
        return Solver(method, grid, input_scale=1 - EPS, input_noise=EPS)

    return make


def _rfpp_steps(method: str, number) -> int:
    """Of N for euler, of the NFE for heun."""
    if method == "euler":
        return _whole(number)
    if _whole(number) % 2 == 0:
        raise ValueError("the number of evaluations must be odd: two a step, one in the last")
    return (_whole(number) + 1) // 2


def _edm(method: str):
    def make(steps):
        grid = (1 / (1 + sigma) for sigma in edm_sigmas(_whole(steps)))
        return Solver(method, tuple(grid))

    return make


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(f"{number} is not a whole number")
    return int(number)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a solver makes at least one step, got {steps}")


RECIPES = {
    "euler": _Recipe(":N", lambda n: Solver("euler", uniform_grid(_whole(n), 0.0, 1.0))),
    "heun": _Recipe(":N", lambda n: Solver("heun", uniform_grid(_whole(n), 0.0, 1.0))),
    "rk45": _Recipe("[:TOL]", _rk45(0.0, 1.0)),
    "rf_euler": _Recipe(":N", _rf_euler),
    "rf_rk45": _Recipe("[:TOL]", _rk45(EPS, 1.0)),
    "rf_sde": _Recipe(":N:SIGMA", _rf_sde),
    "rf_invert_euler": _Recipe(":N", _rf_invert_euler),
    "rf_invert_rk45": _Recipe("[:TOL]", _rk45(1.0, EPS)),
    "slimflow_one_step": _Recipe("", lambda: Solver("euler", (EPS, 1.0))),
    "slimflow_euler": _Recipe(":N", _rf_euler),
    "slimflow_heun": _Recipe(
        ":N", lambda n: Solver("heun", warped_grid(_whole(n), EPS, 1.0, rho=1.0))
    ),
    "cm_stochastic": _Recipe(
        ":N", lambda n: Solver("cm_stochastic", uniform_grid(_whole(n), EPS, 1.0))
    ),
    "rfpp_euler": _Recipe(":N", _rfpp("euler", "default")),
    "rfpp_heun": _Recipe(":NFE", _rfpp("heun", "default")),
    "rfpp_new_euler": _Recipe(":N", _rfpp("euler", "renoise")),
    "rfpp_new_heun": _Recipe(":NFE", _rfpp("heun", "renoise")),
    "rfpp_invert_euler": _Recipe(":N", _rfpp_invert("euler")),
    "rfpp_invert_heun": _Recipe(":NFE", _rfpp_invert("heun")),
    "edm_euler": _Recipe(":N", _edm("edm_euler")),
    "edm_heun": _Recipe(":N", _edm("edm_heun")),
}
