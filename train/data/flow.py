"""What a flow of images is trained on: images, images of two kinds, or pairs of another flow.

Dimensions: R rows, H height, W width, C channels.

A batch holds ``x1`` [R, H, W, C] float32, ``labels`` [R] int32, and ``x0`` like x1 unless that is
noise, which the task draws.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import numpy as np

from . import draws as draws_lib
from .image_sources import ImageConfig, Images
from .images import Augmented, ImageSet
from .pairs import Pairs
from .pipeline import ENDLESS, Batch, Batches, DataError, Source, eval_batch, order

_SHUFFLED = draws_lib.stream(0, "ends")  # files come sorted by class; a part of them must not


@dataclasses.dataclass(frozen=True)
class FlowImageConfig(ImageConfig):
    """Images, and where they come from.

    Attributes:
      start_path: files: X_0 are the images here, read like those of ``path`` and paired with them
        at random, instead of noise: image to image. Some of them are held out, by
        ``eval_fraction``; they need no labels.
      pairs: folder of coupling pairs (``scanax.train.generate_pairs``) to train on; the images
        are then what samples are compared with, and those of ``start_path`` where samples begin.
      teacher: folder of the run that the pairs must come from; "" for ``objective.teacher`` or,
        without one, the run's ``init_from``. It is looked at when the run begins.
    """

    start_path: str
    pairs: str
    teacher: str

    def __post_init__(self):
        super().__post_init__()
        if self.start_path and self.source != "files":
            raise ValueError("data.start_path needs data.source=files")
        if self.soft_targets or self.source == "moving_digits":
            raise ValueError("a flow is trained on single images: no mixing, no clips")
        if self.pairs and self.augments:
            raise ValueError(
                f"pairs belong together: set data.{self.augments} to 0, and objective.flip to"
                " mirror both ends alike"
            )

    @property
    def augments(self) -> str:
        """The first augmentation that is on, "" if none is."""
        names = ("flip", "crop_padding", "resized_crop", "rand_augment", "erasing", "dequantise")
        return next((name for name in names if getattr(self, name)), "")


class FlowImages:
    """The data of a flow of images, read when first asked for.

    Args:
      config: what to read.
    """

    def __init__(self, config: FlowImageConfig):
        self.config = config
        self._images = ImageSet(config)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C): the config's, or of the images where it leaves that to them."""
        c = self.config
        return (c.image_size, c.image_size, c.channels) if c.image_size else self._images.shape

    @property
    def from_noise(self) -> bool:
        """Whether X_0 is N(0, I)."""
        return not self.config.start_path

    @property
    def num_classes(self) -> int:
        return self._images.num_classes

    @functools.cached_property
    def pairs(self) -> Pairs | None:
        """The pairs that are trained on."""
        return Pairs(self.config.pairs, self.config.in_memory) if self.config.pairs else None

    @functools.cached_property
    def starts(self) -> ImageSet | None:
        """Images that a flow starts from."""
        if not self.config.start_path:
            return None
        c = self.config
        # Nothing of the other images' files is theirs, nor is the noise of augmentation.
        other = {"eval_path": "", "labels_path": "", "eval_labels_path": "", "label_key": ""}
        seed = draws_lib.stream(c.seed, "start")
        starts = ImageSet(
            dataclasses.replace(c, path=c.start_path, start_path="", seed=seed, **other)
        )
        if starts.shape != self.shape:
            raise DataError(
                f"data.start_path has images {starts.shape}, data.path {self.shape}: set"
                " data.image_size"
            )
        return starts

    def train_batches(self, batch_size: int, process_index: int, process_count: int) -> Batches:
        c = self.config
        how = {"seed": c.seed, "threads": c.threads}
        return Batches(self._source(True), batch_size, process_index, process_count, **how)

    def eval_batch(self, size: int, index: int) -> Batch | None:
        return eval_batch(self._source(False), size, index)

    def real(self, number: int, training: bool) -> np.ndarray:
        """Images of a part, of all classes alike, at most ``number``: [N, H, W, C] uint8."""
        images = _part(self._images, training)
        numbers = np.arange(min(number, len(images)))
        return images.take(order(len(images), _SHUFFLED, numbers))[0]

    def ends(self, numbers: np.ndarray, training: bool) -> tuple[np.ndarray, np.ndarray]:
        """X_1 of these numbers, not augmented, and labels: [R, H, W, C] float32, [R] int32.

        In the order of ``real``, and again from its beginning when all have been.
        """
        batch = _plain(self._images, _SHUFFLED, numbers, training)
        return batch["images"], batch["labels"]

    def start(self, numbers: np.ndarray, seed: int, training: bool) -> np.ndarray | None:
        """X_0 of these numbers, in the order of the seed: [R, H, W, C] float32; None for noise."""
        if self.starts is None:
            return None
        return _plain(self.starts, seed, numbers, training)["images"]

    def available(self, training: bool, starts: bool) -> int:
        """How many different X_0, or X_1, there are of a part."""
        if not starts:
            return len(_part(self._images, training))
        return ENDLESS if self.starts is None else len(_part(self.starts, training))

    def _source(self, training: bool) -> Source:
        if self.pairs is not None:
            return self.pairs.split(self.config.eval_fraction)[0 if training else 1]
        sets = [self._images] + ([] if self.starts is None else [self.starts])
        return _Ends([Augmented(_part(s, training), s.config, 0, training) for s in sets])


def _plain(images: ImageSet, seed: int, numbers: np.ndarray, training: bool) -> Batch:
    """Images of a part by their numbers in the order of a seed, not augmented."""
    source = Augmented(_part(images, training), images.config, 0, training=False)
    return source.batch(order(len(source), seed, numbers), numbers)


def _part(images: ImageSet, training: bool) -> Images:
    train, evaluation, _ = images.parts
    return train if training else evaluation


class _Ends:
    """Images as X_1, and, if there are two sources, others as X_0, paired at random in every epoch.

    Args:
      sources: of X_1, and of X_0.
    """

    def __init__(self, sources: list[Augmented]):
        self._sources = sources
        self.identity: Mapping[str, Any] = dict(sources[0].identity)
        if len(sources) > 1:
            self.identity = {**self.identity, "start": dict(sources[1].identity)}

    def __len__(self) -> int:
        return len(self._sources[0])

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        found = self._sources[0].batch(records, draws)
        batch = {"x1": found["images"], "labels": found["labels"]}
        if len(self._sources) > 1:
            start = self._sources[1]
            others = order(len(start), start.config.seed, draws)
            batch["x0"] = start.batch(others, draws)["images"]
        return batch
