"""How straight a flow is, how its paths cross, and what its coupling costs.

Dimensions: B examples, N steps; the axes behind B are of any number.

For a flow Z of velocity v and the pairs X that it was trained on (Liu, Gong and Liu 2022, sections
2 and 3):

  S(Z) = int_0^1 E ||(Z_1 - Z_0) - dZ_t/dt||^2 dt
  V(X) = int_0^1 E ||(X_1 - X_0) - v(X_t, t)||^2 dt
  E ||X_1 - X_0||^2 - E ||Z_1 - Z_0||^2 = S(Z) + V(X)      for the exact v

All are sums over the numbers of an example; the straightness of 2-RF++ is a mean.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from . import path
from .solvers import Velocity

COSTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "squared": lambda d_BD: jnp.sum(jnp.square(d_BD), axis=1),
    "l2": lambda d_BD: jnp.sqrt(jnp.sum(jnp.square(d_BD), axis=1)),
    "l1": lambda d_BD: jnp.sum(jnp.abs(d_BD), axis=1),
}


def straightness(trajectory: jax.Array, times: Sequence[float]) -> jax.Array:
    """S of each example: [B], 0 if it moved along a straight line at constant speed.

    Args:
      trajectory: [N + 1, B, ...] states of a solver.
      times: of the states, its grid; velocities are differences between neighbours.

    Raises:
      ValueError: if the lengths differ.
    """
    return jnp.sum(_deviation(trajectory, times), axis=1)


def mean_straightness(trajectory: jax.Array) -> jax.Array:
    """The same as 2-RF++ reports it: steps count as equal, and the numbers' mean is taken: [B].

    (Lee, Lin and Fanti 2024, public code.)
    """
    steps = len(trajectory) - 1
    return jnp.mean(_deviation(trajectory, [i / max(steps, 1) for i in range(steps + 1)]), axis=1)


def crossing(
    velocity: Velocity,
    x0: jax.Array,
    x1: jax.Array,
    steps: int,
) -> jax.Array:
    """V of each pair: [B], 0 if no path crosses another; the midpoint rule with so many steps.

    With the exact velocity its mean is the smallest loss that is possible (summed, not averaged,
    over the numbers of an example).

    Raises:
      ValueError: if steps is below 1 or shapes differ.
    """
    if steps < 1:
        raise ValueError(f"the crossing needs at least one step, got {steps}")
    chord = path.target(x0, x1)

    def add(total_B, i):
        t_B = jnp.full(chord.shape[:1], (i + 0.5) / steps, chord.dtype)
        v = velocity(path.interpolate(x0, x1, t_B), t_B).astype(chord.dtype)
        return total_B + COSTS["squared"](_flat(chord - v)), None

    zero_B = jnp.zeros(chord.shape[:1], chord.dtype)
    total_B, _ = jax.lax.scan(add, zero_B, jnp.arange(steps, dtype=chord.dtype))
    return total_B / steps


def transport_cost(x0: jax.Array, x1: jax.Array, cost: str = "squared") -> jax.Array:
    """c(X_1 - X_0) of each pair: [B]; c is a convex function of ``COSTS``.

    Raises:
      ValueError: for an unknown cost.
    """
    if cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}; choose one of {', '.join(COSTS)}")
    return COSTS[cost](_flat(path.target(x0, x1)))


def slerp(a: jax.Array, b: jax.Array, lambda_B: jax.Array) -> jax.Array:
    """Spherical interpolation (sin((1 - l) w) a + sin(l w) b) / sin w, w the angle of a and b.

    Between noises, which lie near a sphere. a and b keep their lengths; 1e-8 is added to w, so that
    equal ones are allowed.

    Args:
      a, b: [B, ...].
      lambda_B: [B] from 0 (a) to 1 (b).
    """
    path.check_pair(a, b)
    a, b = path.wide(a), path.wide(b)
    unit = lambda x_BD: x_BD / jnp.linalg.norm(x_BD, axis=1, keepdims=True)
    cosine_B = jnp.sum(unit(_flat(a)) * unit(_flat(b)), axis=1)
    w_B = jnp.arccos(jnp.clip(cosine_B, -1, 1)) + 1e-8
    lambda_B = lambda_B.astype(a.dtype)
    share = lambda part_B: path.along(jnp.sin(part_B * w_B) / jnp.sin(w_B), a)
    return share(1 - lambda_B) * a + share(lambda_B) * b


def _deviation(trajectory, times) -> jax.Array:
    """Squared deviations of a step's velocity from the mean velocity, over time: [B, D]."""
    if len(times) != len(trajectory) or len(times) < 2:
        raise ValueError(
            f"a trajectory of {len(trajectory)} states needs as many times, 2 or more;"
            f" got {len(times)}"
        )
    x = path.wide(trajectory).reshape(*trajectory.shape[:2], -1)
    t_N = jnp.asarray(times, x.dtype)
    dt_N11 = jnp.diff(t_N)[:, None, None]
    mean_1BD = (x[-1:] - x[:1]) / (t_N[-1] - t_N[0])
    share_N11 = dt_N11 / (t_N[-1] - t_N[0])
    return jnp.sum(share_N11 * jnp.square(jnp.diff(x, axis=0) / dt_N11 - mean_1BD), axis=0)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)
