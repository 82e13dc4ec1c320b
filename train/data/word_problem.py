"""Random words over a group, generated from (seed, index): the same on every machine.

Dimensions: T = length + 1 tokens of a row, the first of a word being BOS.

Token ids 0 .. m-1 are the group's elements; then PAD, BOS, UNK, EOS, SEP, CLS, MASK. Input
and label rows both begin every word with BOS, and labels are aligned with inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.delta_product.groups import Group, group
from .pipeline import ENDLESS

SPECIAL_TOKENS = 7


def vocab_size(group: Group) -> int:
    return group.order + SPECIAL_TOKENS


def bos_id(group: Group) -> int:
    return group.order + 1


class WordProblems:
    """Rows of words with their prefix products.

    A row of T tokens holds as many words of the current length as fit, each behind its own
    BOS and with its own segment id; the last one may be cut. With a curriculum the length is
    ``lengths[i]`` from batch ``starts[i]`` on; rows keep their shape, so nothing recompiles.

    Args:
      name: group, see ``scanax.models.delta_product.groups``.
      seed: of the words. Seeds give unrelated words.
      length: elements per row, BOS not counted.
      batch_size: rows per batch, which turns an index into a batch number.
      lengths, starts: the curriculum; empty for words of ``length`` throughout.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        length: int,
        batch_size: int = 1,
        lengths: Sequence[int] = (),
        starts: Sequence[int] = (),
    ):
        self.group = group(name)
        self.lengths, self.starts = tuple(lengths) or (length,), tuple(starts) or (0,)
        if len(self.lengths) != len(self.starts) or self.starts[0] != 0:
            raise ValueError(
                "data.curriculum_lengths and data.curriculum_steps must have the same number of"
                f" entries, and the first step must be 0; got {self.lengths} and {self.starts}"
            )
        if list(self.starts) != sorted(set(self.starts)):
            raise ValueError(f"data.curriculum_steps must increase, got {self.starts}")
        if min(self.lengths) < 1 or max(self.lengths) > length:
            raise ValueError(
                f"data.curriculum_lengths must lie between 1 and data.length ({length}),"
                f" got {self.lengths}"
            )
        self.seed, self.tokens, self.batch_size = seed, length + 1, batch_size
        self._product = self.group.product.tolist()  # lists are faster to walk than arrays
        self.identity: Mapping[str, Any] = {
            "source": f"words over {name}",
            "seed": seed,
            "length": length,
            "curriculum": [list(self.lengths), list(self.starts)],
        }

    def __len__(self) -> int:
        return ENDLESS

    def batch(self, records: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows ``records`` [R]: ids, labels, segments, each [R, T] int32."""
        del draws  # a row has no noise beyond its index
        rows = [self._row(index) for index in records.tolist()]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, index: int) -> dict[str, np.ndarray]:
        length = self.word_length(index // self.batch_size)
        position = np.arange(self.tokens, dtype=np.int32)
        key = np.asarray([self.seed, index], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        ids = generator.integers(self.group.order, size=self.tokens, dtype=np.int32)
        ids[position % (length + 1) == 0] = bos_id(self.group)
        return {
            "ids": ids,
            "labels": self._labels(ids),
            "segments": position // (length + 1),
        }

    def word_length(self, batch: int) -> int:
        """Elements per word in a batch."""
        return self.lengths[int(np.searchsorted(self.starts, batch, side="right")) - 1]

    def _labels(self, ids: np.ndarray) -> np.ndarray:
        """Prefix products since the last BOS; BOS is its own label."""
        bos, product, accumulated, labels = bos_id(self.group), self._product, 0, []
        for token in ids.tolist():
            accumulated = 0 if token == bos else product[accumulated][token]
            labels.append(bos if token == bos else accumulated)
        return np.asarray(labels, np.int32)
