"""NCSN++ and DDPM++ (Song et al. 2021), the networks of rectified flow and SlimFlow.

Dimensions: B batch, H height, W width, C channels, F features of the time, E embedding.

Submodules are numbered as in the published code, in the order in which they are used. Only blocks
of BigGAN's type are here, with features of the time in every one.
"""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from .blocks import Attention, Residual, Style
from .config import NCSNppConfig
from .embedding import Fourier, positional
from .layers import Conv, GroupNorm, Init, block_keys, check_images
from .resample import downsample, smooth, upsample

LABEL_SCALE = 999.0  # of the time
LEAST_TIME = 1e-3  # in training; below it, logarithm and quotient of the label keep its value


class NCSNpp(nn.Module):
    """Velocity of an image at a time."""

    config: NCSNppConfig

    def __call__(self, x_BHWC, t_B, label_B=None, *, keys=None) -> jax.Array:
        """The velocity dX_t/dt; t = 0 is noise and t = 1 data.

        Args:
          x_BHWC: [B, H, W, C] images at time t; H and W are ``image_size``.
          t_B: [B] times in [0, 1]. With "fourier" or ``scale_by_sigma``, times below 1e-3 count as
            1e-3: training has none, and ln 0 is none.
          label_B: None: there are no classes.
          keys: [B] PRNG keys of the dropout, one per row; None (evaluation) drops nothing.

        Returns:
          [B, H, W, C], float32 or better.

        Raises:
          ValueError: for labels, or images of another size.
        """
        c = self.config
        if label_B is not None:
            raise ValueError("NCSN++ has no classes: leave the labels out, or take another family")
        if c.embedding_type == "fourier" or c.scale_by_sigma:
            t_B = jnp.maximum(t_B, LEAST_TIME)
        return self.raw(x_BHWC, LABEL_SCALE * t_B, keys=keys)

    @nn.compact
    def raw(self, x_BHWC, label_B, features_BF=None, keys=None) -> jax.Array:
        """The published network, by the noise label that it is fed.

        Args:
          x_BHWC, keys: as above.
          label_B: [B], 999 t.
          features_BF: [B, F] features of the label, to be taken as they are; None computes them.

        Returns:
          As above.
        """
        c = self.config
        check_images(c, x_BHWC)
        s, number = _style(c), itertools.count()
        own_keys = block_keys(keys)
        name = lambda kind: f"{kind}_{next(number)}"
        conv = functools.partial(Conv, dtype=c.dtype, param_dtype=c.param_dtype)
        block_of: Any = nn.remat(Residual) if c.remat else Residual
        attention_of: Any = nn.remat(Attention) if c.remat else Attention

        def block(h, width, resample=""):
            module = block_of(s, width, resample, name=name("block"))
            return module(h, embedding_BE, next(own_keys))

        def attend(h):
            return attention_of(s, 1, name=name("attention"))(h)

        def image(h):
            h = nn.silu(GroupNorm(s.eps, c.dtype, c.param_dtype, name=name("norm"))(h))
            axes = ("embed", "pixels")
            return conv(c.channels, 3, s.last, axes=axes, name=name("output"))(h)

        embedding_BE = self._embedding(label_B, features_BF, conv, name)
        x = x_BHWC.astype(c.dtype)
        axes = ("pixels", "mlp")
        h = conv(c.model_channels, 3, s.start, axes=axes, name=name("stem"))(x)
        skips, pyramid = [h], x
        for level, (size, width) in enumerate(c.levels):
            if level:
                h = block(h, h.shape[-1], "down")
                if c.progressive_input == "input_skip":
                    pyramid = downsample(pyramid, s.taps)
                    project = conv(h.shape[-1], 1, s.start, axes=axes, name=name("combine"))
                    h = project(pyramid) + h
                elif c.progressive_input == "residual":
                    axes = axes if level == 1 else ("embed", "mlp")
                    shrink = conv(h.shape[-1], 3, s.start, axes=axes, name=name("pyramid"))
                    smoothed = smooth(pyramid, s.taps, len(s.taps) // 2)
                    h = pyramid = (shrink(smoothed, stride=2, pad=0) + h) * s.skip_scale
                skips.append(h)
            for _ in range(c.num_blocks):
                h = block(h, width)
                h = attend(h) if size in c.attn_resolutions else h
                skips.append(h)
        h = block(attend(block(h, h.shape[-1])), h.shape[-1])
        y = None
        for level, (size, width) in reversed([*enumerate(c.levels)]):
            for _ in range(c.num_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), width)
            h = attend(h) if size in c.attn_resolutions else h
            if c.progressive == "output_skip":
                y = image(h) if y is None else upsample(y, s.taps) + image(h)
            if level:
                h = block(h, width, "up")
        y = image(h) if y is None else y
        y = y.astype(accumulation_dtype(y.dtype))
        return y / label_B.astype(y.dtype)[:, None, None, None] if c.scale_by_sigma else y

    def _embedding(self, label_B, features_BF, conv, name) -> jax.Array:
        """[B, E] of the label; every block takes silu of it."""
        c, width = self.config, self.config.model_channels
        if c.embedding_type == "fourier":
            size = 2 * width
            fourier = Fourier(size, c.fourier_scale, c.param_dtype, name=name("fourier"))
            found = fourier(jnp.log(label_B))
        else:
            found = positional(label_B, width, endpoint=True)
        features_BF = jnp.concatenate(found, axis=-1) if features_BF is None else features_BF
        init = Init(_scaled(1.0))
        first = conv(4 * width, 1, init, axes=("rates", "mlp"), name=name("time"))
        second = conv(4 * width, 1, init, axes=("mlp", "embed"), name=name("time"))
        return second(nn.silu(first(features_BF)))


def _style(c: NCSNppConfig) -> Style:
    return Style(
        eps=1e-6,
        skip_scale=0.5**0.5 if c.skip_rescale else 1.0,
        adaptive=False,
        silu_embedding=True,
        project=True,
        taps=c.taps,
        start=Init(_scaled(1.0)),
        last=Init(_scaled(c.init_scale or 1e-10)),
        qkv=Init(_scaled(0.2)),  # 0.1 for each of the three, which share a kernel here
        dropout=c.dropout,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
    )


def _scaled(scale: float):
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
