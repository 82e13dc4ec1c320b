"""Points of two mixtures of Gaussians in the plane: from one to the other goes the toy flow.

Dimensions: R rows, K components.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import numpy as np

from ...models.rectified_flow.exact import toy_means
from . import draws as draws_lib
from .pairs import Pairs
from .pipeline import ENDLESS, Batch, Batches, eval_batch


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Two mixtures of three equal Gaussians, mirror images of each other (Liu et al. 2022, toy).

    Attributes:
      distance: D: X_0 has its components at (+-D sqrt(3)/2, D/2) and (0, -D sqrt(3)/2), X_1 where
        these lie when y changes its sign.
      variance: of every component, along both axes.
      pairs: folder of coupling pairs to train on instead of independent draws; "" for none.
      teacher: folder of the run that the pairs must come from; "" for the run's ``init_from``.
      in_memory: read all pairs at once.
      eval_fraction: of the pairs, held out.
      seed: of the training points.
    """

    distance: float
    variance: float
    pairs: str
    teacher: str
    in_memory: bool
    eval_fraction: float
    seed: int

    def __post_init__(self):
        if self.variance <= 0:
            raise ValueError(f"data.variance must be positive, got {self.variance}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction must be in (0, 1), got {self.eval_fraction}")

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the components of X_0 and of X_1: [K, 2] float64 each."""
        return toy_means(self.distance)


class Mixtures:
    """Independent draws from both mixtures; a ``pipeline.Source``.

    Args:
      config: of the mixtures.
      seed: of the points.
    """

    def __init__(self, config: MixtureConfig, seed: int):
        self._means = config.means()
        self._scale = config.variance**0.5
        self._seed = draws_lib.stream(seed, "mixtures")
        self.identity: Mapping[str, Any] = {
            "mixtures": [config.distance, config.variance],
            "points_seed": seed,
        }

    def __len__(self) -> int:
        return ENDLESS

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        del records
        u_RC = draws_lib.uniform(self._seed, draws, 6)
        ends = []
        for means_K2, u_R3 in zip(self._means, np.split(u_RC, 2, axis=1), strict=True):
            component_R = (u_R3[:, 0] * len(means_K2)).astype(np.int64)
            radius_R = np.sqrt(-2 * np.log1p(-u_R3[:, 1]))  # Box and Muller
            angle_R = 2 * np.pi * u_R3[:, 2]
            noise_R2 = radius_R[:, None] * np.stack([np.cos(angle_R), np.sin(angle_R)], axis=-1)
            ends.append((means_K2[component_R] + self._scale * noise_R2).astype(np.float32))
        return {"x0": ends[0], "x1": ends[1], "labels": np.zeros(len(draws), np.int32)}


class MixtureData:
    """The data of the toy flow; the same interface as ``FlowImages``.

    Args:
      config: of the mixtures.
    """

    EVAL_POINTS = 1 << 16

    def __init__(self, config: MixtureConfig):
        self.config = config

    shape = (2,)
    num_classes = 0
    from_noise = False

    @functools.cached_property
    def pairs(self) -> Pairs | None:
        """The pairs that are trained on."""
        return Pairs(self.config.pairs, self.config.in_memory) if self.config.pairs else None

    def train_batches(self, batch_size: int, process_index: int, process_count: int) -> Batches:
        c = self.config
        if self.pairs is None:
            return Batches(Mixtures(c, c.seed), batch_size, process_index, process_count)
        source = self.pairs.split(c.eval_fraction)[0]
        return Batches(source, batch_size, process_index, process_count, seed=c.seed)

    def eval_batch(self, size: int, index: int) -> Batch | None:
        if self.pairs is not None:
            return eval_batch(self.pairs.split(self.config.eval_fraction)[1], size, index)
        return None if (index + 1) * size > self.EVAL_POINTS else self._points(size * index, size)

    def ends(self, numbers: np.ndarray, training: bool) -> tuple[np.ndarray, np.ndarray]:
        """X_1 of these numbers and labels: [R, 2] float32, [R] int32."""
        batch = self._batch(numbers, training)
        return batch["x1"], batch["labels"]

    def start(self, numbers: np.ndarray, seed: int, training: bool) -> np.ndarray:
        """X_0 of these numbers and the seed: [R, 2] float32; no others are like them."""
        del training
        return Mixtures(self.config, draws_lib.stream(seed, "start")).batch(numbers, numbers)["x0"]

    def available(self, training: bool, starts: bool) -> int:
        """How many different X_0, or X_1, there are."""
        del training, starts
        return ENDLESS

    def _batch(self, numbers: np.ndarray, training: bool) -> Batch:
        return Mixtures(self.config, self.config.seed if training else -1).batch(numbers, numbers)

    def _points(self, first: int, number: int) -> Batch:
        return self._batch(np.arange(first, first + number), training=False)
