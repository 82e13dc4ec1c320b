"""Image augmentation on batches, with noise that is a function of (seed, draw) alone.

Dimensions: B images; H, W height and width in pixels; C = 1 or 3 channels; K classes; N random
operations, or attempts at a box. Images are [B, H, W, C] uint8 unless a function says otherwise.

Row b of every result depends on image b and (seed, draws[b]) only, not on the batch around it;
draws [B] int64 are the numbers of the examples (see ``draws``). Every function derives its own
stream from the seed, so one seed serves all of them, but calling one twice repeats its noise.
Arguments are never written to. This is not a pipeline: which functions are applied, and in
which order, is the caller's choice.
"""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from . import draws as draws_lib

_ATTEMPTS = 10  # at a random box that fits
_BILINEAR = Image.Resampling.BILINEAR


def flip(images: np.ndarray, seed: int, draws: np.ndarray) -> np.ndarray:
    """Mirrors left and right with probability 1/2 -> [B, H, W, C]."""
    mirrored = _uniform(seed, "flip", draws, 1)[:, 0] < 0.5
    pixels = np.ascontiguousarray(images).view(f"V{images.shape[-1]}")  # moved as one piece
    result = pixels.copy()
    result[mirrored] = pixels[mirrored][:, :, ::-1]
    return result.view(np.uint8)


def crop(images: np.ndarray, padding: int, seed: int, draws: np.ndarray) -> np.ndarray:
    """Pads with zeros and crops back at a random place (He et al. 2016, for CIFAR) -> [B, H, W, C].

    Args:
      images: [B, H, W, C].
      padding: pixels on each side; the offsets are uniform over its 2 padding + 1 values.
    """
    B, H, W, C = images.shape
    padded = np.zeros((B, H + 2 * padding, W + 2 * padding, C), np.uint8)
    padded[:, padding : padding + H, padding : padding + W] = images
    top_B, left_B = _integers(_uniform(seed, "crop", draws, 2), 2 * padding + 1).T
    # Rows of W C bytes are copied whole.
    windows = np.lib.stride_tricks.sliding_window_view(
        padded.reshape(B, H + 2 * padding, -1), (H, W * C), axis=(1, 2)
    )
    return windows[np.arange(B), top_B, left_B * C].reshape(B, H, W, C)


def random_resized_crop(
    images: np.ndarray,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    seed: int,
    draws: np.ndarray,
) -> np.ndarray:
    """A random box, resized to a square (Szegedy et al. 2015) -> [B, size, size, C].

    The box has whole pixels. It is the first of ten attempts that fits; if none does, it is the
    largest central one with an allowed aspect. Resizing is Pillow's bilinear one, image by
    image: pixel centres at half-integers, nothing read outside the box, and where it shrinks,
    the triangle is as wide as an output pixel on each side, against aliasing.

    Args:
      images: [B, H, W, C].
      size: height and width of the result.
      scale: range of the box's share of the area; uniform.
      ratio: range of width / height; its logarithm is uniform.
    """
    B, H, W, C = images.shape
    fits_B, box_B4 = _boxes(_uniform(seed, "resized", draws, 2 * _ATTEMPTS + 2), H, W, scale, ratio)
    height, width = min(H, round(W / ratio[0])), min(W, round(H * ratio[1]))
    central = np.asarray([height, width, (H - height) // 2, (W - width) // 2])
    result = np.empty((B, size, size, C), np.uint8)
    for b, box in enumerate(np.where(fits_B[:, None], box_B4, central).tolist()):
        height, width, top, left = box
        image = _to_pillow(images[b, top : top + height, left : left + width])
        image = image.resize((size, size), _BILINEAR)
        result[b] = np.asarray(image).reshape(size, size, C)
    return result


def rand_augment(
    images: np.ndarray,
    num_ops: int,
    magnitude: float,
    seed: int,
    draws: np.ndarray,
    *,
    magnitude_std: float = 0.5,
) -> np.ndarray:
    """Random operations of one common magnitude (RandAugment, Cubuk et al. 2020) -> [B, H, W, C].

    Each of num_ops operations is drawn from the 14 of ``OPERATIONS`` with replacement and
    always applied. All grow stronger with the magnitude and change nothing at 0, except for
    autocontrast and equalize, which have none; the ranges are those of AutoAugment (Cubuk et
    al. 2019). Signs are random; pixels from outside the image are grey. Pillow does the work,
    image by image.

    Args:
      images: [B, H, W, C].
      num_ops: operations per image.
      magnitude: 0 .. 10.
      magnitude_std: of normal noise on the magnitude of each operation, clipped to 0 .. 10.
    """
    uniforms = _uniform(seed, "randaugment", draws, 4 * num_ops).reshape(-1, num_ops, 4)
    choice, sign, radius, angle = np.moveaxis(uniforms, 2, 0)
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller 1958
    strength_BN = np.clip(magnitude + magnitude_std * normal, 0, 10) / 10
    strength_BN = np.where(sign < 0.5, -strength_BN, strength_BN)
    operations = list(OPERATIONS.values())
    plans = zip(_integers(choice, len(operations)).tolist(), strength_BN.tolist(), strict=True)
    result = np.empty_like(images)
    for b, (chosen, strengths) in enumerate(plans):
        image = _to_pillow(images[b])
        for operation, strength in zip(chosen, strengths, strict=True):
            image = operations[operation](image, strength)
        result[b] = np.asarray(image).reshape(images.shape[1:])
    return result


def erase(images: np.ndarray, probability: float, seed: int, draws: np.ndarray) -> np.ndarray:
    """Fills a random box with noise (random erasing, Zhong et al. 2017) -> [B, H, W, C].

    The box covers 2% .. 33% of the area, uniform, with width / height between 0.3 and 3.3,
    uniform in the logarithm; whole pixels make small images differ a little. Its values are
    uniform over 0 .. 255. An image stays as it is when ten attempts at a box do not fit.

    Args:
      images: [B, H, W, C].
      probability: of erasing a box.
    """
    _, H, W, C = images.shape
    uniforms = _uniform(seed, "erase", draws, 2 * _ATTEMPTS + 3)
    fits_B, box_B4 = _boxes(uniforms, H, W, (0.02, 0.33), (0.3, 3.3))
    erased = fits_B & (uniforms[:, -1] < probability)
    inside = _inside(H, W, box_B4[erased])
    noise = _noise(seed, "fill", draws[erased], H * W * C, np.dtype("u1")).reshape(-1, H, W, C)
    result, changed = images.copy(), images[erased]
    np.copyto(changed, noise, where=_per_channel(inside, C))
    result[erased] = changed
    return result


def mixup_cutmix(
    images: np.ndarray,
    labels: np.ndarray,
    partner_images: np.ndarray,
    partner_labels: np.ndarray,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    switch: float,
    smoothing: float,
    seed: int,
    draws: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes each example with a partner (DeiT, Touvron et al. 2021).

    Mixup (Zhang et al. 2018) blends the images with weight lambda ~ Beta(mixup, mixup); CutMix
    (Yun et al. 2019) pastes a box of the partner with 1 - lambda of the area, lambda ~
    Beta(cutmix, cutmix), whose centre is uniform over the image; lambda is then the share of
    pixels that stay. The targets are blended with the same lambda. All of it is drawn per
    example. Partners are the caller's choice: for the same batches on any number of processes
    they must depend on the draw only.

    Args:
      images: [B, H, W, C] float32.
      labels: [B] int32.
      partner_images, partner_labels: likewise, what row b is mixed with; as they are, unmixed.
      num_classes: K.
      mixup, cutmix: parameters of the Beta distributions; 0 turns one off.
      switch: probability of CutMix if both are on.
      smoothing: share of the target's mass that is spread evenly over the K classes.

    Returns:
      Images [B, H, W, C] float32 and targets [B, K] float32, rows of which sum to 1.
    """
    (B, H, W, C), rows, keep_B = images.shape, np.arange(len(images)), np.ones(len(images))
    if mixup or cutmix:
        from scipy.special import betaincinv  # a third of a second to import

        choice, quantile, row, column = _uniform(seed, "mix", draws, 4).T
        cut = choice < (switch if mixup and cutmix else float(cutmix > 0))
        alpha = np.where(cut, cutmix, mixup)
        keep_B = betaincinv(alpha, alpha, quantile)
        side = np.where(cut, np.sqrt(1 - keep_B), 0)
        half_height, half_width = _integers(side, H) // 2, _integers(side, W) // 2
        top, left = _integers(row, H) - half_height, _integers(column, W) - half_width
        pasted = _inside(H, W, np.stack([2 * half_height, 2 * half_width, top, left], axis=1))
        weight = np.where(cut, 1, keep_B).astype(np.float32)[:, None, None, None]
        keep_B = np.where(cut, 1 - pasted.mean((1, 2)), keep_B)
        images = weight * images
        images += (1 - weight) * partner_images
        np.copyto(images, partner_images, where=_per_channel(pasted, C))
    targets = np.full((B, num_classes), smoothing / num_classes, np.float32)
    targets[rows, labels] += (1 - smoothing) * keep_B
    targets[rows, partner_labels] += (1 - smoothing) * (1 - keep_B)
    return images, targets


def to_float(images: np.ndarray, dequantise: bool, seed: int, draws: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] -> [B, H, W, C] float32.

    Args:
      images: [B, H, W, C].
      dequantise: add noise u, uniform in [0, 1), for densities (Theis et al. 2016): y = (x + u)
        / 128 - 1 for x / 127.5 - 1. u has 16 bits, so y is exact and floor(128 (y + 1)) is x.
    """
    result = np.divide(images, np.float32(128 if dequantise else 127.5), dtype=np.float32)
    if dequantise:
        bits = _noise(seed, "dequantise", draws, images[0].size, np.dtype("<u2"))
        result += np.multiply(bits, np.float32(2**-23), dtype=np.float32).reshape(images.shape)
    result -= np.float32(1)
    return result


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Output (x, y) is input (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, _BILINEAR, fillcolor="grey")


# (image, strength) -> image, strength in [-1, 1]; where a sign means nothing, |strength|
# counts. Translation is up to 150 pixels of AutoAugment's 331.
OPERATIONS: Mapping[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, s: image,
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "rotate": lambda image, s: image.rotate(30 * s, _BILINEAR, fillcolor="grey"),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - round(256 * abs(s))),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "shear_x": lambda image, s: _affine(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: _affine(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: _affine(image, (1, 0, s * image.width * 150 / 331, 0, 1, 0)),
    "translate_y": lambda image, s: _affine(image, (1, 0, 0, 0, 1, s * image.height * 150 / 331)),
}


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _boxes(
    uniforms: np.ndarray, H: int, W: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The first of N random boxes that fits: [B] bool, whether one does, and ``_inside``'s [B, 4].

    Of the uniforms, N are for areas, N for aspects (width / height) and 2 for the place.
    """
    N, rows = _ATTEMPTS, np.arange(len(uniforms))
    area_BN = H * W * (scale[0] + (scale[1] - scale[0]) * uniforms[:, :N])
    aspect_BN = ratio[0] * (ratio[1] / ratio[0]) ** uniforms[:, N : 2 * N]
    sides = np.sqrt(np.stack([area_BN / aspect_BN, area_BN * aspect_BN], axis=-1))
    sides_BN2, space = np.rint(sides).astype(np.int64), np.asarray([H, W])
    fits_BN = (sides_BN2 == np.clip(sides_BN2, 1, space)).min(-1)
    first_B = fits_BN.argmax(1)
    sides_B2 = sides_BN2[rows, first_B]
    corner_B2 = _integers(uniforms[:, 2 * N : 2 * N + 2], space - sides_B2 + 1)
    return fits_BN[rows, first_B], np.concatenate([sides_B2, corner_B2], axis=1)


def _inside(H: int, W: int, box_B4: np.ndarray) -> np.ndarray:
    """Pixels of an image in boxes (height, width, top, left) -> [B, H, W] bool."""
    height, width, top, left = box_B4.T[..., None]
    row_BH, column_BW = np.arange(H) - top, np.arange(W) - left
    in_rows_BH = (row_BH >= 0) & (row_BH < height)
    in_columns_BW = (column_BW >= 0) & (column_BW < width)
    return in_rows_BH[:, :, None] & in_columns_BW[:, None, :]


def _per_channel(mask: np.ndarray, C: int) -> np.ndarray:
    """[B, H, W] -> [B, H, W, C], in memory: broadcasting over so short an axis is slow."""
    return np.repeat(mask, C, axis=2).reshape(*mask.shape, C)


def _uniform(seed: int, name: str, draws: np.ndarray, count: int) -> np.ndarray:
    """[B, count] in [0, 1), of the stream ``name``."""
    return draws_lib.uniform(draws_lib.stream(seed, name), draws, count)


def _integers(uniforms: np.ndarray, end: int | np.ndarray) -> np.ndarray:
    """From [0, 1) to 0 .. end - 1."""
    return (uniforms * end).astype(np.int64)


def _noise(seed: int, name: str, draws: np.ndarray, count: int, dtype: np.dtype) -> np.ndarray:
    """Uniform integers of 1 or 2 bytes -> [B, count]; 6 bytes of each random number are used."""
    used, blocks = 6 // dtype.itemsize, -(-count * dtype.itemsize // 6)
    bits = (_uniform(seed, name, draws, blocks) * 2.0**48).astype("<i8")
    pieces = bits.view(dtype).reshape(len(draws), blocks, 8 // dtype.itemsize)[..., :used]
    return pieces.swapaxes(1, 2).reshape(len(draws), used * blocks)[:, :count]
