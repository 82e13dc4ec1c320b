"""Batches from a random-access source, with a position that can be saved and restored.

The order is a function of the example's index alone, so the same batches come out for any
number of processes: process p of n takes rows p, p + n, ... of every batch.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import grain
import numpy as np

ENDLESS = 1 << 40  # length of a source that generates its examples


class Source(Protocol):
    """Random access to examples; ``identity`` says what data this is, for checks on resume."""

    identity: Mapping[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Batches:
    """An endless iterator of this process's rows of each global batch.

    Args:
      source: the examples; visited in order 0, 1, 2, ...
      batch_size: rows of the global batch.
      process_index, process_count: which rows are this process's.
    """

    def __init__(self, source: Source, batch_size: int, process_index: int, process_count: int):
        if batch_size % process_count:
            raise ValueError(
                f"batch_size {batch_size} does not divide over {process_count} processes"
            )
        self.identity = {**source.identity, "batch_size": batch_size}
        dataset = grain.MapDataset.source(source)[process_index::process_count]
        dataset = dataset.batch(batch_size // process_count)
        # One reading thread keeps a few batches ahead while the device works.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self):
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, and the data it is a position in; JSON."""
        return {"position": self._iterator.get_state(), "identity": self.identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved position.

        Raises:
          ValueError: if the position belongs to other data.
        """
        saved = state["identity"]
        different = [
            f"{key}: {saved.get(key)} -> {self.identity.get(key)}"
            for key in sorted(saved.keys() | self.identity.keys())
            if saved.get(key) != self.identity.get(key)
        ]
        if different:
            raise ValueError(f"the checkpoint was trained on other data: {'; '.join(different)}")
        self._iterator.set_state(state["position"])
