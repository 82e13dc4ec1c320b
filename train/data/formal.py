"""Formal languages with an answer at the end: parity and modular arithmetic (Siems et al. 2025).

Dimensions: R rows, T tokens of a row.

A word is BOS, its tokens, and "=", whose label is the answer. Its length is the number of
tokens between the two. Token ids: digits 0 .. modulus-1 (bits for parity), then the symbols
of the language, PAD, BOS and "=".

  parity                        bits; how many ones, modulo 2
  modular_arithmetic            digits with + - * between them, * before + and -
  modular_arithmetic_brackets   d, -E or (E op E), with any nesting
"""

import bisect
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from .curriculum import Curriculum
from .pipeline import ENDLESS, IGNORE

SPECIAL = ("<pad>", "<bos>", "=")


@dataclasses.dataclass(frozen=True)
class Language:
    """A language over a vocabulary.

    Attributes:
      vocab: the tokens' texts; the first ``modulus`` are the answers.
      modulus: number of answers.
      even_lengths: whether words of even length exist.
      word: (generator, length) -> (token texts, answer).
    """

    vocab: tuple[str, ...]
    modulus: int
    even_lengths: bool
    word: Callable[[np.random.Generator, int], tuple[list[str], int]]

    def id(self, text: str) -> int:
        return self.vocab.index(text)


def language(name: str, modulus: int) -> Language:
    """The language of a name in ``NAMES``; parity is modulo 2 whatever ``modulus`` is."""
    if name not in NAMES:
        raise ValueError(f"unknown data.language {name!r}; choose one of {', '.join(NAMES)}")
    if modulus < 2:
        raise ValueError(f"data.modulus must be at least 2, got {modulus}")
    word, symbols, even_lengths = NAMES[name]
    modulus = 2 if name == "parity" else modulus
    vocab = (*map(str, range(modulus)), *symbols, *SPECIAL)
    return Language(vocab, modulus, even_lengths, lambda rng, n: word(rng, n, modulus))


def parity(rng: np.random.Generator, length: int, modulus: int) -> tuple[list[str], int]:
    """Random bits and the parity of the ones."""
    bits = rng.integers(modulus, size=length)
    return list(map(str, bits)), int(bits.sum() % modulus)


def arithmetic(rng: np.random.Generator, length: int, modulus: int) -> tuple[list[str], int]:
    """Digits with operators between them, and the value with the usual precedence."""
    tokens = [str(digit) for digit in rng.integers(modulus, size=length)]
    tokens[1::2] = ["+-*"[i] for i in rng.integers(3, size=length // 2)]
    total, product = 0, int(tokens[0])
    for operator, digit in zip(tokens[1::2], map(int, tokens[2::2]), strict=True):
        if operator == "*":
            product = product * digit % modulus
        else:
            total, product = total + product, digit if operator == "+" else -digit
    return tokens, (total + product) % modulus


def brackets(rng: np.random.Generator, length: int, modulus: int) -> tuple[list[str], int]:
    """A nested expression of exactly ``length`` tokens, and its value."""
    if length == 1:
        digit = int(rng.integers(modulus))
        return [str(digit)], digit
    if length < 5:
        tokens, value = brackets(rng, length - 1, modulus)
        return ["-", *tokens], -value % modulus
    left = int(rng.integers(1, length - 3))
    a_tokens, a = brackets(rng, left, modulus)
    b_tokens, b = brackets(rng, length - 3 - left, modulus)
    operator = "+-*"[rng.integers(3)]
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return ["(", *a_tokens, operator, *b_tokens, ")"], value % modulus


NAMES = {  # generator, symbols beside the digits, whether even lengths exist
    "parity": (parity, "", True),
    "modular_arithmetic": (arithmetic, "+-*", False),
    "modular_arithmetic_brackets": (brackets, "+-*()", True),
}


class Words:
    """Rows of words generated from (seed, index): the same on every machine.

    Lengths are uniform over those that exist, up to that of the curriculum. A row is filled
    with words, each a segment of its own, until the next one does not fit; then comes padding
    without labels.

    Args:
      language: of the words.
      seed: seeds give unrelated words.
      lengths: shortest and longest word.
      tokens: of a row.
      single: one word per row.
      curriculum: of the longest word.
    """

    def __init__(
        self,
        language: Language,
        seed: int,
        lengths: tuple[int, int],
        tokens: int,
        single: bool = False,
        curriculum: Curriculum | None = None,
    ):
        low, high = lengths
        self._lengths = [n for n in range(low, high + 1) if language.even_lengths or n % 2]
        self._curriculum = curriculum or Curriculum((), (), high, 1)
        if low < 1 or min(self._lengths, default=high + 1) > self._curriculum.lengths[0]:
            raise ValueError(
                "data: there are no words of"
                f" {low} to {min(high, self._curriculum.lengths[0])} tokens"
            )
        if tokens < high + 2:
            raise ValueError(
                f"data.row_tokens ({tokens}) must hold BOS, the longest word ({high}) and '='"
            )
        self.language, self.tokens, self._seed, self._single = language, tokens, seed, single
        self.identity: Mapping[str, Any] = {
            "source": f"words of {''.join(language.vocab)}",
            "seed": seed,
            "lengths": [low, high],
            "curriculum": self._curriculum.identity,
            "tokens": tokens,
        }

    def __len__(self) -> int:
        return ENDLESS

    def batch(self, records: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows ``records`` [R]: ids, labels, segments [R, T], and lengths, all int32.

        ``lengths`` [R, T] is the word's length where its answer is due, else 0.
        """
        del draws  # a row has no noise beyond its index
        rows = [self._row(index) for index in records.tolist()]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=np.asarray([self._seed, index], np.uint64)))
        spoken, end = self.language, 0
        ids = np.full(self.tokens, spoken.id("<pad>"), np.int32)
        row = {
            "ids": ids,
            "labels": np.full_like(ids, IGNORE),
            "segments": np.zeros_like(ids),
            "lengths": np.zeros_like(ids),
        }
        known = bisect.bisect_right(self._lengths, self._curriculum.length(index))
        while not (self._single and end):
            length = self._lengths[rng.integers(known)]
            start, end = end, end + length + 2
            if end > self.tokens:
                break
            word, answer = spoken.word(rng, length)
            ids[start:end] = [spoken.id(token) for token in ("<bos>", *word, "=")]
            row["labels"][end - 1] = answer
            row["lengths"][end - 1] = length
            row["segments"][end:] += 1
        return row
