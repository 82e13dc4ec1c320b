"""Distillation of a flow into one step, or k.

Dimensions: B examples.

One step (Liu, Gong and Liu 2022, section 2.2): a student v trained at t = eps on a flow's pairs
(Z_0, Z_1), with times "t0" and a loss "l2" or "distill_lpips"; it is asked at X_eps, though samples
are Z_0 + v(Z_0, eps). For k steps the times are "k_step:k" and the loss is "l2". Samples are those
of the recipe "rf_euler:k".
"""

import jax
import jax.numpy as jnp

from . import losses, path
from .perceptual import Distance
from .solvers import Velocity
from .times import EPS

LEGS = (0.2, 0.8)  # s of flow-guided distillation is uniform between these
FIRST = ("student", "teacher")


def pair_loss(
    name: str,
    velocity: Velocity,
    x0: jax.Array,
    x1: jax.Array,
    t_B: jax.Array,
    distance: Distance | None = None,
    *,
    huber_c: float | str = "d",
) -> jax.Array:
    """``losses.per_example`` of a velocity on the straight path between x0 and x1: [B]."""
    x_t = path.interpolate(x0, x1, t_B)
    v = velocity(x_t, t_B)
    return losses.per_example(name, v, x_t, t_B, x0, x1, distance, huber_c=huber_c)


def two_step_loss(
    name: str,
    student: Velocity,
    teacher: Velocity,
    xi: jax.Array,
    s_B: jax.Array,
    distance: Distance | None = None,
    *,
    first: str = "student",
    huber_c: float | str = "d",
    eps: float = EPS,
) -> jax.Array:
    """One step of the student against two steps without data (Zhu, Liu and Liu 2024, section 4.2).

    With sg for stopped gradients,

      y = xi + s v(xi, eps),   X1hat = y + (1 - s) v_teacher(y, s),

    and the loss compares xi + v_student(xi, eps) with sg(X1hat). The velocity v of the first leg is
    the student's own, from the same evaluation (public code, and better by the paper's account), or
    the teacher's (their equation 12).

    Args:
      name: a loss of ``losses.LOSSES``.
      student, teacher: velocities; of the teacher, give its averaged weights, in evaluation mode.
      xi: [B, ...] fresh noise.
      s_B: [B] where the first leg ends, uniform in LEGS as published.
      distance: for names with "lpips".
      first: "student" or "teacher".
      huber_c: for losses with "huber", as in ``losses.per_example``.
      eps: the time that stands for 0.

    Returns:
      [B]; weights over time, if any, are taken at s.

    Raises:
      ValueError: for an unknown name or first leg, a missing distance, or shapes that do not fit.
    """
    losses.check(name, distance, huber_c)
    if first not in FIRST:
        raise ValueError(f"first must be 'student' or 'teacher', got {first!r}")
    xi = path.wide(xi)
    eps_B, s = jnp.full(xi.shape[:1], eps, xi.dtype), path.along(s_B, xi)
    v = student(xi, eps_B)
    leg = v if first == "student" else teacher(xi, eps_B)
    y = xi + s * leg.astype(xi.dtype)
    end = jax.lax.stop_gradient(path.predicted_data(y, teacher(y, s_B), s_B))
    return losses.per_example(name, v, xi, eps_B, xi, end, distance, huber_c=huber_c)
