"""Where images come from: the config, arrays in memory, ArrayRecord, files and folders.

Dimensions: R rows, F frames, H height, W width, C channels, N images.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import logging
import pathlib
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import draws as draws_lib, embedded, files, prepared
from .pipeline import DataError
from .text import held_out

logger = logging.getLogger("scanax")

SOURCES = ("embedded", "moving_digits", "files", "tfds")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Image data.

    Attributes:
      source: "embedded" (8 x 8 digits), "moving_digits" (clips of them: ``MovingDigits``), "files"
        or "tfds".
      path, eval_path: files: a folder or zip whose folders are the classes, or an .npy, .npz
        or idx file; an empty eval_path holds some out.
      labels_path, eval_labels_path: the labels of an .npy or idx file; "" for an idx file
        named ...images-idx3... means the same name with ...labels-idx1...
      name, data_dir, split, eval_split: tfds; an empty eval_split holds some out.
      image_key, label_key: tfds: features; .npz: arrays. An empty label_key: no classes.
      eval_fraction: images held out, by the SHA-256 of their pixels.
      channels: 1 (grey) or 3 (RGB; grey ones are repeated).
      image_size: side of the square that images are resized to (the shorter side) and cropped
        to (the middle); 0 if all have the same size already.
      in_memory: decode once into memory; tfds may decode when needed instead.
      threads: batches made at the same time; more of them help when images are decoded.
      flip: mirror half of the training images.
      crop_padding: pad by so many pixels and crop at random; 0 for none.
      resized_crop: smallest area of the random resized crop; 0 for none.
      rand_augment, magnitude: operations per image (0 for none), and their strength, 0 to 10.
      erasing: probability of random erasing.
      mixup, cutmix: alpha of their Beta distributions, 0 for none; half of the images get
        either if both are on.
      label_smoothing: of the targets.
      dequantise: add uniform noise within a grey level.
      seed: of the order and the augmentation.
    """

    source: str
    path: str
    eval_path: str
    labels_path: str
    eval_labels_path: str
    name: str
    data_dir: str
    split: str
    eval_split: str
    image_key: str
    label_key: str
    eval_fraction: float
    channels: int
    image_size: int
    in_memory: bool
    threads: int
    flip: bool
    crop_padding: int
    resized_crop: float
    rand_augment: int
    magnitude: float
    erasing: float
    mixup: float
    cutmix: float
    label_smoothing: float
    dequantise: bool
    seed: int

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(
                f"data.source must be one of {', '.join(SOURCES)}; got {self.source!r}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels must be 1 or 3, got {self.channels}")
        for name in ("resized_crop", "erasing", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("image_size", "crop_padding", "rand_augment", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must not be negative, got {getattr(self, name)}")
        if self.threads < 1:
            raise ValueError(f"data.threads must be at least 1, got {self.threads}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction must be in (0, 1), got {self.eval_fraction}")
        if not self.in_memory and self.source != "tfds":
            raise ValueError("data.in_memory=false needs data.source=tfds: see prepare.py")
        if self.source == "moving_digits":
            for name in ("image_size", *_PICTURES_ONLY):
                if getattr(self, name):
                    raise ValueError(f"data.{name} is for pictures, not for clips: set it to 0")
            if self.channels != 1:
                raise ValueError("data.source=moving_digits is grey: set data.channels=1")

    @property
    def soft_targets(self) -> bool:
        return bool(self.mixup or self.cutmix or self.label_smoothing)


# Augmentations that know height and width only, or would change where a digit moves.
_PICTURES_ONLY = ("flip", "crop_padding", "resized_crop", "rand_augment", "erasing")
_PICTURES_ONLY += ("mixup", "cutmix", "label_smoothing")


class Images(Protocol):
    """Images, or clips, by number, without augmentation."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [R, H, W, C] or clips [R, F, H, W, C], uint8, and labels [R] int32."""
        ...


class InMemory:
    """Images as one array.

    Args:
      images: [N, H, W, C] uint8.
      labels: [N] int32.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        digest = hashlib.sha256(np.ascontiguousarray(images).data)
        digest.update(labels.tobytes())
        self.identity = {"images": len(images), "fingerprint": digest.hexdigest()[:16]}

    def __len__(self) -> int:
        return len(self.images)

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[numbers], self.labels[numbers]


class OnDisk:
    """Images of a TFDS dataset, read and decoded when asked for."""

    def __init__(self, records: prepared.Records, config: ImageConfig):
        self._records, self._config = records, config
        self.identity = {"images": len(records), **records.identity}

    def __len__(self) -> int:
        return len(self._records)

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = self._config
        records = self._records.take(numbers.tolist())
        found = [_fit(np.asarray(r[c.image_key]), c, f"{c.name}/{c.split}") for r in records]
        labels = [int(r[c.label_key]) if c.label_key else 0 for r in records]
        return _stack(found, f"{c.name}/{c.split}"), np.asarray(labels, np.int32)


class MovingDigits:
    """Clips of digits that move straight on; the label is the direction, whatever the digit.

    A digit of 8 x 8 pixels begins anywhere in a frame of 16 x 16 and moves by ``SPEED`` pixels
    from frame to frame along a row, a column or a diagonal; what leaves on one side comes back on
    the other. No frame tells the direction, nor do the frames without their order. All is a
    function of the clip's number.

    Args:
      digits: [N, 8, 8, 1] uint8.
    """

    FRAMES, SIDE, SPEED, STARTS = 4, 16, 2, 8
    DIRECTIONS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
    _STEPS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # down, right

    def __init__(self, digits: np.ndarray):
        self._digits = digits
        digest = hashlib.sha256(np.ascontiguousarray(digits).data).hexdigest()[:16]
        self.identity = {"clips": len(self), "fingerprint": digest}

    def __len__(self) -> int:
        return len(self._digits) * len(self.DIRECTIONS) * self.STARTS

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        side, digit = self.SIDE, self._digits.shape[1]
        labels = (numbers // len(self._digits) % len(self.DIRECTIONS)).astype(np.int32)
        start_R2 = (draws_lib.uniform(0, numbers, 2) * side).astype(np.int64)
        step_R2 = self.SPEED * np.asarray(self._STEPS)[labels]
        corner_RF2 = start_R2[:, None] + np.arange(self.FRAMES)[:, None] * step_R2[:, None]
        place_RF2D = (corner_RF2[..., None] + np.arange(digit)) % side
        clips = np.zeros((len(numbers), self.FRAMES, side, side, 1), np.uint8)
        row, frame = np.ogrid[: len(numbers), : self.FRAMES, :1, :1][:2]
        rows, columns = place_RF2D[:, :, 0, :, None], place_RF2D[:, :, 1, None, :]
        clips[row, frame, rows, columns] = self._digits[numbers % len(self._digits)][:, None]
        return clips, labels


def read(c: ImageConfig) -> tuple[Images, Images, tuple[str, ...]]:
    """Training images, evaluation images, and the names of the classes."""
    if c.source == "tfds":
        return _read_tfds(c)
    if c.source == "moving_digits":
        parts = _hold_out(*embedded.digits(), c.eval_fraction)
        train, evaluation = (MovingDigits(part.images) for part in parts)
        return train, evaluation, MovingDigits.DIRECTIONS
    if c.source == "embedded":
        images, labels = embedded.digits()
        classes = tuple("0123456789")
        images = np.stack([_fit(image, c, "digits") for image in images])
    else:
        images, labels, classes = _read_files(c, c.path, c.labels_path)
    if c.source == "files" and c.eval_path:
        evaluation, eval_labels, eval_classes = _read_files(c, c.eval_path, c.eval_labels_path)
        if not set(eval_classes) <= set(classes):
            more = sorted(set(eval_classes) - set(classes))
            raise DataError(f"data.eval_path has classes that data.path has not: {more[:5]}")
        numbers = np.asarray([classes.index(name) for name in eval_classes], np.int32)
        parts = InMemory(images, labels), InMemory(evaluation, numbers[eval_labels])
    else:
        parts = _hold_out(images, labels, c.eval_fraction)
    return *parts, classes


def _hold_out(images: np.ndarray, labels: np.ndarray, fraction: float) -> tuple[InMemory, InMemory]:
    held = np.asarray([held_out(image.tobytes(), fraction) for image in images])
    if held.all() or not held.any():
        raise DataError(
            f"data.eval_fraction={fraction} holds {held.sum()} of {len(held)} images out: set"
            " data.eval_path or another fraction"
        )
    return InMemory(images[~held], labels[~held]), InMemory(images[held], labels[held])


def _read_files(
    c: ImageConfig, path: str, labels_path: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images, labels and names of the classes."""
    found = files.find(path)
    if len(found) == 1 and not found[0].name.lower().endswith(files.IMAGE_SUFFIXES):
        images, labels = _read_arrays(c, found[0], labels_path)
        classes = tuple(str(i) for i in range(int(labels.max(initial=0)) + 1))
        return _fit_all(images, c, found[0].name), labels, classes
    found = [f for f in found if f.name.lower().endswith(files.IMAGE_SUFFIXES)]
    if not found:
        raise DataError(f"data.path {path} holds no images ({', '.join(files.IMAGE_SUFFIXES)})")
    names = [pathlib.PurePath(f.path).parts[0] if "/" in f.path else "" for f in found]
    classes = tuple(sorted(set(names)))
    for name in classes:
        if names.count(name) == 1 and len(found) > 1:
            raise DataError(
                f"data.path {path}: class folder {name!r} holds one image; a class needs at least"
                " two, one of them to evaluate on: add images or remove the folder"
            )
    shown = tqdm(found, desc=path, unit="image", disable=None, leave=False)
    decoded = [_fit(files.decode_image(file, c.channels), c, file.name) for file in shown]
    images = _stack(decoded, path)
    numbers = {name: i for i, name in enumerate(classes)}
    logger.info("%s: %s images of %d classes", path, f"{len(images):,}", len(classes))
    return images, np.asarray([numbers[name] for name in names], np.int32), classes


def _read_arrays(
    c: ImageConfig, file: files.File, labels_path: str
) -> tuple[np.ndarray, np.ndarray]:
    images = files.read_array(file, c.image_key)
    if ".npz" in file.name:
        labels = files.read_array(file, c.label_key) if c.label_key else None
    else:
        if not labels_path and "images-idx3" in file.name:
            labels_path = file.name.replace("images-idx3", "labels-idx1")
        labels = files.read_array(files.find(labels_path)[0]) if labels_path else None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise DataError(
            f"{file.name} must hold uint8 images [N, H, W] or [N, H, W, C], not"
            f" {images.dtype} {images.shape}"
        )
    if labels is None:
        labels = np.zeros(len(images))
    if labels.shape != (len(images),) or labels.min(initial=0) < 0:
        raise DataError(f"{file.name}: {len(images)} images, but labels of shape {labels.shape}")
    return images.reshape(*images.shape[:3], -1), labels.astype(np.int32)


def _read_tfds(c: ImageConfig) -> tuple[Images, Images, tuple[str, ...]]:
    records = prepared.Records(c.name, c.data_dir, c.split)
    for key in filter(None, (c.image_key, c.label_key)):
        if key not in records.features:
            raise DataError(
                f"dataset {c.name!r} has no feature {key!r}; it has"
                f" {', '.join(sorted(records.features))}"
            )
    classes = tuple(records.features[c.label_key].names) if c.label_key else ("",)
    train = OnDisk(records, c)
    if c.eval_split:
        evaluation = OnDisk(prepared.Records(c.name, c.data_dir, c.eval_split), c)
        if c.in_memory:
            return _load(train), _load(evaluation), classes
        return train, evaluation, classes
    if not c.in_memory:
        raise DataError("data.in_memory=false needs data.eval_split, for example train[90%:]")
    whole = _load(train)
    return *_hold_out(whole.images, whole.labels, c.eval_fraction), classes


def _load(images: Images) -> InMemory:
    return InMemory(*images.take(np.arange(len(images))))


def _fit_all(images: np.ndarray, c: ImageConfig, name: str) -> np.ndarray:
    fits = not c.image_size or images.shape[1:3] == (c.image_size, c.image_size)
    if fits and images.shape[-1] == c.channels:
        return images
    return np.stack([_fit(image, c, name) for image in images])


def _fit(image: np.ndarray, c: ImageConfig, name: str) -> np.ndarray:
    """[H, W, C] in the channels and size of the config."""
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 1 and c.channels == 3:
        image = np.repeat(image, 3, axis=-1)
    if image.shape[-1] != c.channels:
        raise DataError(f"{name} has {image.shape[-1]} channels, data.channels is {c.channels}")
    size = c.image_size
    if not size or image.shape[:2] == (size, size):
        return image
    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = max(size, round(width * scale)), max(size, round(height * scale))
    picture = Image.fromarray(image if c.channels == 3 else image[..., 0])
    resized = np.asarray(picture.resize(shape, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size].reshape(size, size, c.channels)


def _stack(images: Sequence[np.ndarray], name: str) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DataError(
            f"{name} holds images of {len(shapes)} sizes, e.g. {sorted(shapes)[:2]}: set"
            " data.image_size"
        )
    return np.stack(images)
