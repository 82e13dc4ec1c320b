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
from .pairs import Pairs, check_pairs
from .pipeline import Batch, Batches, DataError, Source, eval_batch, order


@dataclasses.dataclass(frozen=True)
class FlowImageConfig(ImageConfig):
    """Images, and where they come from.

    Attributes:
      start_path: files: X_0 are the images here, read like those of ``path`` and paired with them
        at random, instead of noise: image to image.
      pairs: folder of coupling pairs (``scanax.train.generate_pairs``) to train on; the images
        are then what samples are compared with.
      teacher: folder of the run that the pairs must come from; "" for the run's ``init_from``, or
        ``objective.teacher``.
    """

    start_path: str
    pairs: str
    teacher: str

    def __post_init__(self):
        super().__post_init__()
        if self.start_path and self.source != "files":
            raise ValueError("data.start_path needs data.source=files")
        if self.start_path and self.pairs:
            raise ValueError("data.pairs have both ends: leave data.start_path empty")
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
        """(H, W, C)."""
        return self._images.shape

    @property
    def num_classes(self) -> int:
        return self._images.num_classes

    @functools.cached_property
    def pairs(self) -> Pairs | None:
        """The pairs that are trained on.

        Raises:
          DataError: if their images have another shape than the data's, or labels it has not.
        """
        if not self.config.pairs:
            return None
        return check_pairs(Pairs(self.config.pairs, self.config.in_memory), self.shape)

    @functools.cached_property
    def starts(self) -> ImageSet | None:
        """Images that a flow starts from."""
        if not self.config.start_path:
            return None
        part = dataclasses.replace(self.config, path=self.config.start_path, start_path="")
        starts = ImageSet(part)
        if starts.shape != self.shape:
            raise DataError(
                f"data.start_path has images {starts.shape}, data.path {self.shape}: set"
                " data.image_size"
            )
        return starts

    def train_batches(self, batch_size: int, process_index: int, process_count: int) -> Batches:
        c = self.config
        source = self._source(training=True)
        if self.pairs is not None:
            source = self.pairs.split(c.eval_fraction)[0]
        order = {"seed": c.seed, "threads": c.threads}
        return Batches(source, batch_size, process_index, process_count, **order)

    def eval_batch(self, size: int, index: int) -> Batch | None:
        source = self._source(training=False)
        if self.pairs is not None:
            source = self.pairs.split(self.config.eval_fraction)[1]
        return eval_batch(source, size, index)

    def real(self, number: int, training: bool) -> np.ndarray:
        """The first images of a part, at most ``number``: [N, H, W, C] uint8."""
        images = _part(self._images, training)
        return images.take(np.arange(min(number, len(images))))[0]

    def ends(self, numbers: np.ndarray, training: bool) -> tuple[np.ndarray, np.ndarray]:
        """X_1 of these numbers, not augmented, and labels: [R, H, W, C] float32, [R] int32."""
        source = self._plain(self._images, training)
        batch = source.batch(numbers % len(source), numbers)
        return batch["images"], batch["labels"]

    def start(self, numbers: np.ndarray, training: bool) -> np.ndarray | None:
        """X_0 of these numbers, [R, H, W, C] float32; None where it is noise."""
        if self.starts is None:
            return None
        source = self._plain(self.starts, training)
        return source.batch(numbers % len(source), numbers)["images"]

    def _source(self, training: bool) -> Source:
        sets = [self._images] + ([] if self.starts is None else [self.starts])
        return _Ends([Augmented(_part(s, training), s.config, 0, training) for s in sets])

    def _plain(self, images: ImageSet, training: bool) -> Augmented:
        return Augmented(_part(images, training), images.config, 0, training=False)


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
            others = order(len(start), draws_lib.stream(0, "start"), draws)
            batch["x0"] = start.batch(others, draws)["images"]
        return batch
