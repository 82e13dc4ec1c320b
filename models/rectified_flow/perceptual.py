"""Perceptual distances that need no weights, and the resizing that distances are used with.

Dimensions: B examples, H height, W width, C channels, I and O channels of a convolution.

A distance is a function (x, y) -> [B] of images [B, H, W, C] in [-1, 1]; the losses take any.
LPIPS, whose weights the user brings, is in lpips.py.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import path

Distance = Callable[[jax.Array, jax.Array], jax.Array]


def conv_distance(kernels: Sequence[jax.Array | np.ndarray]) -> Distance:
    """mean (tanh(K * x) - tanh(K * y))^2, over the scales that there are kernels for.

    Args:
      kernels: [3, 3, C, O], of the images, of the images at half the size, at a quarter, ...; with
        one, the distance is at full size only. Borders are padded with zeros.

    Raises:
      ValueError: if there is no kernel or one is no [3, 3, C, O]; when called, if the images have
        other channels or are too small to be halved.
    """
    if not kernels or any(kernel.ndim != 4 for kernel in kernels):
        raise ValueError("a convolutional distance needs kernels [3, 3, C, O], one per scale")

    def distance(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
        check_images(x_BHWC, y_BHWC, kernels[0].shape[2], 2 ** (len(kernels) - 1))
        x, y = path.wide(x_BHWC), path.wide(y_BHWC)
        total_B = jnp.zeros(x.shape[:1], x.dtype)
        for scale, kernel in enumerate(kernels):
            if scale:
                x, y = average_pool(x), average_pool(y)
            features = lambda z, k=kernel: jnp.tanh(convolve(z, jnp.asarray(k, z.dtype)))
            total_B += jnp.mean(jnp.square(features(x) - features(y)), axis=(1, 2, 3))
        return total_B / len(kernels)

    return distance


def random_conv_distance(
    seed: int = 0, *, channels: int = 3, features: int = 32, scales: int = 3
) -> Distance:
    """``conv_distance`` with fixed random kernels: a stand-in where LPIPS has no weights.

    It sees edges and their orientation at several scales, and nothing that was learned. The same
    seed gives the same distance everywhere.
    """
    if min(channels, features, scales) < 1:
        raise ValueError(
            f"channels, features and scales must be positive: {channels}, {features}, {scales}"
        )
    draw = np.random.Generator(np.random.PCG64(seed))
    shape = (scales, 3, 3, channels, features)
    return conv_distance(list(draw.normal(0, (9 * channels) ** -0.5, shape).astype(np.float32)))


def resized(distance: Distance, size: int, *, align_corners: bool) -> Distance:
    """The distance of images resized to size x size.

    2-RF++ compares at 224 (align_corners=False), SlimFlow at 64 (align_corners=True).
    """

    def of_resized(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
        resize = lambda x: resize_bilinear(x, size, align_corners=align_corners)
        return distance(resize(x_BHWC), resize(y_BHWC))

    return of_resized


def resize_bilinear(x_BHWC: jax.Array, size: int, *, align_corners: bool) -> jax.Array:
    """[B, size, size, C], interpolated linearly between pixels, without smoothing.

    Args:
      x_BHWC: images.
      size: height and width of the result.
      align_corners: the corners' centres stay where they are; else the corners themselves do
        (half-pixel centres), and what lies outside is the border's.

    Raises:
      ValueError: if size is below 1 or x is no [B, H, W, C].
    """
    if size < 1 or x_BHWC.ndim != 4:
        raise ValueError(f"resizes [B, H, W, C] to a size >= 1; got {x_BHWC.shape} and {size}")
    x = path.wide(x_BHWC)
    weights = lambda length: jnp.asarray(_bilinear(length, size, align_corners), x.dtype)
    rows, columns = weights(x.shape[1]), weights(x.shape[2])
    precision = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ph,bhwc->bpwc", rows, x, precision=precision)
    return jnp.einsum("qw,bpwc->bpqc", columns, x, precision=precision)


def convolve(x_BHWI: jax.Array, kernel_33IO: jax.Array) -> jax.Array:
    """3 x 3 cross-correlation, zeros around the image: [B, H, W, O]."""
    return jax.lax.conv_general_dilated(
        x_BHWI,
        kernel_33IO,
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def average_pool(x_BHWC: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x_BHWC, 0.0, jax.lax.add, window, window, "VALID") / 4


def check_images(x_BHWC: jax.Array, y_BHWC: jax.Array, channels: int, least: int) -> None:
    """Raises a ValueError unless both are [B, H, W, channels], as large as ``least``."""
    shape = x_BHWC.shape
    if shape != y_BHWC.shape or len(shape) != 4 or shape[3] != channels:
        raise ValueError(
            f"the distance is of two [B, H, W, {channels}]; got {shape} and {y_BHWC.shape}"
        )
    if min(shape[1:3]) < least:
        raise ValueError(f"the distance needs images of {least} pixels or more; got {shape[1:3]}")


def _bilinear(length: int, size: int, align_corners: bool) -> np.ndarray:
    """[size, length] rows of two weights."""
    if align_corners:
        at = np.arange(size) * ((length - 1) / max(size - 1, 1))
    else:
        at = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length)[None]))
