"""LightNet in place of attention in a diffusion transformer (DiT): the backbone of image models.

Dimensions: B batch, H height, W width, C channels, T tokens, D hidden.

Blocks are conditioned on time and class through adaLN-Zero (Peebles and Xie 2023); MD-TPE stands
where DiT adds sines of the places. The output begins at 0.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ..layers import Dense, RMSNorm, parameter
from . import lrpe
from .block import Patches, block_of, positions, zero_dense
from .config import LightNetDiTConfig

FREQUENCIES = 256  # of the time embedding, sines and cosines together
TIME_SCALE = 1000.0  # times in [0, 1] are embedded as DiT's steps 0 to 1000

# DiT's shapes (Peebles and Xie 2023, table 1): hidden_size, num_hidden_layers, num_heads.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class LightNetDiT(nn.Module):
    """Image to image of the same size, at a time, for a class."""

    config: LightNetDiTConfig

    @nn.compact
    def __call__(self, x, t_B, label_B=None, *, keys=None) -> jax.Array:
        """Velocity, noise or score: what it is trained to be.

        Args:
          x: [B, H, W, C]; the patch must divide both sides.
          t_B: [B] times in [0, 1].
          label_B: [B] int classes, ``num_classes`` for "no class"; None where there are none.
          keys: of all backbones; not needed here, where nothing is random.

        Returns:
          [B, H, W, C], or [B, H, W, 2 C] with ``learn_sigma``, float32 or better.

        Raises:
          ValueError: if the patch does not divide the image, or labels are missing or too many.
        """
        del keys
        c = self.config
        if (label_B is None) != (c.num_classes == 0):
            raise ValueError(f"model.num_classes is {c.num_classes}: labels must fit that")
        channels = x.shape[-1] * (2 if c.learn_sigma else 1)
        x = Patches(c, c.patch_size, name="patches")(x)
        grid = x.shape[1:-1]
        if c.tpe != "none":
            x, _ = positions(c, len(grid), "tpe")(x)
        x_BTD = x.reshape(x.shape[0], -1, x.shape[-1])
        condition_BD = self._condition(t_B, label_B)
        place_1TM = lrpe.places(grid)
        for i in range(c.num_hidden_layers):
            block = block_of(c)(c, False, name=f"layers_{i}")
            x_BTD, _ = block(x_BTD, place_1TM, condition_BD=condition_BD)
        norm = RMSNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, False, name="norm")
        modulation = zero_dense(c, 2 * c.hidden_size, "mlp", name="modulation")
        shift, scale = jnp.split(modulation(nn.silu(condition_BD))[:, None], 2, axis=-1)
        x_BTD = norm(x_BTD) * (1 + scale) + shift
        features = math.prod(c.patch_size) * channels
        x_BTF = zero_dense(c, features, "pixels", name="output")(x_BTD)
        y = join_patches(x_BTF, grid, c.patch_size)
        return y.astype(accumulation_dtype(y.dtype))

    def _condition(self, t_B, label_B):
        """[B, D] of time and class."""
        c = self.config
        init = nn.initializers.normal(0.02)
        dense = lambda axes, name: Dense(
            c.hidden_size, axes, init, c.dtype, c.param_dtype, bias=True, name=name
        )
        hidden = nn.silu(dense(("rates", "embed"), "time_in")(time_features(t_B)))
        condition_BD = dense(("embed", "mlp"), "time_out")(hidden)
        if label_B is None:
            return condition_BD
        axes, shape = ("classes", "embed"), (c.num_classes + 1, c.hidden_size)
        classes = parameter(self, "classes", init, axes, shape, c.param_dtype)
        return condition_BD + classes[label_B].astype(c.dtype)


def time_features(t_B: jax.Array) -> jax.Array:
    """Cosines and sines of the time at rates from 1 to 1e-4: [B, FREQUENCIES] float32."""
    half = FREQUENCIES // 2
    rate_F = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle_BF = TIME_SCALE * t_B.astype(jnp.float32)[:, None] * rate_F[None]
    return jnp.concatenate([jnp.cos(angle_BF), jnp.sin(angle_BF)], axis=-1)


def join_patches(x_BTF: jax.Array, grid: tuple[int, ...], patch: tuple[int, ...]) -> jax.Array:
    """[B, T, p_1 ... p_M C] -> [B, m_1, ..., m_M, C]: the inverse of cutting."""
    axes = len(grid)
    x = x_BTF.reshape(x_BTF.shape[0], *grid, *patch, -1)
    order = [0, *(i for s in range(axes) for i in (1 + s, 1 + axes + s)), 1 + 2 * axes]
    sides = (n * p for n, p in zip(grid, patch, strict=True))
    return x.transpose(order).reshape(x.shape[0], *sides, -1)
