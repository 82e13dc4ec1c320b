"""Losses of flows, one value per example, by name; weights over time by name.

Dimensions: B examples, d numbers in each.

With the residual R = v - (X_1 - X_0), r = ||R||, a perceptual distance P, and X1hat = X_t +
(1 - t) v (Liu, Gong and Liu 2022; Lee, Lin and Fanti 2024, section 4.2, whose time runs the other
way; Zhu, Liu and Liu 2024):

  l2                 r^2 / d
  half_sum           r^2 / 2
  root_l2            r / sqrt(d)
  l1                 sum |R| / d
  huber              H = (sqrt(r^2 + c^2) - c) / d
  lpips              P(X1hat, X_1)
  lpips_divt         P(X1hat, X_1) / (1 - t)
  lpips_huber        t H + P(X1hat, X_1)
  lpips_huber_divt   t H + P(X1hat, X_1) / (1 - t)
  distill_lpips      P(X_0 + v, X_1)
  distill_lpips_l2   P(X_0 + v, X_1) + r^2 / d
  distill_lpips_l1   P(X_0 + v, X_1) + sum |R| / d

l2 and half_sum have the conditional mean of X_1 - X_0 as their minimum, and only with that does a
flow keep the marginals of independent pairs. All others have another one (l1 a median, root_l2 a
geometric one, huber one between that and the mean, P its own) and presume that X_1 is (nearly) a
function of X_t, where all minima agree: pairs that a flow has made. The distill_* losses are of one
step from the noise, though v is asked at X_eps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import path
from .perceptual import Distance

HUBER_RATE = 0.00054
HUBER_FORMS = ("d", "sqrt_d")
WEIGHT_EPS = 1e-3


def per_example(
    name: str,
    v: jax.Array,
    x_t: jax.Array,
    t_B: jax.Array,
    x0: jax.Array,
    x1: jax.Array,
    distance: Distance | None = None,
    *,
    huber_c: float | str = "d",
) -> jax.Array:
    """The loss ``name`` of velocities v at x_t, for the pairs (x0, x1): [B], float32 or better.

    Args:
      name: a key of ``LOSSES``, as at the top of the module.
      v: [B, ...] predicted velocities.
      x_t: [B, ...] where they were asked for.
      t_B: [B] when, in [0, 1].
      x0, x1: [B, ...] noise and data.
      distance: P, (x, y) -> [B], for names with "lpips".
      huber_c: c: "d" for 0.00054 d, which the published models of 2-RF++ were trained with;
        "sqrt_d" for 0.00054 sqrt(d), which their authors meant; or a number.

    Raises:
      ValueError: for an unknown name, a missing distance, or shapes that do not fit.
    """
    check(name, distance, huber_c)
    for what, x in (("v", v), ("x_t", x_t), ("x1", x1)):
        if x.shape != x0.shape:
            raise ValueError(f"{what} {x.shape} must have the shape of x0, {x0.shape}")
    v, x_t, x0, x1 = (path.wide(x) for x in (v, x_t, x0, x1))
    t_B = path.along(t_B, x0).reshape(t_B.shape)
    return LOSSES[name](_Inputs(v, x_t, t_B, x0, x1, distance, huber_c))


def check(name: str, distance: Distance | None = None, huber_c: float | str = "d") -> None:
    """Raises the ValueErrors of :func:`per_example` that need no arrays."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}")
    if is_perceptual(name) and distance is None:
        raise ValueError(f"loss {name!r} compares images: pass a perceptual distance")
    if isinstance(huber_c, str):
        if huber_c not in HUBER_FORMS:
            raise ValueError(f"huber_c must be a number, 'd' or 'sqrt_d'; got {huber_c!r}")
    elif not huber_c > 0:
        raise ValueError(f"huber_c must be positive, got {huber_c}")


def is_perceptual(name: str) -> bool:
    """Whether the loss needs a perceptual distance."""
    return "lpips" in name


def weight(name: str, t_B: jax.Array, eps: float = WEIGHT_EPS) -> jax.Array:
    """Weights over time, [B], by name; with snr = (t / (1 - t + eps))^2:

      uniform 1, snr, snr_inv 1 / snr, snr+1, karras snr + 4, truncated_snr max(snr, 1),
      1mt (1 - t)^2

    (Zhu, Liu and Liu 2024, public code, where "snr" itself raises by accident.)

    Raises:
      ValueError: for an unknown name.
    """
    if name not in WEIGHTS:
        raise ValueError(f"unknown weight {name!r}; choose one of {', '.join(WEIGHTS)}")
    return WEIGHTS[name](t_B, jnp.square(t_B / (1 - t_B + eps)))


class _Inputs(NamedTuple):
    """The arguments of ``per_example``, converted."""

    v: jax.Array
    x_t: jax.Array
    t_B: jax.Array
    x0: jax.Array
    x1: jax.Array
    distance: Distance | None
    huber_c: float | str


def _residual(a: _Inputs) -> jax.Array:
    """[B, d]."""
    return (a.v - (a.x1 - a.x0)).reshape(a.v.shape[0], -1)


def _l2(a: _Inputs) -> jax.Array:
    return jnp.mean(jnp.square(_residual(a)), axis=1)


def _half_sum(a: _Inputs) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(_residual(a)), axis=1)


def _root_l2(a: _Inputs) -> jax.Array:
    """Its gradient at R = 0, where there is none, is 0."""
    square_B = _l2(a)
    zero_B = square_B == 0
    return jnp.where(zero_B, 0, jnp.sqrt(jnp.where(zero_B, 1, square_B)))


def _l1(a: _Inputs) -> jax.Array:
    return jnp.mean(jnp.abs(_residual(a)), axis=1)


def _huber(a: _Inputs) -> jax.Array:
    """Written as r^2 / (sqrt(r^2 + c^2) + c), which keeps its digits when r is far below c."""
    residual_Bd = _residual(a)
    d = residual_Bd.shape[1]
    forms = {"d": HUBER_RATE * d, "sqrt_d": HUBER_RATE * d**0.5}
    c = forms[a.huber_c] if isinstance(a.huber_c, str) else a.huber_c
    square_B = jnp.sum(jnp.square(residual_Bd), axis=1)
    return square_B / (jnp.sqrt(square_B + c * c) + c) / d


def _path_distance(a: _Inputs) -> jax.Array:
    return _distance(a, path.predicted_data(a.x_t, a.v, a.t_B))


def _step_distance(a: _Inputs) -> jax.Array:
    return _distance(a, a.x0 + a.v)


def _distance(a: _Inputs, x: jax.Array) -> jax.Array:
    assert a.distance is not None
    distance_B = a.distance(x, a.x1)
    if distance_B.shape != a.t_B.shape:
        raise ValueError(f"the distance must return {a.t_B.shape}, got {distance_B.shape}")
    return distance_B.astype(x.dtype)


LOSSES: dict[str, Callable[[_Inputs], jax.Array]] = {
    "l2": _l2,
    "half_sum": _half_sum,
    "root_l2": _root_l2,
    "l1": _l1,
    "huber": _huber,
    "lpips": _path_distance,
    "lpips_divt": lambda a: _path_distance(a) / (1 - a.t_B),
    "lpips_huber": lambda a: a.t_B * _huber(a) + _path_distance(a),
    "lpips_huber_divt": lambda a: a.t_B * _huber(a) + _path_distance(a) / (1 - a.t_B),
    "distill_lpips": _step_distance,
    "distill_lpips_l2": lambda a: _step_distance(a) + _l2(a),
    "distill_lpips_l1": lambda a: _step_distance(a) + _l1(a),
}
WEIGHTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "uniform": lambda t, snr: jnp.ones_like(t),
    "snr": lambda t, snr: snr,
    "snr_inv": lambda t, snr: 1 / snr,
    "snr+1": lambda t, snr: snr + 1,
    "karras": lambda t, snr: snr + 4,
    "truncated_snr": lambda t, snr: jnp.maximum(snr, 1),
    "1mt": lambda t, snr: jnp.square(1 - t),
}
