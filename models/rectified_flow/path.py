"""The straight path between noise and data, and what a velocity on it predicts.

Dimensions: B examples; the axes behind B are of any number.

  X_t = t X_1 + (1 - t) X_0,   dX_t/dt = X_1 - X_0     (Liu, Gong and Liu 2022, section 2.1)

t = 0 is noise (X_0), t = 1 is data (X_1); a velocity points from noise to data.
"""

import jax

from ...kernels.dtypes import accumulation_dtype


def interpolate(x0: jax.Array, x1: jax.Array, t_B: jax.Array) -> jax.Array:
    """X_t = t X_1 + (1 - t) X_0: [B, ...], float32 or better.

    Raises:
      ValueError: if the shapes of x0 and x1 differ, or t is not [B].
    """
    check_pair(x0, x1)
    x0, x1 = wide(x0), wide(x1)
    t = along(t_B, x0)
    return t * x1 + (1 - t) * x0


def target(x0: jax.Array, x1: jax.Array) -> jax.Array:
    """X_1 - X_0, what the velocity is trained to be: [B, ...], float32 or better."""
    check_pair(x0, x1)
    return wide(x1) - wide(x0)


def predicted_data(x: jax.Array, v: jax.Array, t_B: jax.Array) -> jax.Array:
    """X_1 as a velocity v at X_t = x sees it: X_t + (1 - t) v."""
    x = wide(x)
    return x + (1 - along(t_B, x)) * v.astype(x.dtype)


def predicted_noise(x: jax.Array, v: jax.Array, t_B: jax.Array) -> jax.Array:
    """X_0 as a velocity v at X_t = x sees it: X_t - t v."""
    x = wide(x)
    return x - along(t_B, x) * v.astype(x.dtype)


def along(t_B: jax.Array, x: jax.Array) -> jax.Array:
    """A number per example, shaped [B, 1, ...] to meet x [B, ...], in x's dtype.

    Raises:
      ValueError: if t is not [B].
    """
    if t_B.shape != x.shape[:1]:
        raise ValueError(f"t must be one number per example, {x.shape[:1]}; got {t_B.shape}")
    return t_B.astype(x.dtype).reshape(t_B.shape + (1,) * (x.ndim - 1))


def wide(x: jax.Array) -> jax.Array:
    """x in float32, or as it is if that is more."""
    return x.astype(accumulation_dtype(x.dtype))


def check_pair(x0: jax.Array, x1: jax.Array) -> None:
    """Raises a ValueError if noise and data have different shapes."""
    if x0.shape != x1.shape:
        raise ValueError(f"noise {x0.shape} and data {x1.shape} must have the same shape")
