"""What all three U-Nets are made of: the residual block and self-attention over the pixels.

Dimensions: B batch, H height, W width, C channels, E embedding, N heads, T tokens (pixels).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers import DType, attend, dropout
from .layers import Conv, GroupNorm, Init
from .resample import Taps, downsample, upsample


@dataclasses.dataclass(frozen=True)
class Style:
    """In what the blocks of the networks differ.

    Attributes:
      eps: of the norms.
      skip_scale: factor on every sum of a branch and what it went around.
      adaptive: the embedding scales and shifts the second norm's output; else it is added to its
        input.
      silu_embedding: each block takes silu of the embedding (NCSN++); else it comes with it.
      project: the way around a block that changes the size has a projection, even if the number
        of channels stays.
      taps: of the filter that halves and doubles.
      start, last, qkv: how layers, the last of a branch, and queries, keys and values begin.
    """

    eps: float
    skip_scale: float
    adaptive: bool
    silu_embedding: bool
    project: bool
    taps: Taps
    start: Init
    last: Init
    qkv: Init
    dropout: float
    dtype: DType
    param_dtype: DType

    def conv(self, features: int, size: int, init: Init, name: str) -> Conv:
        return Conv(features, size, init, self.dtype, self.param_dtype, name=name)

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(self.eps, self.dtype, self.param_dtype, name=name)


class Residual(nn.Module):
    """norm, silu, (resample,) conv, embedding, norm, silu, dropout, conv; and around it (BigGAN).

    Attributes:
      features: channels that come out.
      resample: "up", "down" or "".
      heads: of self-attention behind it; 0 for none.
    """

    style: Style
    features: int
    resample: str = ""
    heads: int = 0

    @nn.compact
    def __call__(self, x_BHWC, embedding_BE, keys_B=None) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', features]; ``keys_B``: of the dropout, one per row."""
        s = self.style
        resample = {"up": upsample, "down": downsample, "": lambda x, taps: x}[self.resample]
        h = resample(nn.silu(s.norm("norm0")(x_BHWC)), s.taps)
        h = s.conv(self.features, 3, s.start, "conv0")(h)
        if s.silu_embedding:
            embedding_BE = nn.silu(embedding_BE)
        width = self.features * (2 if s.adaptive else 1)
        shift = s.conv(width, 1, s.start, "affine")(embedding_BE)[:, None, None]
        if s.adaptive:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = nn.silu(s.norm("norm1")(h) * (1 + scale) + shift)
        else:
            h = nn.silu(s.norm("norm1")(h + shift))
        h = s.conv(self.features, 3, s.last, "conv1")(dropout(h, s.dropout, keys_B))
        x = resample(x_BHWC, s.taps)
        if x.shape[-1] != self.features or (self.resample and s.project):
            x = s.conv(self.features, 1, s.start, "skip")(x)
        x = (x + h) * s.skip_scale
        return Attention(s, self.heads, name="attention")(x) if self.heads else x


class Attention(nn.Module):
    """Softmax self-attention over all pixels, and around it."""

    style: Style
    heads: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        s = self.style
        batch, *sides, channels = x_BHWC.shape
        qkv = s.conv(3 * channels, 1, s.qkv, "qkv")(s.norm("norm")(x_BHWC))
        split = lambda y: y.reshape(batch, -1, self.heads, channels // self.heads)
        o_BTNK = attend(*map(split, jnp.split(qkv, 3, axis=-1)))
        o_BHWC = o_BTNK.reshape(batch, *sides, channels)
        return (x_BHWC + s.conv(channels, 1, s.last, "proj")(o_BHWC)) * s.skip_scale
