"""Images with classes: from a source to augmented float batches.

Dimensions: R rows, F frames, H height, W width, C channels.

A batch holds ``images`` [R, H, W, C], or clips [R, F, H, W, C], float32 in [-1, 1], ``labels``
[R] int32 (0 where the images have no classes) and, when training targets are soft, ``targets``
[R, classes] float32.
Images stay uint8 in memory, or compressed in ArrayRecord if ``in_memory`` is off.
"""

import dataclasses
import functools

import numpy as np

from . import augment, draws as draws_lib
from .image_sources import ImageConfig, Images, read
from .pipeline import Batch, Batches, DataError, eval_batch, order


class ImageSet:
    """The images of a config, read when first asked for."""

    def __init__(self, config: ImageConfig):
        self.config = config

    @functools.cached_property
    def parts(self) -> tuple[Images, Images, tuple[str, ...]]:
        """Training images, evaluation images, and the names of the classes."""
        train, evaluation, classes = read(self.config)
        shapes = {part.take(np.asarray([0]))[0].shape[1:] for part in (train, evaluation)}
        if len(shapes) > 1:
            raise DataError(
                f"training and evaluation images differ in size: {sorted(shapes)}; set"
                " data.image_size"
            )
        return train, evaluation, classes

    @property
    def num_classes(self) -> int:
        return len(self.parts[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) or (F, H, W, C) of a batch's images."""
        return self.parts[0].take(np.asarray([0]))[0].shape[1:]

    def train_batches(self, batch_size: int, process_index: int, process_count: int) -> Batches:
        source = Augmented(self.parts[0], self.config, self.num_classes, training=True)
        order = {"seed": self.config.seed, "threads": self.config.threads}
        return Batches(source, batch_size, process_index, process_count, **order)

    def eval_batch(self, size: int, index: int) -> Batch | None:
        source = Augmented(self.parts[1], self.config, self.num_classes, training=False)
        return eval_batch(source, size, index)


class Augmented:
    """Batches of images, augmented when training; a ``pipeline.Source``.

    Examples 2i and 2i + 1 of the run are each other's partners in mixup and cutmix, so the
    result does not depend on how a batch is spread over processes.
    """

    def __init__(self, images: Images, config: ImageConfig, num_classes: int, training: bool):
        self._images, self.config, self._training = images, config, training
        self._num_classes = num_classes
        self._seed = {
            name: draws_lib.stream(config.seed, name)
            for name in ("flip", "crop", "resize", "rand_augment", "erase", "noise", "mix")
        }
        settings = dataclasses.asdict(config)
        noise = ("flip", "crop_padding", "resized_crop", "rand_augment", "magnitude", "erasing")
        noise += ("mixup", "cutmix", "label_smoothing", "dequantise", "image_size", "channels")
        self.identity = {**images.identity, "augmentation": {n: settings[n] for n in noise}}

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        c = self.config
        if not self._training:
            images, labels = self._images.take(records)
            noise = c.dequantise
            images = augment.to_float(images, noise, self._seed["noise"], draws)
            return {"images": images, "labels": labels}
        images, labels = self._augmented(records, draws)
        if not c.soft_targets:
            return {"images": images, "labels": labels}
        if len(draws) % 2 == 0 and draws[0] % 2 == 0 and np.all(np.diff(draws) == 1):
            places = np.arange(len(draws)) ^ 1  # the partners are all here
            partners = images[places], labels[places]
        else:
            others = draws ^ 1
            partners = self._augmented(order(len(self), c.seed, others), others)
        mixed, targets = augment.mixup_cutmix(
            *(images, labels, *partners, self._num_classes),
            mixup=c.mixup,
            cutmix=c.cutmix,
            switch=0.5,
            smoothing=c.label_smoothing,
            seed=self._seed["mix"],
            draws=draws,
        )
        return {"images": mixed, "labels": labels, "targets": targets}

    def _augmented(self, records: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c, seed = self.config, self._seed
        images, labels = self._images.take(records)
        if c.resized_crop:
            size = images.shape[1]
            images = augment.random_resized_crop(
                images, size, scale=(c.resized_crop, 1.0), seed=seed["resize"], draws=draws
            )
        if c.crop_padding:
            images = augment.crop(images, c.crop_padding, seed["crop"], draws)
        if c.flip:
            images = augment.flip(images, seed["flip"], draws)
        if c.rand_augment:
            images = augment.rand_augment(
                images, c.rand_augment, c.magnitude, seed["rand_augment"], draws
            )
        if c.erasing:
            images = augment.erase(images, c.erasing, seed["erase"], draws)
        return augment.to_float(images, c.dequantise, seed["noise"], draws), labels
