"""Batches from a random-access source, with a position that can be saved and restored.

The order is a function of (seed, epoch, index) alone. Example i of the run is record
``permute(i % len, len, seed, i // len)`` of the source; batch b holds examples b B .. b B + B - 1,
so an epoch may end inside a batch and none is ever shorter. The permutation is computed, not
stored. Process p of n takes the p-th n-th of every batch's rows: the same batches come out, row
for row, for any number of processes.
"""

from collections.abc import Mapping
import functools
from typing import Any, Protocol

import grain
import numpy as np

from . import draws as draws_lib

ENDLESS = 1 << 40  # length of a source that generates its examples
IGNORE = -1  # label of what is not predicted
_CHUNK = 4096
Batch = Mapping[str, np.ndarray]


class DataError(RuntimeError):
    """Data that cannot be used; the message names the file and says what to do."""


class DataChanged(DataError):
    """A saved position belongs to other data than the run's."""


class Source(Protocol):
    """Random access to examples; ``identity`` says what data this is, for checks on resume."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        """Records [R] as arrays [R, ...]; draws [R] number the examples, for noise."""
        ...


class Batches:
    """An endless iterator of this process's rows of each global batch.

    Args:
      source: the examples.
      batch_size: rows of the global batch.
      process_index, process_count: which rows are this process's.
      seed: of the order, another in every epoch; None for 0, 1, 2, ... in every epoch.
      threads: batches made at the same time; the order does not depend on it.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        process_index: int,
        process_count: int,
        *,
        seed: int | None = None,
        threads: int = 1,
    ):
        if batch_size % process_count:
            raise DataError(
                f"batch_size {batch_size} does not divide over {process_count} processes"
            )
        self.identity = {**source.identity, "batch_size": batch_size}
        if seed is not None:
            self.identity |= {"records": len(source), "order_seed": seed}
        size = batch_size // process_count
        rows = process_index * size + np.arange(size)

        def batch(number: int) -> Batch:
            draws = number * batch_size + rows
            return source.batch(order(len(source), seed, draws), draws)

        dataset = grain.MapDataset.range(ENDLESS).map(batch)
        # Reading threads keep a few batches ahead while the device works.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, and the data it is a position in; JSON."""
        return {"position": self._iterator.get_state(), "identity": self.identity}

    def set_state(self, state: Mapping[str, Any], allow_change: bool = False) -> None:
        """Continues from a saved position.

        Args:
          state: from ``get_state``.
          allow_change: continue at the same batch number although the data is another.

        Raises:
          DataChanged: if the position belongs to other data.
        """
        saved = state["identity"]
        different = [
            f"{key}: {saved.get(key)} -> {self.identity.get(key)}"
            for key in sorted(saved.keys() | self.identity.keys())
            if saved.get(key) != self.identity.get(key)
        ]
        if different and not allow_change:
            raise DataChanged(f"the checkpoint was trained on other data: {'; '.join(different)}")
        self._iterator.set_state(state["position"])


def order(length: int, seed: int | None, draws: np.ndarray) -> np.ndarray:
    """Records of examples ``draws`` [R] of the run -> [R] int64."""
    if seed is None:
        return draws % length
    chunks, places = np.divmod(draws, _CHUNK)
    found = np.empty_like(draws)
    for chunk in np.unique(chunks).tolist():
        here = chunks == chunk
        found[here] = _chunk(length, seed, chunk)[places[here]]
    return found


@functools.lru_cache(maxsize=8)
def _chunk(length: int, seed: int, chunk: int) -> np.ndarray:
    """The order of _CHUNK examples at once, which costs little more than that of one."""
    epochs, places = np.divmod(chunk * _CHUNK + np.arange(_CHUNK), length)
    return draws_lib.permute(places, length, seed, epochs)


def eval_batch(source: Source, size: int, index: int) -> Batch | None:
    """Evaluation batch ``index``: records in order, or None after the last one.

    The last batch is filled up with rows without a weight: their "labels" are -1.
    """
    start = index * size
    left = min(len(source) - start, size)
    if left <= 0:
        return None
    numbers = start + np.minimum(np.arange(size), left - 1)
    batch = dict(source.batch(numbers, numbers))
    if left < size:
        labels = batch["labels"].copy()
        labels[left:] = IGNORE
        batch["labels"] = labels
    return batch
