"""Features of a noise label: sines and cosines, at fixed rates or at random ones.

Dimensions: B batch, F rates (half of the features).

Angles are computed in float32 or better whatever the network computes in: 999 t in bfloat16 would
know times in steps of 4/1000.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ..layers import DType, parameter

MAX_PERIOD = 10_000.0


def positional(label_B: jax.Array, size: int, endpoint: bool) -> tuple[jax.Array, jax.Array]:
    """sin and cos [B, size / 2] of the label at rates from 1 down to 1e-4.

    The last rate is 1e-4 with ``endpoint`` (DDPM, EDM's SongUNet), one step above it without
    (ADM).
    """
    half = size // 2
    wide = accumulation_dtype(label_B.dtype)
    step_F = jnp.arange(half, dtype=wide) / (half - int(endpoint))
    rate_F = jnp.exp(-math.log(MAX_PERIOD) * step_F)
    angle_BF = label_B.astype(wide)[:, None] * rate_F[None]
    return jnp.sin(angle_BF), jnp.cos(angle_BF)


class Fourier(nn.Module):
    """Random rates (Tancik et al. 2020) that are not trained: their gradient is 0.

    They are a parameter all the same, since a checkpoint is worth nothing without them.
    """

    size: int
    scale: float
    param_dtype: DType

    @nn.compact
    def __call__(self, label_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B] -> sin and cos [B, size / 2] of 2 pi rate label, rates from N(0, scale^2)."""
        init, axes, shape = nn.initializers.normal(self.scale), ("rates",), (self.size // 2,)
        rate_F = parameter(self, "frequencies", init, axes, shape, self.param_dtype)
        wide = accumulation_dtype(label_B.dtype)
        rate_F = jax.lax.stop_gradient(rate_F).astype(wide)
        angle_BF = label_B.astype(wide)[:, None] * rate_F[None] * (2 * math.pi)
        return jnp.sin(angle_BF), jnp.cos(angle_BF)
