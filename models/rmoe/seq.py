"""A language model of post-norm blocks that attend to the ``span`` tokens before: the small models.

Dimensions: B batch, T tokens, W span, D hidden, H heads, K head width, S vocabulary, L layers.

  u = LayerNorm(x + attention(x, memory))
  m = LayerNorm(u + experts(u));   x = LayerNorm(u + m)

The input of the experts is added twice and normalised twice, as in the public code that the
paper's small experiments stand on. A token attends to the W tokens before it and not to itself.
At the beginning of a text these are zeros, which have no content but take their share of the
attention. The cache holds the layers' inputs of the last W tokens; no gradient flows into it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ...kernels.per_device import by_rows
from ..layers import Dense, LayerNorm, parameter, uniform
from . import router
from .config import RMoESeqConfig
from .moe import ROUTING, MoE, RouterCell, scanned


class SpanAttention(nn.Module):
    """softmax((q k + q p_j) / sqrt(K)) over the W tokens before, p_j for the j-th oldest."""

    config: RMoESeqConfig

    @nn.compact
    def __call__(self, x_BTD, memory_BWD, place_KW, keep_BHTS=None):
        """y [B, T, D].

        Args:
          x_BTD: tokens.
          memory_BWD: the W tokens before them.
          place_KW: [K, W] keys of places, the oldest first.
          keep_BHTS: [B, H, T, W + T] factors on the weights, or None.
        """
        c, (batch, tokens, hidden) = self.config, x_BTD.shape
        dense = lambda name: Dense(
            hidden,
            ("heads", "embed") if name == "o" else ("embed", "heads"),
            uniform(hidden),
            c.dtype,
            c.param_dtype,
            name=f"{name}_proj",
        )
        seen_BSD = jnp.concatenate([memory_BWD, x_BTD], axis=1)
        split = lambda x: x.reshape(batch, x.shape[1], c.num_heads, c.head_dim)
        q, k, v = split(dense("q")(x_BTD)), split(dense("k")(seen_BSD)), split(dense("v")(seen_BSD))
        wide = accumulation_dtype(q.dtype)
        logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=wide)
        place = jnp.einsum("bthk,kw->bhtw", q, place_KW, preferred_element_type=wide)
        logits = (logits + _shift(place)) / c.head_dim**0.5
        ahead_TS = jnp.arange(seen_BSD.shape[1])[None] - jnp.arange(tokens)[:, None]
        window_TS = (ahead_TS >= 0) & (ahead_TS < c.span)
        lowest = jnp.finfo(wide).min
        weights = jax.nn.softmax(jnp.where(window_TS[None, None], logits, lowest), axis=-1)
        if keep_BHTS is not None:
            weights = weights * keep_BHTS.astype(wide)
        o_BTHK = jnp.einsum("bhts,bshk->bthk", weights.astype(v.dtype), v)
        return dense("o")(o_BTHK.reshape(batch, tokens, hidden))


class SeqBlock(nn.Module):
    """One layer."""

    config: RMoESeqConfig

    @nn.compact
    def __call__(self, carry, memory_BWD, layer, shared, place_KW, keys_B, mask_BT):
        """carry: (x [B, T, D], router's Carry); returns it and the memory after x."""
        c = self.config
        x_BTD, remembered = carry
        mask_T = None
        if mask_BT is not None:  # like the zeros before a text
            x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0)
            mask_T = mask_BT.reshape(-1)
        (_, tokens, hidden), width = x_BTD.shape, c.span
        keep: Any = lambda shape, what: None
        if keys_B is not None and c.dropout:
            keys_B = jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys_B)
            keep = lambda shape, what: _dropout(keys_B, what, shape, c.dropout)
        norm = lambda name: LayerNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, name=name)
        attention = SpanAttention(c, name="attn")
        kept = keep((c.num_heads, tokens, width + tokens), 0)
        h_BTD = attention(x_BTD, memory_BWD, place_KW, kept)
        u_BTD = norm("attn_norm")(x_BTD + h_BTD)
        kept = keep((tokens, c.experts_per_token, c.intermediate_size), 1)
        kept = None if kept is None else kept.reshape(-1, *kept.shape[2:])
        u_TD = u_BTD.reshape(-1, hidden)
        y_TD, remembered = MoE(c, name="moe")(u_TD, shared, remembered, mask_T, kept)
        y_BTD, kept = y_TD.reshape(x_BTD.shape), keep((tokens, hidden), 2)
        y_BTD = y_BTD if kept is None else y_BTD * kept.astype(y_BTD.dtype)
        m_BTD = norm("moe_norm")(u_BTD + y_BTD)
        self.sow(ROUTING, "output", m_BTD)
        norm("unused_norm")(x_BTD[:, :1])  # published models have it, and count it
        after = jnp.concatenate([memory_BWD, x_BTD.astype(memory_BWD.dtype)], axis=1)[:, -width:]
        return (norm("mlp_norm")(u_BTD + m_BTD), remembered), jax.lax.stop_gradient(after)


class RMoESeqLM(nn.Module):
    """Causal language model; the collections of :mod:`moe` are filled as in ``RMoELM``."""

    config: RMoESeqConfig

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        *,
        mask: jax.Array | None = None,
        cache: jax.Array | None = None,
        keys: jax.Array | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits of the token after every position.

        Args:
          ids: [B, T] int tokens.
          mask: [B, T] bool, True = a token; only places before a text may be False.
          cache: [B, L, W, D] of an earlier call or :func:`empty_seq_cache`; None for the latter.
          keys: [B] PRNG keys of the rows' dropout; None for none.
          last_only: logits of the last position alone, [B, 1, S].

        Returns:
          logits [B, T, S], float32 or better, and the cache after the last token.
        """
        c = self.config
        memory_BLWD: Any = empty_seq_cache(c, len(ids)) if cache is None else cache
        normal, dtype = nn.initializers.normal(1.0), c.param_dtype
        shape = (c.vocab_size, c.hidden_size)
        embedding_SD = parameter(self, "embeddings", normal, ("vocab", "embed"), shape, dtype)
        shape = (c.head_dim, c.span)
        place_KW = parameter(self, "places", normal, ("head_dim", "span"), shape, dtype)
        shared = RouterCell(c, name="router")() if c.router_cell != "none" else {}
        x_BTD = by_rows(embedding_SD[ids].astype(c.dtype))
        carry = (x_BTD, router.start(c.router, ids.size, x_BTD.dtype))
        numbers = jnp.arange(c.num_hidden_layers)
        axes = (1, 0, None, None, None, None)
        stack = scanned(SeqBlock, c, c.num_hidden_layers, axes, out_axis=1)(c, name="layers")
        place_KW = place_KW.astype(c.dtype)
        carry, memory_BLWD = stack(carry, memory_BLWD, numbers, shared, place_KW, keys, mask)
        x_BTD = carry[0][:, -1:] if last_only else carry[0]
        wide, init = accumulation_dtype(x_BTD.dtype), uniform(c.hidden_size)
        axes = ("embed", "vocab")
        head = Dense(c.vocab_size, axes, init, c.dtype, dtype, wide, name="lm_head")
        bias_S = parameter(self, "lm_head_bias", init, ("vocab",), (c.vocab_size,), dtype)
        return head(x_BTD) + bias_S.astype(wide)[None, None], memory_BLWD


def empty_seq_cache(c: RMoESeqConfig, batch: int) -> jax.Array:
    """The cache before a text: [B, L, W, D] zeros."""
    return jnp.zeros((batch, c.num_hidden_layers, c.span, c.hidden_size), c.dtype)


def _shift(x_BHTW: jax.Array) -> jax.Array:
    """[B, H, T, W + T], row t moved to the right by t."""
    *batch, tokens, width = x_BHTW.shape
    x = jnp.pad(x_BHTW, [(0, 0)] * (len(batch) + 1) + [(0, tokens + 1)])
    x = x.reshape(*batch, -1)[..., : tokens * (width + tokens)]
    return x.reshape(*batch, tokens, width + tokens)


def _dropout(keys_B: jax.Array, what: int, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Factors [B, ...]: 0 with the probability ``rate``, else 1 / (1 - rate)."""

    def row(key):
        return jax.random.bernoulli(jax.random.fold_in(key, what), 1 - rate, shape)

    return jax.vmap(row)(keys_B).astype(jnp.float32) / (1 - rate)
