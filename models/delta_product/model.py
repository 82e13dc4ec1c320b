"""A language model of DeltaProduct blocks: embedding, pre-norm blocks, head.

Dimensions: B batch, T tokens, D hidden, S vocabulary size.

Block: h = x + mixer(RMSNorm(x)); y = h + SwiGLU(RMSNorm(h)). A final RMSNorm, then logits.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ...kernels.per_device import by_rows
from ..layers import RMSNorm, SwiGLU, next_token_logits, parameter
from .config import DeltaProductConfig
from .layer import DeltaProduct, LayerCache


class DeltaProductLM(nn.Module):
    """Causal language model of DeltaProduct blocks."""

    config: DeltaProductConfig

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: tuple[LayerCache, ...] | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Predicts the token after every position.

        Args:
          ids: [B, T] int tokens.
          mask: [B, T] bool, True for real tokens; see ``DeltaProduct``.
          segment_ids: [B, T] int; documents packed in one row, see ``DeltaProduct``.
          cache: as returned by an earlier call, to continue after its tokens.
          last_only: logits of the last position alone, [B, 1, S]: what generation needs.

        Returns:
          logits [B, T, S] (float32, or float64 if that is ``dtype``), and the cache, one
          entry per layer.

        Raises:
          ValueError: if the cache is not of this model or batch.
        """
        c = self.config
        if cache is not None:
            _check_cache(c, cache, ids.shape[0])
        init = nn.initializers.normal(c.initializer_range)
        axes, shape = ("vocab", "embed"), (c.vocab_size, c.hidden_size)
        embedding_SD = parameter(self, "embeddings", init, axes, shape, c.param_dtype)
        x_BTD = by_rows(embedding_SD[ids].astype(c.dtype))
        block = nn.remat(_Block) if c.remat else _Block
        caches = []
        for i in range(c.num_hidden_layers):
            layer_cache = None if cache is None else cache[i]
            x_BTD, layer_cache = block(c, name=f"layers_{i}")(x_BTD, mask, segment_ids, layer_cache)
            caches.append(layer_cache)
        x_BTD = x_BTD[:, -1:] if last_only else x_BTD
        logits_BTS = next_token_logits(x_BTD, embedding_SD, c)
        return logits_BTS, tuple(caches)


def empty_cache(c: DeltaProductConfig, batch: int) -> tuple[LayerCache, ...]:
    """The cache before the first token: zeros."""
    state = (batch, c.value_heads, c.head_dim, c.value_dim)
    widths = {"q": c.num_heads * c.head_dim}
    widths["k"] = c.num_householder * widths["q"]
    widths["v"] = c.num_householder * c.value_heads * c.value_dim
    dtype = jnp.dtype(c.dtype)

    def layer() -> LayerCache:
        history = {name: None for name in widths}
        if c.use_short_conv:
            shapes = {name: (batch, c.conv_size - 1, width) for name, width in widths.items()}
            history = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
        return LayerCache(jnp.zeros(state, accumulation_dtype(dtype)), *history.values())

    return tuple(layer() for _ in range(c.num_hidden_layers))


def _check_cache(c: DeltaProductConfig, cache: tuple[LayerCache, ...], batch: int) -> None:
    """Raises a ValueError that says what does not fit."""
    expected = jax.eval_shape(lambda: empty_cache(c, batch))
    if len(cache) != len(expected):
        raise ValueError(
            f"the cache is of another model: it has {len(cache)} layers, this model {len(expected)}"
        )
    for i, (given, wanted) in enumerate(zip(cache, expected, strict=True)):
        for name in LayerCache._fields:
            shapes = [getattr(getattr(x, name), "shape", None) for x in (given, wanted)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the cache is of another model or batch: {name} of layer {i} has shape"
                    f" {shapes[0]}, expected {shapes[1]}"
                )


class _Block(nn.Module):
    config: DeltaProductConfig

    @nn.compact
    def __call__(self, x_BTD, mask, segment_ids, cache):
        c = self.config
        norm = lambda name: RMSNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, name=name)
        y_BTD, cache = DeltaProduct(c, name="attn")(
            norm("attn_norm")(x_BTD), mask=mask, segment_ids=segment_ids, cache=cache
        )
        x_BTD = x_BTD + y_BTD
        init = nn.initializers.normal(c.initializer_range)
        mlp = SwiGLU(c.mlp_size, init, c.dtype, c.param_dtype, name="mlp")
        return x_BTD + mlp(norm("mlp_norm")(x_BTD)), cache
