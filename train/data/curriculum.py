"""Lengths that grow during training."""

from collections.abc import Sequence

import numpy as np


class Curriculum:
    """The length of an example, by the batch it is in.

    It is ``lengths[i]`` from batch ``starts[i]`` on, so that a function of the example's index
    alone gives it and a resumed run continues where it was.

    Args:
      lengths, starts: ``data.curriculum_lengths`` and ``data.curriculum_steps``; empty for
        ``longest`` throughout.
      longest: no length is above it.
      shortest: no length is below it.
      batch_size: examples per batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        starts: Sequence[int],
        longest: int,
        batch_size: int,
        shortest: int = 1,
    ):
        self.lengths, self.starts = tuple(lengths) or (longest,), tuple(starts) or (0,)
        self._batch_size = batch_size
        self.identity = [list(self.lengths), list(self.starts)]
        if len(self.lengths) != len(self.starts) or self.starts[0] != 0:
            raise ValueError(
                "data.curriculum_lengths and data.curriculum_steps must have the same number of"
                f" entries, and the first step must be 0; got {self.lengths} and {self.starts}"
            )
        if list(self.starts) != sorted(set(self.starts)):
            raise ValueError(f"data.curriculum_steps must increase, got {self.starts}")
        if min(self.lengths) < shortest or max(self.lengths) > longest:
            raise ValueError(
                f"data.curriculum_lengths must lie between {shortest} and {longest}, the training"
                f" lengths; got {self.lengths}"
            )

    def length(self, index: int) -> int:
        """The length of example ``index``."""
        stage = np.searchsorted(self.starts, index // self._batch_size, side="right") - 1
        return self.lengths[int(stage)]
