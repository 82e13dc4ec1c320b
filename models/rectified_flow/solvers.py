"""One entry for every way of following a velocity: ``solve(velocity, x, solver)``.

Dimensions: B examples, N steps; the axes behind B are of any number.

Times run from 0 (noise) to 1 (data), a velocity points from noise to data, and a solver goes either
way. All of it runs inside ``jax.jit``, and may be differentiated, except through "rk45", whose
number of steps is not known beforehand (runge_kutta.py). Published recipes are in recipes.py.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import diffusion, path, runge_kutta

Velocity = Callable[[jax.Array, jax.Array], jax.Array]

EDM = {"edm_euler": "euler", "edm_heun": "heun"}
METHODS = ("euler", "heun", "rk45", "sde", "cm_stochastic", *EDM)
RULES = ("default", "renoise")
DISPLACEMENTS = ("grid", "unit")


@dataclasses.dataclass(frozen=True)
class Solver:
    """How to follow a velocity; ``recipes.recipe(text)`` makes the published ones.

    Attributes:
      method: one of METHODS.
        euler: x += dt v.
        heun: the mean of the velocities at both ends of a step; the last step is Euler's, since
          velocities are not defined at the very end: 2 N - 1 evaluations.
        rk45: Dormand and Prince 5(4) with adaptive steps; the grid is (start, end).
        sde: Euler and Maruyama on the SDE of Liu, Gong and Liu's public code, with diffusion
          sigma (1 - t). Reproduced as published: its drift is not the score of the straight path,
          so marginals are kept for sigma = 0 only.
        cm_stochastic: jumps to the predicted data and back with fresh noise, as samplers of
          consistency models do.
        edm_euler, edm_heun: the same of X_t / t over the noise level (1 - t) / t, as EDM samples
          (diffusion.py); they begin at t_0 X_0 / (1 - t_0), that is at sigma X_0.
      grid: the times t_0, ..., t_N of the steps, rising (to data) or falling (to noise).
      rule: "default", or "renoise" (the "new" rule of Lee, Lin and Fanti 2024): x at the next time
        is the straight path from the noise that one began with to the predicted data.
      displacement: "grid": dt is the distance of grid points; "unit": dt = 1 / N, whatever the
        grid: a flow that begins at eps > 0 is moved by 1 and not by 1 - eps.
      input_scale, input_noise: the solver begins at input_scale x + input_noise xi, xi ~ N(0, I).
      sigma: of the SDE; noise_scale: standard deviation of X_0, which only the SDE asks for.
      rtol, atol: of rk45: a step's error is at most atol + rtol |x|, as a root mean square.
      per_sample: rk45 chooses steps for every example; else for the batch as one system, as the
        published samplers do, so that an example's result depends on its neighbours.
      max_steps: rk45 gives up after so many attempted steps.
    """

    method: str
    grid: tuple[float, ...]
    rule: str = "default"
    displacement: str = "grid"
    input_scale: float = 1.0
    input_noise: float = 0.0
    sigma: float = 0.0
    noise_scale: float = 1.0
    rtol: float = 1e-5
    atol: float = 1e-5
    per_sample: bool = False
    max_steps: int = 1000

    def __post_init__(self):
        for name, allowed in (
            ("method", METHODS),
            ("rule", RULES),
            ("displacement", DISPLACEMENTS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"solver.{name} must be one of {', '.join(allowed)}; got {value!r}"
                )
        _check_grid(self.grid)
        self._check_combination()
        for name in ("rtol", "atol", "noise_scale", "input_scale", "max_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"solver.{name} must be positive, got {getattr(self, name)}")
        for name in ("sigma", "input_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"solver.{name} must not be negative, got {getattr(self, name)}")

    def _check_combination(self):
        if self.method == "rk45" and (self.steps != 1 or self.displacement == "unit"):
            raise ValueError("solver rk45 chooses its steps: give grid=(start, end) only")
        if self.rule == "renoise" and self.method not in ("euler", "heun"):
            raise ValueError(f"solver.rule 'renoise' is for euler and heun, not {self.method}")
        to_times = self.rule == "renoise" or self.method == "cm_stochastic"
        if to_times and self.displacement == "unit":
            raise ValueError("'renoise' and cm_stochastic go to times: use displacement 'grid'")
        if (self.sigma and self.method != "sde") or (self.per_sample and self.method != "rk45"):
            raise ValueError("solver.sigma is for sde, solver.per_sample for rk45")
        if not self.to_data and (self.rule == "renoise" or self.method in _STOCHASTIC):
            raise ValueError("sde, cm_stochastic and 'renoise' go to data: the grid must rise")
        if self.method in EDM and not (0 < self.grid[0] and self.grid[-1] == 1):
            raise ValueError(f"solver {self.method} goes from a time above 0 to 1")
        if self.method in EDM and (self.rule, self.displacement) != ("default", "grid"):
            raise ValueError(f"solver {self.method} has rule 'default' and displacement 'grid'")
        if self.input_noise and self.method in _STOCHASTIC:
            raise ValueError("solver.input_noise is for euler, heun and rk45")

    @property
    def steps(self) -> int:
        """N."""
        return len(self.grid) - 1

    @property
    def to_data(self) -> bool:
        """Whether it goes from noise to data."""
        return self.grid[-1] > self.grid[0]

    @property
    def draws(self) -> int:
        """How many arrays of noise it asks for."""
        if self.method == "cm_stochastic" or (self.method == "sde" and self.sigma):
            return self.steps
        return 1 if self.input_noise else 0


class Solution(NamedTuple):
    """What ``solve`` returns.

    Attributes:
      x: [B, ...] where it arrived, float32 or better.
      nfe: how often the velocity was evaluated, counted there: [] int32, or [B] with
        ``per_sample``, where examples that have arrived do not count.
      time: [B] when it arrived.
      reached: [B] bool, whether that is the grid's end; only rk45 may fail to.
      trajectory: [N + 1, B, ...] x at all times of the grid, or None.
      predictions: [N, B, ...] the end of the flow as the last velocity that was evaluated in each
        step saw it, or None.
    """

    x: jax.Array
    nfe: jax.Array
    time: jax.Array
    reached: jax.Array
    trajectory: jax.Array | None
    predictions: jax.Array | None


def solve(
    velocity: Velocity,
    x: jax.Array,
    solver: Solver,
    *,
    key: jax.Array | None = None,
    noise: jax.Array | None = None,
    trajectory: bool = False,
) -> Solution:
    """Follows ``velocity`` from x.

    Args:
      velocity: (x [B, ...], t [B]) -> [B, ...], from noise to data.
      x: [B, ...] noise, or data if the solver goes to noise. The solver's input scaling is its own
        business: pass plain noise or images.
      solver: what to do.
      key: for solvers that draw noise: one key, or [B] keys, one per example.
      noise: [solver.draws, B, ...] to use instead of drawing.
      trajectory: also return the states between and the predicted ends; not with rk45.

    Raises:
      ValueError: if noise is needed and there is neither key nor noise, if shapes do not fit, or
        for a trajectory of rk45.
    """
    if x.ndim < 1 or x.shape[0] < 1:
        raise ValueError(f"x must be [B, ...] with B >= 1, got {x.shape}")
    if trajectory and solver.method == "rk45":
        raise ValueError("rk45 has no fixed grid: take euler or heun for a trajectory")
    x = path.wide(x)
    draw = _drawing(x, solver, key, noise)
    call = _checked(velocity)
    x = solver.input_scale * x
    if solver.input_noise:
        x = x + solver.input_noise * draw(0)
    if solver.method in EDM:
        return _edm(call, x, solver, trajectory)
    if solver.method != "rk45":
        return _fixed(call, x, solver, draw, trajectory)
    x, nfe_B, time_B = runge_kutta.integrate(
        call,
        x,
        solver.grid[0],
        solver.grid[1],
        rtol=solver.rtol,
        atol=solver.atol,
        per_sample=solver.per_sample,
        max_steps=solver.max_steps,
    )
    nfe = nfe_B if solver.per_sample else nfe_B[0]
    return Solution(x, nfe, time_B, time_B == solver.grid[1], None, None)


_STOCHASTIC = ("sde", "cm_stochastic")


def _fixed(call, x, solver: Solver, draw, trajectory: bool) -> Solution:
    """All methods with a given grid."""
    start, steps = x, solver.steps
    grid = jnp.asarray(solver.grid, x.dtype)
    ahead = path.predicted_data if solver.to_data else path.predicted_noise
    unit = 1 / steps if solver.to_data else -1 / steps
    length = lambda t, t_next: unit if solver.displacement == "unit" else t_next - t

    def move(x, v, t, t_next):
        """A step with velocity v, under the rule."""
        if solver.rule == "renoise":
            return t_next * ahead(x, v, _all(t, x)) + (1 - t_next) * start
        return x + length(t, t_next) * v

    def step(carry, at):
        x, nfe = carry
        index, t, t_next = at
        v, nfe = call(x, _all(t, x)), nfe + 1
        seen = end = ahead(x, v, _all(t, x))
        if solver.method == "heun":

            def correct():
                y = move(x, v, t, t_next)
                v_next = call(y, _all(t_next, x))
                return (v + v_next) / 2, ahead(y, v_next, _all(t_next, x)), nfe + 1

            v, seen, nfe = jax.lax.cond(index < steps - 1, correct, lambda: (v, end, nfe))
        if solver.method == "sde" and solver.sigma:
            x_next = _diffuse(x, v, t, length(t, t_next), solver, draw(index))
        elif solver.method == "cm_stochastic":
            x_next = t_next * end + (1 - t_next) * draw(index)
        else:
            x_next = move(x, v, t, t_next)
        return (x_next, nfe), (x_next, seen) if trajectory else None

    at = (jnp.arange(steps, dtype=jnp.int32), grid[:-1], grid[1:])
    (x_end, nfe), kept = jax.lax.scan(step, (x, jnp.int32(0)), at)
    states, predictions = kept or (None, None)
    if states is not None:
        states = jnp.concatenate([start[None], states])
    time_B = _all(grid[-1], x)
    return Solution(x_end, nfe, time_B, jnp.ones(time_B.shape, bool), states, predictions)


def _edm(call, x, solver: Solver, trajectory: bool) -> Solution:
    """States are X_t / t, EDM's own, and there are no predictions."""

    def denoiser(x, sigma_B):
        t_B = diffusion.time_of(sigma_B)
        x_t = path.along(t_B, x) * x
        return diffusion.denoised_of_velocity(call(x_t, t_B), x_t, t_B)

    sigmas = tuple((1 - t) / t for t in solver.grid)
    found = diffusion.edm_sample(denoiser, x, sigmas, EDM[solver.method])
    time_B = _all(1.0, x)
    states = found.trajectory if trajectory else None
    return Solution(found.x, found.nfe, time_B, jnp.ones(time_B.shape, bool), states, None)


def _diffuse(x, v, t, dt, solver: Solver, xi):
    """sigma_t = (1 - t) sigma; the factor sigma_t^2 / (2 s^2 (1 - t)^2) does not depend on t."""
    rate = solver.sigma**2 / (2 * solver.noise_scale**2)
    drift = v + rate * (0.5 * t * (1 - t) * v - 0.5 * (2 - t) * x)
    return x + drift * dt + (1 - t) * solver.sigma * dt**0.5 * xi


def _all(t, x: jax.Array) -> jax.Array:
    """[B] of a time."""
    return jnp.full(x.shape[:1], t, x.dtype)


def _checked(velocity: Velocity) -> Velocity:
    """The velocity in the dtype of x; a ValueError if its shape is another."""

    def call(x, t_B):
        v = velocity(x, t_B)
        if v.shape != x.shape:
            raise ValueError(f"the velocity of x {x.shape} has the shape {v.shape}")
        return v.astype(x.dtype)

    return call


def _drawing(x, solver: Solver, key, noise):
    """(index) -> noise like x."""
    if not solver.draws:
        return lambda index: jnp.zeros_like(x)
    if noise is not None:
        if noise.shape != (solver.draws, *x.shape):
            raise ValueError(f"noise must be {(solver.draws, *x.shape)}, got {noise.shape}")
        return lambda index: noise[index].astype(x.dtype)
    if key is None:
        raise ValueError(f"solver {solver.method} draws noise: pass key=jax.random.key(seed)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), x.shape[:1]):
        raise ValueError(f"key must be one key of jax.random.key, or one per example {x.shape[:1]}")
    normal = lambda key, shape, index: jax.random.normal(
        jax.random.fold_in(key, index), shape, x.dtype
    )
    if key.ndim == 0:
        return lambda index: normal(key, x.shape, index)
    return lambda index: jax.vmap(lambda k: normal(k, x.shape[1:], index))(key)


def _check_grid(grid: tuple[float, ...]) -> None:
    if len(grid) < 2:
        raise ValueError("solver.grid needs at least two times: a solver makes at least one step")
    if not all(0 <= t <= 1 for t in grid):
        raise ValueError(f"times of a solver must be in [0, 1], got {grid}")
    pairs = list(itertools.pairwise(grid))
    if not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise ValueError(f"times of a solver must rise or fall throughout, got {grid}")
