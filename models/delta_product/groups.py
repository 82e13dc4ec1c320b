"""Finite permutation groups, for word problems: element tables and products.

Elements of S_m are the permutations of m points in lexicographic order, those of A_m the
even ones in the same order; element 0 is the identity. The product composes right to left,
(a * b)(i) = a(b(i)), and a word's label at position t is x_1 * x_2 * ... * x_t.
"""

import dataclasses
import functools
import itertools

import numpy as np

NAMES = ("S3", "S4", "A5", "S5")


@dataclasses.dataclass(frozen=True)
class Group:
    """A group by its tables.

    Attributes:
      name: as in ``NAMES``.
      permutations: [m, points] int, one-line notation of each element, 0-based.
      product: [m, m] int, index of a * b.
    """

    name: str
    permutations: np.ndarray
    product: np.ndarray

    @property
    def order(self) -> int:
        return len(self.permutations)

    def subset(self, limit_to: int = 0, only_swaps: bool = False) -> np.ndarray:
        """Indices of some elements, increasing; the identity is always one of them.

        Args:
          limit_to: only permutations that move at most so many points; 0 for no limit.
          only_swaps: only the identity and transpositions.

        Raises:
          ValueError: if nothing but the identity is left.
        """
        moved = (self.permutations != np.arange(self.permutations.shape[1])).sum(axis=1)
        allowed = moved <= (limit_to or moved.max())
        if only_swaps:
            allowed &= moved <= 2
        if allowed.sum() < 2:
            raise ValueError(
                f"{self.name} has no element but the identity with data.limit_to={limit_to} and"
                f" data.only_swaps={only_swaps}"
            )
        return np.flatnonzero(allowed)


@functools.cache
def group(name: str) -> Group:
    """Builds a group by name: "S3", "S4", "A5" or "S5"."""
    if name not in NAMES:
        raise ValueError(f"unknown group {name!r}; choose one of {', '.join(NAMES)}")
    permutations = list(itertools.permutations(range(int(name[1:]))))
    if name[0] == "A":
        permutations = [p for p in permutations if _is_even(p)]
    index = {p: i for i, p in enumerate(permutations)}
    product = [[index[tuple(a[i] for i in b)] for b in permutations] for a in permutations]
    return Group(name, np.asarray(permutations), np.asarray(product))


def prefix_products(group: Group, words: np.ndarray) -> np.ndarray:
    """Labels of words: [..., k] elements -> [..., k] elements, x_1 * ... * x_t."""
    labels = np.empty_like(words)
    accumulated = np.zeros(words.shape[:-1], words.dtype)  # the identity
    for t in range(words.shape[-1]):
        accumulated = group.product[accumulated, words[..., t]]
        labels[..., t] = accumulated
    return labels


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return inversions % 2 == 0
