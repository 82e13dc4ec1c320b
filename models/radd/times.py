"""Uniform numbers u in [0, 1) for a batch, by name, and sizes of masked sets for evaluation.

Dimensions: B examples (of the whole batch, over all devices), N draws for each.

  iid         u_i alone
  vdm         u_i = (u_0 + i / B) mod 1 with one u_0
  decoupled   u_i = (i + w_i) / B with B numbers w_i

Each u_i of the first two, and each of the third seen from a random place in the batch, is uniform;
the last two spread a batch evenly over [0, 1). (Public code of RADD; the second is also MD4's
antithetic draw, the third MDLM's.)
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # of JAX or of NumPy, and then so is what is returned: batches are made on the host


def iid(w_B: Array) -> Array:
    """The numbers as they are: [B]."""
    return w_B


def vdm(w_B: Array) -> Array:
    """(w_0 + i / B) mod 1: [B]. Of w, only the first is used."""
    return _below_one((w_B[:1] + _index(w_B) / len(w_B)) % 1)


def decoupled(w_B: Array) -> Array:
    """(i + w_i) / B: [B]."""
    return _below_one((_index(w_B) + w_B) / len(w_B))


DRAWS = {"iid": iid, "vdm": vdm, "decoupled": decoupled}


def check(name: str) -> None:
    """Raises a ValueError if there is no draw of that name."""
    if name not in DRAWS:
        raise ValueError(f"unknown draw of times {name!r}; choose one of {', '.join(DRAWS)}")


def from_uniform(name: str, w_B: Array) -> Array:
    """The draw ``name`` made of independent uniform numbers: [B], in w's dtype.

    Raises:
      ValueError: for an unknown name.
    """
    check(name)
    return DRAWS[name](w_B)


def draw(name: str, key: jax.Array, count: int, dtype=jnp.float32) -> jax.Array:
    """u of a batch of ``count`` examples: [count].

    Raises:
      ValueError: for an unknown name.
    """
    return from_uniform(name, jax.random.uniform(key, (count,), dtype))


def stratified_sizes(keys_B: jax.Array, draws: int, length: int) -> jax.Array:
    """Sizes k of masked sets for N = ``draws`` evaluations of each example: [B, N] int32, 1 .. L.

    k = 1 + floor(L (n + w_n) / N), shuffled over n: each k is uniform, and where L divides N every
    size appears exactly N / L times among an example's.
    """

    def sizes(key):
        offset, shuffle = jax.random.split(key)
        w_N = jax.random.randint(offset, (draws,), 0, length)  # floor(L w): whole numbers are exact
        k_N = 1 + (jnp.arange(draws, dtype=jnp.int32) * length + w_N.astype(jnp.int32)) // draws
        return jax.random.permutation(shuffle, k_N)

    return jax.vmap(sizes)(keys_B)


def size_of(u_B: jax.Array, length: int) -> jax.Array:
    """k = 1 + floor(L u), at most L: int32, in u's shape."""
    return jnp.clip(jnp.floor(u_B * length).astype(jnp.int32) + 1, 1, length)


def uniform_of(k_B: jax.Array, length: int, dtype=jnp.float32) -> jax.Array:
    """A u with ``size_of(u, length) == k``: the middle of those, in k's shape."""
    return (k_B.astype(dtype) - 0.5) / length


def _index(w_B: Array) -> Array:
    return w_B.__array_namespace__().arange(len(w_B), dtype=w_B.dtype)


def _below_one(u_B: Array) -> Array:
    """Rounding may have made it 1."""
    return u_B.__array_namespace__().minimum(u_B, 1 - float(jnp.finfo(u_B.dtype).epsneg))
