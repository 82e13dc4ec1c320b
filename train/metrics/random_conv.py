"""Features of random convolutions: they know edges and textures, and no data set.

Dimensions: N images, H height, W width, C channels, F filters, D features.

Three convolutions 3 x 3 with ReLU, averages of 2 x 2 between them. After each ReLU, mean and
standard deviation of every filter over the image are features: D = 2 (32 + 64 + 128) = 448.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .batches import in_batches

FILTERS = (32, 64, 128)


def weights(seed: int) -> tuple[np.ndarray, ...]:
    """Kernels [3, 3, C, F] float32 of every layer, He-normal, for three channels."""
    generator = np.random.default_rng(seed)
    sizes = zip((3, *FILTERS[:-1]), FILTERS, strict=True)
    draw = lambda c, f: generator.standard_normal((3, 3, c, f), np.float32)
    return tuple(draw(c, f) * np.float32(np.sqrt(2 / (9 * c))) for c, f in sizes)


def features(kernels: tuple[np.ndarray, ...], images: np.ndarray) -> np.ndarray:
    """[N, H, W, 1 or 3] uint8 -> [N, D] float32; grey images are repeated.

    Raises:
      ValueError: for other channels, or images with a side below 4.
    """
    if images.shape[-1] not in (1, 3) or min(images.shape[1:3]) < 4:
        raise ValueError(
            f"random_conv needs images of 4 x 4 or more with 1 or 3 channels, got"
            f" {images.shape[1:]}"
        )
    return in_batches(lambda part: _features(kernels, part), images)


@jax.jit
def _features(kernels: tuple[jax.Array, ...], images: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32) / 127.5 - 1
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    found = []
    for i, kernel in enumerate(kernels):
        x = _halved(x) if i else x
        # Whole float32 products on every device: the same features everywhere.
        x = jax.lax.conv_general_dilated(
            *(x, kernel, (1, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x)
        found += [jnp.mean(x, axis=(1, 2)), jnp.std(x, axis=(1, 2))]
    return jnp.concatenate(found, axis=-1)


def _halved(x_NHWC: jax.Array) -> jax.Array:
    """Means of 2 x 2; a last row or column without a partner is left out."""
    rows, columns = x_NHWC.shape[1] // 2, x_NHWC.shape[2] // 2
    x = x_NHWC[:, : 2 * rows, : 2 * columns]
    return jnp.mean(x.reshape(len(x), rows, 2, columns, 2, -1), axis=(2, 4))
