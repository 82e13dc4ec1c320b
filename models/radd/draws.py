"""Drawing tokens: noise that reaches far into the tail, filters, and keys of rows and positions.

Dimensions: R rows, B slots, C positions of a row, V real tokens; the axes before V are of any
number.

A token is argmax_v p_v / E_v with exponential E_v. A float32 uniform has steps of 2^-24, so that
-log of it is never below 6e-8: rare tokens of a large vocabulary are then drawn too seldom, and the
more so the smaller a factor stands before p. Here E is made of 64 bits, and tokens are drawn
without that factor wherever a step's unmasking is drawn first.
"""

import jax
import jax.numpy as jnp

from ..generation import Sampling, filter_logits

TINY = 1e-10  # in the published race


def draw(keys, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Tokens [...] int32 in [0, V) from logits [..., V].

    Args:
      keys: [...] a key for each.
      logits: float32 or float64, of real tokens only.
      sampling: static; see :func:`check_sampling`.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    flat = filter_logits(logits, sampling).reshape(-1, logits.shape[-1])
    noise = jax.vmap(lambda key: exponential(key, flat.shape[1:], flat.dtype))(keys.reshape(-1))
    return jnp.argmax(flat - jnp.log(noise), axis=-1).astype(jnp.int32).reshape(logits.shape[:-1])


def exponential(key, shape: tuple[int, ...], dtype) -> jax.Array:
    """Exponential noise, from 2^-65 on."""
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
    return exponential_of_bits(high, low, dtype)


def exponential_of_bits(high: jax.Array, low: jax.Array, dtype) -> jax.Array:
    """-log(1 - u) for u = (high + (low + 1/2) / 2^32) / 2^32, from uint32 words."""
    u = high.astype(dtype) * 2.0**-32 + (low.astype(dtype) + 0.5) * 2.0**-64
    return -jnp.log1p(-jnp.minimum(u, 1 - jnp.finfo(dtype).epsneg))


def race(probs: jax.Array, uniforms: jax.Array) -> jax.Array:
    """The published draw with given uniforms: [..., V] twice -> [...] int32."""
    return jnp.argmax(probs / (TINY - jnp.log(uniforms + TINY)), axis=-1).astype(jnp.int32)


def filtered_race(logits: jax.Array, uniforms: jax.Array, sampling: Sampling) -> jax.Array:
    """``race`` on filtered probabilities.

    As published, with top_k uniforms [..., 0] is for the likeliest token, and so on.
    """
    if not 0 < sampling.top_k < logits.shape[-1]:
        return race(jax.nn.softmax(filter_logits(logits, sampling), axis=-1), uniforms)
    best, index = jax.lax.top_k(filter_logits(logits, sampling), sampling.top_k)
    place = race(jax.nn.softmax(best, axis=-1), uniforms[..., : sampling.top_k])
    found = jnp.take_along_axis(index, place[..., None], axis=-1)[..., 0]
    return found.astype(jnp.int32)


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Keys [R]: ``fold_in(key, r)`` of one key, or keys [R] as they are.

    Raises:
      ValueError: for anything else.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (rows,)):
        raise ValueError(f"key must be one key of jax.random.key, or one per row ({rows})")
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows, dtype=jnp.uint32))


def position_keys(keys_B, event_B: jax.Array, position_BC: jax.Array) -> jax.Array:
    """Keys [B, C]: ``fold_in(fold_in(row's key, event), position)``.

    A position's draw so depends on neither the rows beside it nor how many positions are drawn.
    """
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, event_B.astype(jnp.uint32))
    each = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(each)(keys_B, position_BC.astype(jnp.uint32))


def check_sampling(sampling: Sampling) -> None:
    """A ValueError for what has no meaning here: a penalty of repetitions."""
    if sampling.repetition_penalty != 1:
        raise ValueError("repetition_penalty is for models that write from left to right")
