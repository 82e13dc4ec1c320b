"""Dormand and Prince's Runge-Kutta method of order 5(4), with adaptive steps, inside jit.

Dimensions: B examples, S the 7 stages; the axes behind B are of any number.

The control of steps is that of Hairer, Norsett and Wanner (1993, section II.4) with scipy's
constants, so that ``scipy.integrate.solve_ivp`` takes the same steps. The last stage of a step is
the first of the next (FSAL): 6 evaluations per attempted step, and 2 to choose the first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import path

SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0
ORDER = 4  # of the error estimate: steps scale with error^(-1/5)

# Dormand and Prince (1980), table 2: rows are stages; the last is the result of order 5 as well.
NODES = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
STAGES = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0],
        [1 / 5, 0, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    ]
)
# Order 5 minus order 4.
ERROR = np.array([71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40])


def integrate(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    per_sample: bool,
    max_steps: int | jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Follows dx/dt = velocity(x, t) from time ``start`` to ``end``.

    Args:
      velocity: (x [B, ...], t [B]) -> [B, ...] in x's dtype.
      x: [B, ...] float32 or float64; states and times are kept in its dtype.
      start, end: in either order.
      rtol, atol: the root mean square of error / (atol + rtol |x|) over a system is at most 1.
      per_sample: every example is a system of its own; else the batch is one.
      max_steps: attempted steps.

    Returns:
      x [B, ...]; evaluations of the velocity [B] int32, examples that were done not counted; and
      the times reached [B], exactly ``end`` where that was possible within max_steps and steps
      that the dtype resolves.
    """
    sign = 1.0 if end > start else -1.0
    end_B = jnp.full(x.shape[:1], end, x.dtype)
    norm = _norm(x, per_sample)
    t_B = jnp.full(x.shape[:1], start, x.dtype)
    f = velocity(x, t_B)
    h_B = _first_step(velocity, x, t_B, f, sign, jnp.abs(end_B - t_B), norm, rtol, atol)
    zero_B = jnp.zeros(x.shape[:1], jnp.int32)
    no_B = zero_B > 0
    state = _State(x, f, t_B, h_B, no_B, no_B, zero_B, zero_B + 2)

    def active(s: "_State"):
        return (s.t_B != end_B) & ~s.stuck_B & (s.attempts_B < max_steps)

    def step(s: "_State") -> "_State":
        active_B = active(s)
        h_B = jnp.maximum(s.h_B, _least(s.t_B, end_B))
        beyond_B = sign * (s.t_B + sign * h_B - end_B) > 0
        next_B = jnp.where(beyond_B, end_B, s.t_B + sign * h_B)
        next_B = jnp.where(active_B, next_B, s.t_B)
        h_B = jnp.abs(next_B - s.t_B)
        y, f, slope = _stages(velocity, s, next_B - s.t_B)
        scale = atol + rtol * jnp.maximum(jnp.abs(s.x), jnp.abs(y))
        error_B = norm(path.along(h_B, x) * slope / scale)
        good_B = error_B < 1
        factor_B = _factor(error_B, good_B, s.rejected_B)
        accepted_B, shorter_B = active_B & good_B, h_B * factor_B
        stuck_B = active_B & ~good_B & ~(shorter_B >= _least(s.t_B, end_B))  # also NaN
        keep = lambda flag_B, new, old: jnp.where(_flags(flag_B, new), new, old)
        return _State(
            x=keep(accepted_B, y, s.x),
            f=keep(accepted_B, f, s.f),
            t_B=jnp.where(accepted_B, next_B, s.t_B),
            h_B=jnp.where(active_B, shorter_B, s.h_B),
            rejected_B=active_B & ~good_B,
            stuck_B=s.stuck_B | stuck_B,
            attempts_B=s.attempts_B + active_B.astype(jnp.int32),
            nfe_B=s.nfe_B + 6 * active_B.astype(jnp.int32),
        )

    state = jax.lax.while_loop(lambda s: jnp.any(active(s)), step, state)
    return state.x, state.nfe_B, state.t_B


class _State(NamedTuple):
    """x and its velocity f at t; the next step's length h; what happened so far."""

    x: jax.Array
    f: jax.Array
    t_B: jax.Array
    h_B: jax.Array
    rejected_B: jax.Array
    stuck_B: jax.Array
    attempts_B: jax.Array
    nfe_B: jax.Array


def _stages(velocity, s: _State, dt_B):
    """The result of order 5, its velocity, and the velocity whose h-fold is the error.

    A loop over stages, so that the velocity is compiled once.
    """
    x, dt = s.x, path.along(dt_B, s.x)
    nodes, rows = jnp.asarray(NODES, x.dtype), jnp.asarray(STAGES, x.dtype)
    k_S = jnp.zeros((len(NODES), *x.shape), x.dtype).at[0].set(s.f)

    def stage(i, carry):
        k_S, _ = carry
        y = x + dt * _combine(rows[i], k_S)
        f = velocity(y, s.t_B + nodes[i] * dt_B)
        return k_S.at[i].set(f), y

    k_S, y = jax.lax.fori_loop(1, len(NODES), stage, (k_S, x))
    return y, k_S[-1], _combine(jnp.asarray(ERROR, x.dtype), k_S)


def _combine(weights_S, k_S):
    """A sum over stages that no matrix unit rounds."""
    return jnp.sum(weights_S.reshape(-1, *(1,) * (k_S.ndim - 1)) * k_S, axis=0)


def _first_step(velocity, x, t_B, f, sign, length_B, norm, rtol, atol):
    """[B] a length such that an explicit Euler step would be accurate, squared in effect."""
    scale = atol + rtol * jnp.abs(x)
    d0_B, d1_B = norm(x / scale), norm(f / scale)
    tiny_B = (d0_B < 1e-5) | (d1_B < 1e-5)
    h0_B = jnp.where(tiny_B, 1e-6, 0.01 * d0_B / jnp.where(tiny_B, 1, d1_B))
    h0_B = jnp.minimum(h0_B, length_B)
    y = x + path.along(sign * h0_B, x) * f
    d2_B = norm((velocity(y, t_B + sign * h0_B) - f) / scale) / h0_B
    largest_B = jnp.maximum(d1_B, d2_B)
    still_B = largest_B <= 1e-15
    h1_B = jnp.where(
        still_B,
        jnp.maximum(1e-6, h0_B * 1e-3),
        (0.01 / jnp.where(still_B, 1, largest_B)) ** (1 / (ORDER + 1)),
    )
    return jnp.minimum(jnp.minimum(100 * h0_B, h1_B), length_B)


def _factor(error_B, good_B, rejected_B):
    """What the next step's length is multiplied by; a NaN shrinks it most."""
    power_B = SAFETY * jnp.where(good_B & (error_B == 0), 1, error_B) ** (-1 / (ORDER + 1))
    longer_B = jnp.where(error_B == 0, MAX_FACTOR, jnp.minimum(MAX_FACTOR, power_B))
    longer_B = jnp.where(rejected_B, jnp.minimum(1, longer_B), longer_B)
    shorter_B = jnp.where(jnp.isnan(power_B), MIN_FACTOR, jnp.maximum(MIN_FACTOR, power_B))
    return jnp.where(good_B, longer_B, shorter_B)


def _norm(x, per_sample: bool):
    """Root mean square over an example [B], or over the batch, the same for all [B]."""

    def norm(y):
        mean_B = jnp.mean(jnp.square(y), axis=tuple(range(1, y.ndim)))
        if not per_sample:
            mean_B = jnp.full_like(mean_B, jnp.mean(mean_B))
        return jnp.sqrt(mean_B)

    return norm


def _least(t_B, end_B):
    """The shortest step that the dtype resolves: ten times the distance of numbers."""
    return 10 * jnp.abs(jnp.nextafter(t_B, end_B) - t_B)


def _flags(flag_B, x):
    return flag_B.reshape(flag_B.shape + (1,) * (x.ndim - 1))
