"""A language model of pre-norm blocks: rotary attention, then experts, under one router memory.

Dimensions: B batch, T tokens, D hidden, S vocabulary size, L layers with experts.

  x = x + attention(RMSNorm(x));  h = RMSNorm(x);  x = x + experts(h), chosen by a router that
  sees h and what the routers of the layers before remember

The memory is not part of the residual stream, and begins at zero in every pass: decoding
carries keys and values, and nothing of the router.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers import RMSNorm, SwiGLU, next_token_logits, parameter
from . import router
from .attention import Attention, empty_kv
from .config import RMoEConfig
from .moe import MoE, RouterCell, scanned


class Block(nn.Module):
    """One layer; ``moe`` False for a dense one, which hands the router's memory on."""

    config: RMoEConfig
    moe: bool

    @nn.compact
    def __call__(self, carry, cache, shared, mask, segment_ids):
        """carry: (x [B, T, D], router's Carry); returns it and the cache."""
        c = self.config
        x_BTD, memory = carry
        norm = lambda name: RMSNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, name=name)
        attention = Attention(c, name="attn")
        h_BTD, cache = attention(norm("attn_norm")(x_BTD), mask, segment_ids, cache)
        x_BTD = x_BTD + h_BTD
        h_BTD = norm("mlp_norm")(x_BTD)
        init = nn.initializers.normal(c.initializer_range)
        mlp = lambda size, name: SwiGLU(size, init, c.dtype, c.param_dtype, name=name)
        if not self.moe:
            return (x_BTD + mlp(c.dense_intermediate_size, "mlp")(h_BTD), memory), cache
        mask_T = None if mask is None else mask.reshape(-1)
        h_TD = h_BTD.reshape(-1, c.hidden_size)
        if cache is not None and c.capacity_factor:  # a row must not depend on its neighbours
            c = dataclasses.replace(c, capacity_factor=0.0, implementation="auto")
        y_TD, memory = MoE(c, name="moe")(h_TD, shared, memory, mask_T)
        y_BTD = y_TD.reshape(x_BTD.shape)
        if c.moe_bias:
            axes, zeros = ("embed",), nn.initializers.zeros
            bias_D = parameter(self, "moe_bias", zeros, axes, (c.hidden_size,), c.param_dtype)
            y_BTD = y_BTD + bias_D.astype(y_BTD.dtype)[None, None]
        if c.shared_expert_size:
            everyone = mlp(c.shared_expert_size, "shared_expert")(h_BTD)
            y_BTD = c.moe_weight * y_BTD + c.shared_weight * everyone
        return (x_BTD + y_BTD, memory), cache


class RMoELM(nn.Module):
    """Causal language model with a mixture of experts in its layers.

    The collections ``moe.STATISTICS`` and ``moe.ROUTING``, if mutable, hold the routers' values
    with a first axis of L.
    """

    config: RMoEConfig

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Any = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Logits of the token after every position.

        Args:
          ids: [B, T] int tokens.
          mask: [B, T] bool, True = a token; padding may stand on either side.
          segment_ids: [B, T] int; documents packed in one row. Their positions run on.
          cache: of :func:`empty_cache` or an earlier call, to continue after its tokens; without
            segments. Then no token is dropped, whatever ``capacity_factor`` is.
          last_only: logits of the last position alone, [B, 1, S].

        Returns:
          logits [B, T, S], float32 or better, and the cache, or None if none was given.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        axes, shape = ("vocab", "embed"), (c.vocab_size, c.hidden_size)
        embedding_SD = parameter(self, "embeddings", init, axes, shape, c.param_dtype)
        x_BTD = embedding_SD[ids].astype(c.dtype)
        shared = RouterCell(c, name="router")() if c.router_cell != "none" else {}
        carry = (x_BTD, router.start(c.router, ids.size, x_BTD.dtype))
        dense, sparse = (None, None) if cache is None else cache
        for moe, number, part in (
            (False, c.num_dense_layers, "dense_layers"),
            (True, c.num_hidden_layers - c.num_dense_layers, "layers"),
        ):
            if number:
                stack = scanned(Block, c, number, (0, None, None, None))(c, moe, name=part)
                given = sparse if moe else dense
                carry, given = stack(carry, given, shared, mask, segment_ids)
                dense, sparse = (dense, given) if moe else (given, sparse)
        x_BTD = carry[0][:, -1:] if last_only else carry[0]
        logits_BTS = next_token_logits(x_BTD, embedding_SD, c)
        return logits_BTS, None if cache is None else (dense, sparse)


def empty_cache(c: RMoEConfig, batch: int, length: int) -> tuple[Any, Any]:
    """Room for ``length`` tokens: caches of the dense layers and of the others, stacked."""

    def stacked(layers: int):
        rooms = [empty_kv(c, batch, length) for _ in range(layers)]
        return jax.tree.map(lambda *x: jnp.stack(x), *rooms) if rooms else None

    return stacked(c.num_dense_layers), stacked(c.num_hidden_layers - c.num_dense_layers)
