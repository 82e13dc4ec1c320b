"""A checksum per array, computed where the array lives and independent of its sharding.

The bits of an array are read as 32-bit words w_i (narrower types are widened one to one);
the checksum is sum_i mix(w_i ^ mix(i ^ salt)) modulo 2^32, for two salts. mix is a bijection,
so any change confined to one word, a flipped bit among them, always changes the sum; changes
of several words escape with probability about 2^-64. Sums modulo 2^32 are exact in any
order, hence the same on every mesh.
"""

from collections.abc import Mapping
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def tree_checksums(tree: Any) -> dict[str, str]:
    """Checksums of every array of a pytree by its path, as 16 hexadecimal digits."""
    sums = jax.device_get(_checksums(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{pair[0]:08x}{pair[1]:08x}"
        for path, pair in jax.tree_util.tree_leaves_with_path(sums)
    }


def fingerprint(checksums: Mapping[str, str]) -> str:
    """One name, 16 hexadecimal digits, for a tree of arrays: of what ``tree_checksums`` returns."""
    text = json.dumps(sorted(checksums.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def _checksum(array: jax.Array) -> jax.Array:
    """[...] of any numeric dtype -> [2] uint32."""
    words = _words(array)
    # Position in the array as uint32, built per axis so that a sharded array stays sharded.
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index * np.uint32(size % 2**32) + step
    sums = []
    for salt in (np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B)):
        sums.append(jnp.sum(_mix(words ^ _mix(index ^ salt)), dtype=jnp.uint32))
    return jnp.stack(sums)


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as uint32; 64-bit types get a trailing axis of 2."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = array.dtype.itemsize * 8
    if bits >= 32:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers that scatters neighbours."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
