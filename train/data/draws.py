"""Random numbers per example: a function of (seed, draw, position), vectorised over draws.

A draw is the number of an example in the run, counted over epochs. Noise that depends on it
alone is the same for any batch size, number of processes and thread order, and after every
resume; a generator object per example would cost more than the augmentation it feeds.
"""

import functools

import numpy as np


def uniform(seed: int, draws: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1).

    Args:
      seed: 64 bits; different purposes need different seeds (see ``stream``).
      draws: [B] int64.
      count: numbers per draw.

    Returns:
      [B, count] float64; row b depends on (seed, draws[b]) only.
    """
    counters = np.arange(1, count + 1, dtype=np.uint64)
    bits_B1 = _mix(draws.astype(np.uint64) + np.uint64(seed % 2**64) * _ODD)[:, None]
    bits_BC = _mix(bits_B1 + counters * _GOLDEN)
    return (bits_BC >> np.uint64(11)) * 2.0**-53


@functools.lru_cache
def stream(seed: int, name: str) -> int:
    """A seed of its own for a purpose, e.g. ``stream(config.seed, "crop")``."""
    value = np.asarray([seed % 2**64], np.uint64)
    for byte in name.encode():
        value = _mix(value + np.uint64(byte) * _GOLDEN)
    return int(value[0])


def permute(places: np.ndarray, length: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where each place of an epoch's order points: a permutation, computed and not stored.

    A Feistel network over the next power of two, walked until it lands below ``length``
    (Black and Rogaway 2002), with round functions of its own for every epoch.

    Args:
      places: [R] int64 in [0, length).
      length: of the permutation.
      seed: of all epochs.
      epochs: [R] int64.

    Returns:
      [R] int64 in [0, length), distinct for distinct places of one epoch.
    """
    bits = int(length - 1).bit_length()
    low = np.uint64(bits - bits // 2)  # bits of the right half; the left has the same or one less
    masks = (1 << bits // 2) - 1, (1 << int(low)) - 1
    left_mask, right_mask = (np.uint64(mask) for mask in masks)
    keys = _mix(_mix(np.uint64(seed % 2**64) * _ODD + _GOLDEN) + epochs.astype(np.uint64))
    values, todo = places.astype(np.uint64), np.arange(len(places))
    rounds = 3 + 32 // max(bits, 1)  # pairs; small domains mix slowly
    while len(todo):
        left, right, key = values[todo] >> low, values[todo] & right_mask, keys[todo]
        for number in _NUMBERS[: 2 * rounds : 2]:
            left ^= _scatter(right + key + number) & left_mask
            right ^= _scatter(left + key + number + _NUMBERS[1]) & right_mask
        values[todo] = (left << low) | right
        todo = todo[values[todo] >= length]
    return values.astype(np.int64)


# Arrays of one element: numpy warns of wrapping scalars, not of wrapping arrays.
_GOLDEN = np.asarray([0x9E3779B97F4A7C15], np.uint64)
_SHIFT = np.uint64(32)
_NUMBERS = [np.uint64(number) for number in range(100)]
_ODD = np.asarray([0xD1342543DE82EF95], np.uint64)


def _scatter(x: np.ndarray) -> np.ndarray:
    """A cheap round function on uint64: the upper bits of a product depend on all lower ones."""
    x = x * _GOLDEN
    return ((x ^ (x >> _SHIFT)) * _ODD) >> _SHIFT


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014) on an array of uint64; wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
