"""Rectified flows (Liu, Gong, Liu 2022), 2-RF++ (Lee, Lin, Fanti 2024), SlimFlow (Zhu et al. 2024).

Everything here is a plain function of arrays; the networks are in their own packages. t = 0 is
noise, t = 1 is data, and velocities point from noise to data, everywhere.

path.py          the straight path, and what a velocity on it predicts
times.py         at which times to train, by name
losses.py        losses per example and weights over time, by name
perceptual.py    distances of images that need no weights, and resizing
lpips.py         LPIPS, with weights from a file
annealing.py     from independent noise to a teacher's pairs (SlimFlow)
distillation.py  into one step, or k
solvers.py       following a velocity: one entry, and every method but
runge_kutta.py   the adaptive one
recipes.py       the published ways of sampling, by name
diffusion.py     EDM and VP networks as velocities; EDM's sampler
geometry.py      straightness, crossings and costs of flows
exact.py         velocities in closed form
"""

from . import (
    annealing,
    diffusion,
    distillation,
    exact,
    geometry,
    losses,
    lpips,
    path,
    perceptual,
    times,
)
from .recipes import RECIPES, even_grid, recipe, uniform_grid, warped_grid
from .solvers import Solution, Solver, solve
from .times import TimeDensity, time_density

__all__ = [
    "RECIPES",
    "Solution",
    "Solver",
    "TimeDensity",
    "annealing",
    "diffusion",
    "distillation",
    "even_grid",
    "exact",
    "geometry",
    "losses",
    "lpips",
    "path",
    "perceptual",
    "recipe",
    "solve",
    "time_density",
    "times",
    "uniform_grid",
    "warped_grid",
]
