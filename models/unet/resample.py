"""Halving and doubling images with a short separable filter.

Dimensions: B batch, H height, W width, C channels, L taps.

The filter is symmetric and of even length: (1, 1) repeats pixels and takes the mean of 2 x 2, and
(1, 3, 3, 1) is the smooth one of NCSN++ (Song et al. 2021). Outside of the image are zeros.
Everything is a sum of shifted images, and no convolution with one group per channel, which
accelerators and CPUs alike are slow at.
"""

import jax
import jax.numpy as jnp

Taps = tuple[float, ...]
NEAREST: Taps = (1.0, 1.0)


def check_taps(name: str, taps: Taps) -> None:
    """Raises a ValueError unless the filter is symmetric, of even length, and sums to something."""
    if not taps or len(taps) % 2 or tuple(taps) != tuple(reversed(taps)) or sum(taps) == 0:
        raise ValueError(
            f"model.{name} must be symmetric, of even length and without a sum of 0, such as"
            f" (1, 3, 3, 1); got {tuple(taps)}"
        )


def upsample(x_BHWC: jax.Array, taps: Taps) -> jax.Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]: zeros between pixels, then the filter, with a sum of 4."""
    return _double(_double(x_BHWC, taps, 1), taps, 2)


def downsample(x_BHWC: jax.Array, taps: Taps) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C]: the filter, which sums to 1, then every other pixel."""
    pad = len(taps) // 2 - 1
    return _filter(_filter(x_BHWC, taps, 1, pad, stride=2), taps, 2, pad, stride=2)


def smooth(x_BHWC: jax.Array, taps: Taps, pad: int) -> jax.Array:
    """The filter, which sums to 1, over the image with ``pad`` zeros around it.

    [B, H, W, C] -> [B, H + 2 pad - L + 1, W + 2 pad - L + 1, C].
    """
    return _filter(_filter(x_BHWC, taps, 1, pad, stride=1), taps, 2, pad, stride=1)


def _filter(x: jax.Array, taps: Taps, axis: int, pad: int, stride: int) -> jax.Array:
    """y_o = sum_l taps_l x_{stride o + l - pad} along an axis."""
    length = x.shape[axis] + 2 * pad
    x = _padded(x, axis, pad)
    starts = length - len(taps) + 1
    parts = (
        jax.lax.slice_in_dim(x, i, i + starts, stride, axis) * (tap / sum(taps))
        for i, tap in enumerate(taps)
    )
    return _sum(parts)


def _double(x: jax.Array, taps: Taps, axis: int) -> jax.Array:
    """y_{2m+r} = sum_d 2 taps_{2d+r+p} x_{m-d} along an axis, with p = L/2 - 1."""
    size, p = x.shape[axis], len(taps) // 2 - 1
    reach = (len(taps) // 2) // 2
    padded = _padded(x, axis, reach)
    phases = []
    for r in range(2):
        shifts = [d for d in range(-reach, reach + 1) if 0 <= 2 * d + r + p < len(taps)]
        parts = (
            jax.lax.slice_in_dim(padded, reach - d, reach - d + size, 1, axis)
            * (2 * taps[2 * d + r + p] / sum(taps))
            for d in shifts
        )
        phases.append(_sum(parts))
    y = jnp.stack(phases, axis=axis + 1)
    return y.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _padded(x: jax.Array, axis: int, pad: int) -> jax.Array:
    if not pad:
        return x
    return jnp.pad(x, [(pad, pad) if i == axis else (0, 0) for i in range(x.ndim)])


def _sum(parts) -> jax.Array:
    total = next(parts)
    for part in parts:
        total = total + part
    return total
