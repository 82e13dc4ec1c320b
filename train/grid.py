"""Images as one picture, for people.

Dimensions: N images, H height, W width, C channels.
"""

import math
import pathlib

import numpy as np
from PIL import Image

from .quantise import quantise

VISIBLE = 64  # pixels of a side: smaller images are enlarged to at least that
GAP = 2  # pixels between images
GREY = 128  # of the gaps


def image_grid(
    images: np.ndarray, columns: int | None = None, scale: int | None = None
) -> np.ndarray:
    """Images in rows, left to right and top to bottom, with a gap between them.

    Args:
      images: [N, H, W, 1 or 3], uint8, or floats in [-1, 1] (clipped to that).
      columns: images in a row; None for as many columns as rows, or one more.
      scale: each pixel becomes scale x scale; None for the least with 64 pixels on both sides.

    Returns:
      [H', W', 1 or 3] uint8.

    Raises:
      ValueError: for no images, another shape or dtype, NaN, or numbers below 1.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not images.size or images.shape[-1] not in (1, 3):
        raise ValueError(f"a grid needs images [N, H, W, 1 or 3], got shape {images.shape}")
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number)) if columns is None else columns
    scale = math.ceil(VISIBLE / min(height, width)) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    levels = images if images.dtype == np.uint8 else quantise(images).images
    levels = levels.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = min(columns, number)
    rows, step = -(-number // columns), (height * scale + GAP, width * scale + GAP)
    shape = (rows * step[0] - GAP, columns * step[1] - GAP, channels)
    grid = np.full(shape, GREY, np.uint8)
    for i, image in enumerate(levels):
        top, left = i // columns * step[0], i % columns * step[1]
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def write_png(
    path: str | pathlib.Path,
    images: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
) -> None:
    """Writes :func:`image_grid` of the images as PNG."""
    grid = image_grid(images, columns, scale)
    Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(path, "PNG")
