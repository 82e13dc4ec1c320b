"""What the blocks of EDM's networks are told: noise, class and augmentation as one vector.

Dimensions: B batch, F features of the noise, E embedding, K classes, A augmentation.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from .config import DhariwalUNetConfig, EDMConfig, SongUNetConfig
from .embedding import Fourier, positional
from .layers import Conv, Init

FOURIER_SCALE = 16.0


class SongEmbedding(nn.Module):
    """SongUNet's: class and augmentation are added to the features of the noise."""

    config: SongUNetConfig
    start: Init

    @nn.compact
    def __call__(self, noise_B, class_BK, augment_BA) -> jax.Array:
        """[B] labels, [B, K] or None, [B, A] or None -> [B, E]."""
        c = self.config
        size = c.channel_mult_noise * c.model_channels
        if c.embedding_type == "fourier":
            found = Fourier(size, FOURIER_SCALE, c.param_dtype, name="noise")(noise_B)
        else:
            found = positional(noise_B, size, endpoint=True)
        e_BF = jnp.concatenate(found, axis=-1).astype(c.dtype)
        linear = functools.partial(_linear, c, self.start)
        if c.num_classes:
            class_BK = _given(class_BK, e_BF, c.num_classes) * c.num_classes**0.5
            e_BF = e_BF + linear(size, ("classes", "rates"), "label")(class_BK)
        if c.augment_dim:
            augment = linear(size, ("augment", "rates"), "augment", bias=False)
            e_BF = e_BF + augment(_given(augment_BA, e_BF, c.augment_dim))
        width = c.channel_mult_emb * c.model_channels
        hidden = nn.silu(linear(width, ("rates", "mlp"), "layer0")(e_BF))
        return nn.silu(linear(width, ("mlp", "embed"), "layer1")(hidden))


class ADMEmbedding(nn.Module):
    """ADM's: the augmentation is added to the features, the class behind both layers."""

    config: DhariwalUNetConfig
    start: Init

    @nn.compact
    def __call__(self, noise_B, class_BK, augment_BA) -> jax.Array:
        """[B] labels, [B, K] or None, [B, A] or None -> [B, E]."""
        c = self.config
        sin, cos = positional(noise_B, c.model_channels, endpoint=False)
        e_BF = jnp.concatenate([cos, sin], axis=-1).astype(c.dtype)
        linear = functools.partial(_linear, c)
        if c.augment_dim:
            zero = Init(nn.initializers.zeros)
            augment = linear(zero, c.model_channels, ("augment", "rates"), "augment", bias=False)
            e_BF = e_BF + augment(_given(augment_BA, e_BF, c.augment_dim))
        width = c.channel_mult_emb * c.model_channels
        hidden = nn.silu(linear(self.start, width, ("rates", "mlp"), "layer0")(e_BF))
        embedding_BE = linear(self.start, width, ("mlp", "embed"), "layer1")(hidden)
        if c.num_classes:
            normal = Init(nn.initializers.normal(1.0))
            label = linear(normal, width, ("classes", "embed"), "label", bias=False)
            embedding_BE = embedding_BE + label(_given(class_BK, e_BF, c.num_classes))
        return nn.silu(embedding_BE)


def _linear(c: EDMConfig, init: Init, features: int, axes, name: str, bias: bool = True) -> Conv:
    return Conv(features, 1, init, c.dtype, c.param_dtype, axes, bias, name=name)


def _given(x: jax.Array | None, e_BF: jax.Array, size: int) -> jax.Array:
    """x, or zeros [B, size]."""
    return jnp.zeros((e_BF.shape[0], size), e_BF.dtype) if x is None else x.astype(e_BF.dtype)
