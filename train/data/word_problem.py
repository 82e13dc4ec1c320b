"""Random words over a group, generated from (seed, index): the same on every machine.

Dimensions: R rows, T tokens of a row, the first of a word being BOS.

Token ids 0 .. m-1 are the group's elements; then PAD, BOS, UNK, EOS, SEP, CLS, MASK. Input
and label rows both begin every word with BOS, and labels are aligned with inputs. With more
than one token per element, fillers (SEP) follow each element, and the label of the last one
is the product: the model has that many tokens to take an element in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.delta_product.groups import Group, group
from .curriculum import Curriculum
from .pipeline import ENDLESS, IGNORE

SPECIAL_TOKENS = 7


def vocab_size(group: Group) -> int:
    return group.order + SPECIAL_TOKENS


def bos_id(group: Group) -> int:
    return group.order + 1


def filler_id(group: Group) -> int:
    return group.order + 4


class WordProblems:
    """Rows of words with their prefix products.

    A row of T tokens holds as many words of the current length as fit, each behind its own
    BOS and with its own segment id; the last one may be cut. Rows keep their shape through a
    curriculum, so nothing recompiles.

    Args:
      name: group, see ``scanax.models.delta_product.groups``.
      seed: of the words. Seeds give unrelated words.
      length: elements per row, BOS not counted.
      batch_size, lengths, starts: of the ``Curriculum``.
      limit_to, only_swaps: which elements appear in words, see ``Group.subset``; products
        are over the whole group all the same.
      tokens_per_element: 1, or more to put fillers behind every element.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        length: int,
        batch_size: int = 1,
        lengths: Sequence[int] = (),
        starts: Sequence[int] = (),
        limit_to: int = 0,
        only_swaps: bool = False,
        tokens_per_element: int = 1,
    ):
        self.group = group(name)
        self._elements = self.group.subset(limit_to, only_swaps).astype(np.int32)
        self._curriculum = Curriculum(lengths, starts, length, batch_size)
        if tokens_per_element < 1:
            raise ValueError(f"data.tokens_per_element must be positive, got {tokens_per_element}")
        self.seed, self._repeat = seed, tokens_per_element
        self.tokens = length * tokens_per_element + 1
        self._product = self.group.product.tolist()  # lists are faster to walk than arrays
        self.identity: Mapping[str, Any] = {
            "source": f"words over {name}",
            "seed": seed,
            "length": length,
            "curriculum": self._curriculum.identity,
            "variant": [limit_to, only_swaps, tokens_per_element],
        }

    def __len__(self) -> int:
        return ENDLESS

    def batch(self, records: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows ``records`` [R]: ids, labels, segments, each [R, T] int32."""
        del draws  # a row has no noise beyond its index
        rows = [self._row(index) for index in records.tolist()]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, index: int) -> dict[str, np.ndarray]:
        tokens = self._curriculum.length(index) * self._repeat + 1  # of a word
        position = np.arange(self.tokens, dtype=np.int32)
        place = position % tokens  # in the word; 0 is BOS
        key = np.asarray([self.seed, index], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        drawn = generator.integers(len(self._elements), size=self.tokens, dtype=np.int32)
        is_element = (place - 1) % self._repeat == 0
        ids = np.where(is_element, self._elements[drawn], filler_id(self.group))
        ids = np.where(place == 0, bos_id(self.group), ids).astype(np.int32)
        answers = (place == 0) | (place % self._repeat == 0)
        return {
            "ids": ids,
            "labels": np.where(answers, self._products(ids), IGNORE).astype(np.int32),
            "segments": position // tokens,
        }

    def _products(self, ids: np.ndarray) -> np.ndarray:
        """Prefix products since the last BOS; BOS is its own product."""
        bos, product, accumulated, found = bos_id(self.group), self._product, 0, []
        for token in ids.tolist():
            if token < self.group.order:
                accumulated = product[accumulated][token]
            elif token == bos:
                accumulated = 0
            found.append(bos if token == bos else accumulated)
        return np.asarray(found)
