"""MD-LRPE: queries and keys turned by their place on a grid (Qin et al. 2024, LightNet).

Dimensions: B batch (1: the same for all rows), T tokens (extra ones, then the grid, row by row),
H heads, K width of a head, M axes of the grid, E = ceil(K / M) angles per axis.

A token at place (n_1, ..., n_M) has the angles concat_s(n_s * theta), cut to K, axis by axis. After

  cosine form   x -> (x cos, x sin), twice as wide
  rotate form   (x_c, x_{c + K/2}) turned by angle c, as wide as before

the product of a query and a key depends on the difference of their places alone (in the cosine
form, on its size along each axis: left and right look the same, and MD-TPE tells them apart).
Keys of the additive recurrence are turned after their softmax over time, channel by channel. (An
implementation that keeps one state per channel turns a pair while it is written and lets each
member decay at its own rate, and loses that property in the rotate form; here both forms keep it.)
"""

from collections.abc import Sequence

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


def theta_table(theta_type: int, heads: int, width: int, axes: int) -> np.ndarray:
    """Rates [H or 1, E] of a type for a grid: 0 is ``grid_theta``, the others are published.

    Args:
      width: K, of a head.
    """
    if theta_type == 0:
        return grid_theta(heads, width, axes)
    rotated = THETA_TYPES.get(theta_type, ("",))[0] == "rotate"
    per_axis = 2 * -(-(width // 2) // axes) if rotated else -(-width // axes)
    return fixed_theta(theta_type, per_axis)


def is_rotation(theta_type: int) -> bool:
    """Whether a type turns pairs of channels; the others take the cosine form."""
    return THETA_TYPES.get(theta_type, ("cosine",))[0] == "rotate"


def grid_theta(heads: int, width: int, axes: int) -> np.ndarray:
    """Rates for a grid, shared by its axes: [H, ceil(width / axes)], different for every head."""
    per_axis = -(-width // axes)
    exponent = np.arange(heads * per_axis) / (heads * per_axis)
    return (BASE**-exponent).reshape(heads, per_axis)


def places(grid: Sequence[int], extra: int = 0) -> np.ndarray:
    """Place of every token, row by row: [1, extra + N, M] int32.

    ``extra`` tokens before the grid (class tokens, conditions) are at 0, which turns nothing.
    """
    place_NM = np.indices(tuple(grid), np.int32).reshape(len(grid), -1).T
    return np.pad(place_NM, ((extra, 0), (0, 0)))[None]


def angles(theta_HE: jax.Array, place_BTM: jax.Array | np.ndarray, width: int) -> jax.Array:
    """The angles of every token: [B, T, H, width], in theta's dtype.

    Args:
      theta_HE: [H, E] rates, or [1, E] for all heads.
      place_BTM: [B, T, M] whole numbers.
      width: of the angles: K for the cosine form, K / 2 for the rotate form.

    Raises:
      ValueError: if theta has not ceil(width / M) rates.
    """
    axes = place_BTM.shape[-1]
    per_axis = -(-width // axes)
    if theta_HE.shape[-1] != per_axis:
        raise ValueError(
            f"theta has {theta_HE.shape[-1]} rates per head; width {width} over"
            f" {axes} axes needs {per_axis}"
        )
    place_BT1M1 = jnp.asarray(place_BTM, theta_HE.dtype)[:, :, None, :, None]
    angle_BTHME = place_BT1M1 * theta_HE[None, None, :, None]
    return angle_BTHME.reshape(*angle_BTHME.shape[:3], -1)[..., :width]


def turn(x_BTHK: jax.Array, angle_BTHE: jax.Array, rotation: bool) -> jax.Array:
    """Queries, or keys that are features: [B, T, H, K], or [B, T, H, 2 K] in the cosine form."""
    return rotate(x_BTHK, angle_BTHE) if rotation else cosine(x_BTHK, angle_BTHE)


def turn_additive(
    q_BTHK: jax.Array, k_BTHK: jax.Array, angle_BTHE: jax.Array, rotation: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, 2 K], key logits [B, T, H, K] and ``k_factor`` of the additive kernels.

    Every weight has two factors. The products are those of the turned query with the turned softmax
    of the keys. A rotation is split into a cosine and a sine part, since a factor cannot mix
    channels:
    <q', R w> = <q', cos w> + <J^T q', sin w>, where J is the quarter turn.
    """
    if rotation:
        a, b = jnp.split(rotate(q_BTHK, angle_BTHE), 2, axis=-1)
        q = jnp.concatenate([a, b, b, -a], axis=-1)
        angle_BTHE = jnp.concatenate([angle_BTHE, angle_BTHE], axis=-1)
    else:
        q = cosine(q_BTHK, angle_BTHE)
    factor = jnp.concatenate([jnp.cos(angle_BTHE), jnp.sin(angle_BTHE)], axis=-1)
    return q, k_BTHK, jnp.broadcast_to(factor, q.shape)


def cosine(x_BTHK: jax.Array, angle_BTHK: jax.Array) -> jax.Array:
    """(x cos, x sin): [B, T, H, 2 K]."""
    cos, sin = _cos_sin(x_BTHK, angle_BTHK)
    return jnp.concatenate([x_BTHK * cos, x_BTHK * sin], axis=-1)


def rotate(x_BTHK: jax.Array, angle_BTHE: jax.Array) -> jax.Array:
    """Channels c and c + K / 2 turned by angle c of K / 2: [B, T, H, K]."""
    cos, sin = _cos_sin(x_BTHK, angle_BTHE)
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _cos_sin(x, angle):
    return jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)


def check_places(place_BTM: jax.Array | None, batch: int, tokens: int) -> None:
    """Raises a ValueError unless every token has a place."""
    shape = None if place_BTM is None else place_BTM.shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, batch) or shape[1] != tokens:
        raise ValueError(
            f"MD-LRPE needs places [1 or {batch}, {tokens}, axes], as many as there are tokens: the"
            f" product of the grid, and extra tokens; got {'none' if shape is None else shape}"
        )
