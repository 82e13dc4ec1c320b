"""Layers of the U-Nets: convolution, group norm, dropout of one key per example.

Dimensions: B batch, H height, W width, C channels, G groups, I channels in, O channels out.
"""

from collections.abc import Iterator
import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels import convolution_3x3
from ...kernels.dtypes import accumulation_dtype
from ..layers import DType, Initializer, parameter, product_of_rows


class Init(NamedTuple):
    """How a layer begins.

    Attributes:
      kernel: initialiser of its kernel.
      bias: the bias is uniform in +- bias / sqrt(numbers that an output is a sum of).
    """

    kernel: Initializer
    bias: float = 0.0


class Conv(nn.Module):
    """Convolution with a square kernel; of size 1 it is a product with a matrix [I, O].

    That form is for vectors as well as for images.
    """

    features: int
    size: int
    start: Init
    dtype: DType
    param_dtype: DType
    axes: tuple[str, str] = ("embed", "mlp")
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, stride: int = 1, pad: int | None = None) -> jax.Array:
        """[B, H, W, I] -> [B, H / stride, W / stride, O], or [..., I] -> [..., O] for size 1.

        ``pad`` zeros lie around the image; None: as many as keep its size.
        """
        size, channels = self.size, x.shape[-1]
        window = () if size == 1 else (size, size)
        axes, shape = ("conv",) * len(window) + self.axes, (*window, channels, self.features)
        kernel = parameter(self, "kernel", self.start.kernel, axes, shape, self.param_dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if size == 1:
            y = product_of_rows(x, kernel, None)
        elif size == 3 and stride == 1 and pad is None:
            y = convolution_3x3(x, kernel)
        else:
            pad = size // 2 if pad is None else pad
            dimensions = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=dimensions
            )
        if not self.bias:
            return y
        init = _uniform(self.start.bias / (size * size * channels) ** 0.5)
        bias_O = parameter(self, "bias", init, axes[-1:], shape[-1:], self.param_dtype)
        return y + jnp.expand_dims(bias_O.astype(self.dtype), range(y.ndim - 1))


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over a group's channels and all pixels.

    There are min(32, C / 4) groups (Wu and He 2018); sums are in float32 or better.
    """

    eps: float
    dtype: DType
    param_dtype: DType

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C] in ``dtype``."""
        batch, channels = x_BHWC.shape[0], x_BHWC.shape[-1]
        axes, shape, init = ("embed",), (channels,), nn.initializers
        scale_C = parameter(self, "scale", init.ones, axes, shape, self.param_dtype)
        bias_C = parameter(self, "bias", init.zeros, axes, shape, self.param_dtype)
        x = x_BHWC.astype(accumulation_dtype(x_BHWC.dtype))
        groups = min(32, channels // 4)

        def mean(x):
            """Of every group, at each of its channels: [B, 1, 1, C]."""
            mean_BC = jnp.mean(x, axis=(1, 2))
            mean_BG = jnp.mean(mean_BC.reshape(batch, groups, -1), axis=-1)
            return jnp.repeat(mean_BG, channels // groups, axis=-1)[:, None, None]

        x = x - mean(x)
        factor = jax.lax.rsqrt(mean(x * x) + self.eps)
        wide = lambda y: y.astype(x.dtype)[None, None, None]
        return (x * (factor * wide(scale_C)) + wide(bias_C)).astype(self.dtype)


def block_keys(keys_B: jax.Array | None) -> Iterator[jax.Array | None]:
    """The rows' keys [B] for one block after the other; Nones for None."""
    for number in itertools.count():
        fold_in = lambda key, number=number: jax.random.fold_in(key, number)
        yield None if keys_B is None else jax.vmap(fold_in)(keys_B)


def check_images(c, x_BHWC: jax.Array) -> None:
    """Raises a ValueError unless the images have the config's size and channels."""
    if x_BHWC.ndim != 4 or x_BHWC.shape[1:] != (c.image_size, c.image_size, c.channels):
        raise ValueError(
            f"images [B, H, W, C] have shape {x_BHWC.shape}, but model.image_size is"
            f" {c.image_size} and model.channels {c.channels}: set them to what the data has"
        )


def _uniform(bound: float) -> Initializer:
    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init if bound else nn.initializers.zeros
