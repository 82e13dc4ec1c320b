"""The short convolution in plain JAX: the definition, on every platform.

Dimensions: B batch, T tokens, D channels, which may be several dimensions, W taps.
"""

import jax
import jax.numpy as jnp


def short_convolution(x_BTD, kernel_WD, history_BWD, segments_BT, *, activation: str | None):
    """As ``api.py`` has it; None for a history of zeros, and for a single segment."""
    taps, tokens = kernel_WD.shape[0], x_BTD.shape[1]
    if history_BWD is None:
        before = (x_BTD.shape[0], taps - 1, *x_BTD.shape[2:])
        history_BWD = jnp.zeros(before, x_BTD.dtype)
    padded = jnp.concatenate([history_BWD, x_BTD], axis=1)
    if segments_BT is not None:
        padded_segments = jnp.pad(segments_BT, ((0, 0), (taps - 1, 0)), mode="edge")
    y_BTD = jnp.zeros_like(x_BTD)
    for i in range(taps):
        tap_BTD = padded[:, i : i + tokens]
        if segments_BT is not None:
            same_BT = padded_segments[:, i : i + tokens] == segments_BT
            same = jnp.expand_dims(same_BT, range(2, x_BTD.ndim))
            tap_BTD = jnp.where(same, tap_BTD, 0)
        y_BTD = y_BTD + kernel_WD[i][None, None] * tap_BTD
    return jax.nn.silu(y_BTD) if activation == "silu" else y_BTD
