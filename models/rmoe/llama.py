"""A language model of pre-norm blocks: a token mixer, then experts, under one router memory.

Dimensions: B batch, T tokens, D hidden, S vocabulary size, L layers with experts.

  x = x + mixer(RMSNorm(x));  h = RMSNorm(x);  x = x + experts(h), chosen by a router that
  sees h and what the routers of the layers before remember

The mixer is rotary attention in the paper's models; RMoE on the layers of the other families is
this project's own. The router's memory is not part of the residual stream, and begins at zero in
every pass: decoding carries the mixer's cache, and nothing of the router.
"""

import dataclasses

import flax.linen as nn
import jax

from ...kernels.per_device import by_rows
from ..layers import RMSNorm, SwiGLU, next_token_logits, parameter
from . import router
from .config import RMoEConfig
from .mixer import Cache, mix, place
from .moe import MoE, RouterCell, scanned


class Block(nn.Module):
    """One layer; ``moe`` False for a dense one, which hands the router's memory on."""

    config: RMoEConfig
    moe: bool

    @nn.compact
    def __call__(self, carry, cache, shared, mask, segment_ids, place_BT):
        """carry: (x [B, T, D], router's Carry); returns it and the cache."""
        c = self.config
        x_BTD, memory = carry
        norm = lambda name: RMSNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, name=name)
        h_BTD, cache = mix(c, norm("attn_norm")(x_BTD), place_BT, mask, segment_ids, cache)
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
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Logits of the token after every position.

        Args:
          ids: [B, T] int tokens.
          mask: [B, T] bool, True = a token; padding may stand on either side.
          segment_ids: [B, T] int; documents packed in one row. Their positions run on.
          cache: of :func:`empty_cache` or an earlier call, to continue after its tokens; without
            segments where the mixer is attention. Then no token is dropped, whatever
            ``capacity_factor`` is.
          last_only: logits of the last position alone, [B, 1, S].

        Returns:
          logits [B, T, S], float32 or better, and the cache, or None if none was given.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        axes, shape = ("vocab", "embed"), (c.vocab_size, c.hidden_size)
        embedding_SD = parameter(self, "embeddings", init, axes, shape, c.param_dtype)
        x_BTD = by_rows(embedding_SD[ids].astype(c.dtype))
        after, place_BT = Cache(None, None, None) if cache is None else cache, None
        if c.mixer == "lightnet":
            x_BTD, place_BT, end = place(c, x_BTD, mask, segment_ids, after.places)
            after = after._replace(places=end)
        shared = RouterCell(c, name="router")() if c.router_cell != "none" else {}
        carry = (x_BTD, router.start(c.router, ids.size, x_BTD.dtype))
        dense = c.num_dense_layers
        for part, number in (("dense_layers", dense), ("layers", c.num_hidden_layers - dense)):
            if number:
                axes, moe = (0, None, None, None, None), part == "layers"
                stack = scanned(Block, c, number, axes)(c, moe, name=part)
                given = getattr(after, part)
                carry, given = stack(carry, given, shared, mask, segment_ids, place_BT)
                after = after._replace(**{part: given})
        x_BTD = carry[0][:, -1:] if last_only else carry[0]
        logits_BTS = next_token_logits(x_BTD, embedding_SD, c)
        return logits_BTS, None if cache is None else after
