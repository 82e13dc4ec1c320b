"""MD-LRPE: queries and keys turned by their place on a grid (Qin et al. 2024, LightNet).

Dimensions: B batch, T tokens (extra ones, then the grid, row by row), H heads, K width of a
head, M axes of the grid, E = ceil(K / M) angles per axis.

A token at place (n_1, ..., n_M) has the angles concat_s(n_s * theta), cut to K, axis by axis. After

  cosine form   x -> (x cos, x sin), twice as wide
  rotate form   (x_c, x_{c + K/2}) turned by angle c, as wide as before

the product of a query and a key depends on the difference of their places alone (in the cosine
form, on its size along each axis: left and right look the same, and MD-TPE tells them apart).
With weights that differ between channels, as the additive recurrence has, that is exact for the
cosine form, whose two halves share a channel's weight; the rotate form mixes two channels.
"""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

BASE = 10_000.0
THETA_TYPES = {  # rotate or cosine form; which part of the channels is turned
    1: ("rotate", "all"),
    2: ("rotate", "low"),
    3: ("rotate", "high"),
    4: ("cosine", "all"),
    5: ("cosine", "low"),
    6: ("cosine", "high"),
}


def fixed_theta(theta_type: int, width: int) -> np.ndarray:
    """The table of a published type: [1, width] for 4 to 6, [1, width / 2] for 1 to 3, float64.

    Rate c is BASE^(-2 c / width), so they fall from 1; "low" keeps the slower half of them and
    "high" the faster one, with zeros for the others.

    Raises:
      ValueError: for another type, or an odd width where pairs of channels are turned.
    """
    if theta_type not in THETA_TYPES:
        raise ValueError(f"theta_type must be one of {sorted(THETA_TYPES)}, got {theta_type}")
    form, part = THETA_TYPES[theta_type]
    if form == "rotate" and width % 2:
        raise ValueError(f"the rotate form pairs channels: width {width} is odd")
    width = width // 2 if form == "rotate" else width
    theta_E = BASE ** (-np.arange(width) / width * (1 if form == "rotate" else 2))
    half = width // 2
    if part == "low":
        theta_E[:half] = 0
    elif part == "high":
        theta_E[half:] = 0
    return theta_E[None]


def grid_theta(heads: int, width: int, axes: int) -> np.ndarray:
    """Rates for a grid, shared by its axes: [H, ceil(width / axes)], different for every head."""
    per_axis = -(-width // axes)
    exponent = np.arange(heads * per_axis) / (heads * per_axis)
    return (BASE**-exponent).reshape(heads, per_axis)


def angles(
    theta_HE: jax.Array, grid: Sequence[int], width: int, *, extra: int = 0, offset: int = 0
) -> jax.Array:
    """The angles of every token: [extra + N, H, width], 0 for the extra ones.

    Args:
      theta_HE: [H, E] rates, or [1, E] for all heads.
      grid: its size along each axis, N tokens in all.
      width: of the angles: K for the cosine form, K / 2 for the rotate form.
      extra: tokens before the grid that have no place (class tokens, conditions).
      offset: added to every index: the tokens already seen, when decoding.

    Raises:
      ValueError: if theta has not ceil(width / axes) rates.
    """
    per_axis = -(-width // len(grid))
    if theta_HE.shape[-1] != per_axis:
        raise ValueError(
            f"theta has {theta_HE.shape[-1]} rates per head; width {width} over"
            f" {len(grid)} axes needs {per_axis}"
        )
    index_NM = np.indices(tuple(grid)).reshape(len(grid), -1).T
    place_NM = jnp.asarray(index_NM, theta_HE.dtype) + jnp.asarray(offset, theta_HE.dtype)
    angle_NHME = place_NM[:, None, :, None] * theta_HE[None, :, None]
    angle_NHK = angle_NHME.reshape(*angle_NHME.shape[:2], -1)[..., :width]
    return jnp.pad(angle_NHK, ((extra, 0), (0, 0), (0, 0)))


def cosine(x_BTHK: jax.Array, angle_THK: jax.Array) -> jax.Array:
    """(x cos, x sin): [B, T, H, 2 K]."""
    cos, sin = _cos_sin(x_BTHK, angle_THK)
    return jnp.concatenate([x_BTHK * cos, x_BTHK * sin], axis=-1)


def rotate(x_BTHK: jax.Array, angle_THE: jax.Array) -> jax.Array:
    """Channels c and c + K / 2 turned by angle c of K / 2: [B, T, H, K]."""
    cos, sin = _cos_sin(x_BTHK, angle_THE)
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _cos_sin(x, angle):
    return jnp.cos(angle)[None].astype(x.dtype), jnp.sin(angle)[None].astype(x.dtype)


def check_grid(grid: Sequence[int], tokens: int, extra: int = 0) -> None:
    """Raises a ValueError if the grid has not as many places as there are tokens."""
    if min(grid, default=0) < 1 or math.prod(grid) + extra != tokens:
        raise ValueError(
            f"a grid of {' x '.join(map(str, grid))} and {extra} extra tokens make"
            f" {math.prod(grid) + extra} tokens; got {tokens}"
        )
