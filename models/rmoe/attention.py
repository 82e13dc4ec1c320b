"""Causal attention with rotary positions (Su et al. 2021) and grouped keys.

Dimensions: B batch, T tokens, S tokens that are seen, H heads, G heads of keys, K head width.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ..layers import Dense, rotate
from .config import RMoEConfig


class KVCache(NamedTuple):
    """Keys and values of earlier tokens.

    Attributes:
      k, v: [B, S, G, K], with room for S tokens, padding included.
      real: [B, S] bool, False where there is padding, or nothing yet.
      length: [] int32, how many places are taken.
    """

    k: jax.Array
    v: jax.Array
    real: jax.Array
    length: jax.Array


def empty_kv(c: RMoEConfig, batch: int, length: int) -> KVCache:
    """Room for ``length`` tokens of one layer, padding included."""
    zeros = jnp.zeros((batch, length, c.kv_heads, c.head_dim), c.dtype)
    return KVCache(zeros, zeros, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


class Attention(nn.Module):
    """Rotary attention; a token sees those before it and itself."""

    config: RMoEConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """y [B, T, D], and the cache with the new tokens, or None without one.

        Args:
          x_BTD: tokens.
          mask: [B, T] bool, True = a token; the others are not seen.
          segment_ids: [B, T] int; tokens see their segment alone.
          cache: of the tokens before, in every row the same number with its padding; it needs
            room for these. Then there are no segments.

        Raises:
          ValueError: for a cache together with segments, or more tokens than a cache has room for.
        """
        c, (batch, tokens, hidden) = self.config, x_BTD.shape
        init = nn.initializers.normal(c.initializer_range)
        dense = lambda name, features, axes: Dense(
            features, axes, init, c.dtype, c.param_dtype, name=f"{name}_proj"
        )
        split = lambda name, heads: dense(name, heads * c.head_dim, ("embed", "heads"))(
            x_BTD
        ).reshape(batch, tokens, heads, c.head_dim)
        q, k, v = split("q", c.num_heads), split("k", c.kv_heads), split("v", c.kv_heads)
        first = jnp.zeros((), jnp.int32) if cache is None else cache.length
        place_T = first + jnp.arange(tokens, dtype=jnp.int32)
        q, k = (rotate(x, place_T, c.rope_theta) for x in (q, k))
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("a cache of keys and values continues rows without segments")
            if tokens > cache.k.shape[1]:
                raise ValueError(f"{tokens} tokens in a cache with room for {cache.k.shape[1]}")
            put = jax.lax.dynamic_update_slice_in_dim
            real = jnp.ones((batch, tokens), bool) if mask is None else mask
            k = put(cache.k, k.astype(cache.k.dtype), first, axis=1)
            v = put(cache.v, v.astype(cache.v.dtype), first, axis=1)
            mask = put(cache.real, real, first, axis=1)
            cache = KVCache(k, v, mask, first + tokens)
        seen_S = jnp.arange(k.shape[1], dtype=jnp.int32)
        allowed_BTS = (seen_S[None] <= place_T[:, None])[None]
        if mask is not None:
            allowed_BTS &= mask[:, None]
        if segment_ids is not None:
            allowed_BTS &= segment_ids[:, :, None] == segment_ids[:, None]
        o_BTHK = attend(q, k, v, allowed_BTS)
        o_BTD = o_BTHK.reshape(batch, tokens, hidden)
        return dense("o", hidden, ("heads", "embed"))(o_BTD), cache


def attend(q, k, v, allowed_BTS) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v: [B, T, H, K] in q's dtype; each of G keys serves H / G heads."""
    (batch, tokens, heads, width), groups = q.shape, k.shape[2]
    wide = accumulation_dtype(q.dtype)
    q = q.reshape(batch, tokens, groups, heads // groups, width)
    logits = jnp.einsum("btgnk,bsgk->bgnts", q, k, preferred_element_type=wide) / width**0.5
    logits = jnp.where(allowed_BTS[:, None, None], logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bgnts,bsgk->btgnk", weights, v).reshape(batch, tokens, heads, width)
