"""Rectified flows (Liu, Gong, Liu 2022), 2-RF++ (Lee, Lin, Fanti 2024), SlimFlow (Zhu et al. 2024).

Everything here is a plain function of arrays; the networks are in their own packages. t = 0 is
noise, t = 1 is data, and velocities point from noise to data, everywhere.

path.py         the straight path, and what a velocity on it predicts
times.py        at which times to train, by name
losses.py       losses per example and weights over time, by name
solvers.py      following a velocity: one entry, and every method but
runge_kutta.py  the adaptive one
recipes.py      the published ways of sampling, by name
"""

from . import losses, path
from .recipes import RECIPES, even_grid, recipe, uniform_grid, warped_grid
from .solvers import Solution, Solver, solve
from .times import TimeDensity, time_density

__all__ = [
    "RECIPES",
    "Solution",
    "Solver",
    "TimeDensity",
    "even_grid",
    "losses",
    "path",
    "recipe",
    "solve",
    "time_density",
    "uniform_grid",
    "warped_grid",
]
