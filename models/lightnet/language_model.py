"""Language models of LightNet blocks: causal (next token) and bidirectional (masked tokens).

Dimensions: B batch, T tokens, D hidden, S vocabulary size.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ...kernels.per_device import by_rows
from ..layers import next_token_logits, parameter, segment_runs
from .block import block_of, positions
from .config import LightNetLMConfig
from .layer import LayerCache


class LMCache(NamedTuple):
    """What decoding carries from token to token: a few matrices, whatever came before.

    Attributes:
      layers: one entry per layer.
      tpe: [B, D] state of MD-TPE, or None without it.
      offset: [B] int32, tokens seen.
    """

    layers: tuple[LayerCache, ...]
    tpe: jax.Array | None
    offset: jax.Array


class LightNetLM(nn.Module):
    """Language model of LightNet blocks."""

    config: LightNetLMConfig

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: LMCache | None = None,
        last_only: bool = False,
        hidden_only: bool = False,
    ) -> tuple[jax.Array, LMCache | None]:
        """Logits of the token after every position (causal), or at it.

        Args:
          ids: [B, T] int tokens.
          mask: [B, T] bool, True = a token; see ``Mixer``.
          segment_ids: [B, T] int; documents packed in one row; causal only.
          cache: as returned by an earlier call, to continue after its tokens; causal only.
          last_only: logits of the last position alone, [B, 1, S]: what generation needs.
          hidden_only: what ``head`` makes logits of [B, T, D] in their place.

        Returns:
          logits [B, T, S] (float32, or float64 if that is ``dtype``), and the cache, or None for
          models that have none.

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
        segment_ids = segment_runs(segment_ids, mask)
        tpe = None
        if c.tpe != "none":
            options = {} if cache is None else {"state": cache.tpe}
            if segment_ids is not None:
                options["segment_ids"] = segment_ids
            x_BTD, tpe = positions(c, 1, "tpe")(x_BTD, mask=mask, **options)
        place_BT, offset = places(ids.shape, mask, None if cache is None else cache.offset)
        layers = []
        for i in range(c.num_hidden_layers):
            layer = None if cache is None else cache.layers[i]
            block = block_of(c)(c, c.causal, name=f"layers_{i}")
            x_BTD, layer = block(x_BTD, place_BT[..., None], mask, segment_ids, layer)
            layers.append(layer)
        x_BTD = x_BTD[:, -1:] if last_only else x_BTD
        y = x_BTD if hidden_only else next_token_logits(x_BTD, embedding_SD, c)
        if not has_cache(c):
            return y, None
        return y, LMCache(tuple(layers), tpe, offset)


class _Head(nn.Module):
    config: LightNetLMConfig

    @nn.compact
    def __call__(self, x: jax.Array, embedding_SD: jax.Array) -> jax.Array:
        return next_token_logits(x, embedding_SD, self.config)


def head(c: LightNetLMConfig, params: Any, x: jax.Array) -> jax.Array:
    """[..., D], the model's output with ``hidden_only``, -> its logits [..., S]."""
    own = {name: params[name] for name in ("norm", "lm_head") if name in params}
    return _Head(c).apply({"params": own}, x, params["embeddings"])  # pyright: ignore[reportReturnType]


def has_cache(c: LightNetLMConfig) -> bool:
    """Whether the model can decode from a state of constant size."""
    return c.causal and c.mixer != "softmax"


def empty_cache(c: LightNetLMConfig, batch: int) -> LMCache:
    """The cache before the first token."""
    dtype = jnp.dtype(c.dtype)
    wide = accumulation_dtype(dtype)
    state = (batch, c.num_heads, c.state_dim)
    z = {
        "lightnet": lambda: jnp.full(state, -jnp.inf, wide),
        "linear": lambda: jnp.zeros((batch, c.num_heads, c.key_dim), wide),
    }.get(c.mixer, lambda: None)
    key = c.num_heads * c.key_dim

    def history(width: int):
        return jnp.zeros((batch, c.conv_size - 1, width), dtype) if c.use_short_conv else None

    def layer() -> LayerCache:
        s = jnp.zeros((*state, c.value_dim), wide)
        return LayerCache(s, z(), history(key), history(key), history(c.hidden_size))

    tpe = jnp.zeros((batch, c.hidden_size), wide) if c.tpe != "none" else None
    layers = tuple(layer() for _ in range(c.num_hidden_layers))
    return LMCache(layers, tpe, jnp.zeros(batch, jnp.int32))


def places(shape: tuple[int, ...], mask, offset_B):
    """[B or 1, T] number of every token in its row, and the tokens seen after the last one [B]."""
    batch, tokens = shape
    seen_B = jnp.zeros(batch, jnp.int32) if offset_B is None else offset_B
    if mask is None:
        place_1T = jnp.arange(tokens, dtype=jnp.int32)[None]
        place_BT = place_1T if offset_B is None else place_1T + seen_B[:, None]
        return place_BT, seen_B + tokens
    count_BT = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    return seen_B[:, None] + jnp.maximum(count_BT - 1, 0), seen_B + count_BT[:, -1]


def _check_cache(c: LightNetLMConfig, cache: LMCache, batch: int) -> None:
    """Raises a ValueError that says what does not fit."""
    if not has_cache(c):
        raise ValueError(f"mixer {c.mixer!r} (causal={c.causal}) has no state to continue from")
    expected = jax.eval_shape(lambda: empty_cache(c, batch))
    flat = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))
    shapes = [
        {jax.tree_util.keystr(p): x.shape for p, x in flat(t).items()} for t in (cache, expected)
    ]
    for name in sorted(shapes[0] | shapes[1]):
        found, wanted = (s.get(name) for s in shapes)
        if found != wanted:
            raise ValueError(
                f"the cache is of another model or batch: {name[1:]} has shape {found},"
                f" expected {wanted}"
            )
