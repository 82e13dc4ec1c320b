"""LPIPS (Zhang et al. 2018): a perceptual distance of VGG16's features, with weights from a file.

Dimensions: B examples, H height, W width, C channels.

  d(x, y) = sum over 5 layers, mean over pixels, of  w . (f(x) / ||f(x)|| - f(y) / ||f(y)||)^2

with the features f behind the last ReLU of each of VGG16's five blocks, normalised over channels,
and learned weights w >= 0. The weights are not part of this package. ``load_lpips`` reads a .npz
or .safetensors file with these arrays, as torchvision and the package ``lpips`` (0.1) name them:

  features.N.weight [out, in, 3, 3], features.N.bias [out]
      N = 0, 2 | 5, 7 | 10, 12, 14 | 17, 19, 21 | 24, 26, 28, the convolutions of the five blocks,
      64, 128, 256, 512 and 512 channels wide
  lin0.model.1.weight, ..., lin4.model.1.weight [1, channels of the block, 1, 1]

Other arrays, such as the classifier of VGG16, are left out. The widths are those of the file.
"""

from collections.abc import Mapping
import pathlib
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from . import path as path_lib
from .perceptual import Distance, average_pool, check_images, convolve

BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
EPS = 1e-10  # added to the norms
# ImageNet's mean and standard deviation, in terms of images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
VARIANTS = ("lpips", "piq")


def load_lpips(path: str | pathlib.Path, variant: str = "lpips") -> Distance:
    """LPIPS with the weights of a file.

    Args:
      path: of a .npz or .safetensors file, as at the top of the module.
      variant: "lpips", as RF and SlimFlow use it (max pooling); or "piq", as 2-RF++ does (average
        pooling). Both take images in [-1, 1], of 16 pixels or more; resizing is
        ``perceptual.resized``'s business.

    Raises:
      ValueError: if there is no such file, an array is missing or of the wrong shape, or the
        variant is unknown.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"LPIPS needs VGG16's weights, and there is no file {file}")
    try:
        return lpips(_read(file), variant)
    except ValueError as error:
        raise ValueError(f"LPIPS weights {file}: {error}") from error


def lpips(tensors: Mapping[str, Any], variant: str = "lpips") -> Distance:
    """The same with arrays by name.

    Raises:
      ValueError: as :func:`load_lpips`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    pool = _max_pool if variant == "lpips" else average_pool
    blocks, weights = _check(tensors)

    def features(x):
        shift, scale = (jnp.asarray(c, x.dtype)[None, None, None] for c in (SHIFT, SCALE))
        x = (x - shift) / scale
        for i, block in enumerate(blocks):
            x = pool(x) if i else x
            for kernel, bias in block:
                bias = jnp.asarray(bias, x.dtype)[None, None, None]
                x = jax.nn.relu(convolve(x, jnp.asarray(kernel, x.dtype)) + bias)
            yield _normalise(x)

    def distance(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
        check_images(x_BHWC, y_BHWC, 3, 2 ** (len(BLOCKS) - 1))
        both = path_lib.wide(jnp.concatenate([x_BHWC, y_BHWC]))
        total_B = jnp.zeros(x_BHWC.shape[:1], both.dtype)
        for w_C, f in zip(weights, features(both), strict=True):
            w = jnp.asarray(w_C, f.dtype)[None, None, None]
            f, g = jnp.split(f, 2)
            total_B += jnp.mean(jnp.sum(w * jnp.square(f - g), axis=3), axis=(1, 2))
        return total_B

    return distance


def _normalise(x):
    """x / (||x|| + eps) over channels; where x is 0, and the norm has no gradient, that is 0."""
    square = jnp.sum(jnp.square(x), axis=3, keepdims=True)
    zero = square == 0
    return x / (jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square))) + EPS)


def _max_pool(x):
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")


def _check(tensors: Mapping[str, Any]):
    """Blocks of (kernel HWIO, bias), and the layers' weights [C]."""
    names = [f"features.{n}.{kind}" for block in BLOCKS for n in block for kind in _KINDS]
    names += [f"lin{i}.model.1.weight" for i in range(len(BLOCKS))]
    missing = [name for name in names if name not in tensors]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"missing {', '.join(missing[:3])}{more}")
    blocks, weights, width = [], [], 3
    for i, block in enumerate(BLOCKS):
        layers = []
        for n in block:
            kernel, bias = (np.asarray(tensors[f"features.{n}.{kind}"]) for kind in _KINDS)
            out = kernel.shape[0] if kernel.ndim else 0
            _expect(f"features.{n}.weight", kernel, (out, width, 3, 3))
            _expect(f"features.{n}.bias", bias, (out,))
            layers.append((kernel.transpose(2, 3, 1, 0), bias))
            width = out
        weight = np.asarray(tensors[f"lin{i}.model.1.weight"])
        _expect(f"lin{i}.model.1.weight", weight, (1, width, 1, 1))
        blocks.append(layers)
        weights.append(weight.reshape(width))
    return blocks, weights


_KINDS = ("weight", "bias")


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a .npz archive ({error})") from error
    if file.suffix == ".safetensors":
        try:
            import safetensors.numpy
        except ImportError:
            raise ValueError("reading it needs pip install 'scanax[interop]'") from None
        try:
            return safetensors.numpy.load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"not a .safetensors file ({error})") from error
    raise ValueError("the name must end in .npz or .safetensors")
