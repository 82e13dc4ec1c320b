"""The token mixer of a block: attention, or the layer of another family as that family has it.

Dimensions: B batch, T tokens, D hidden, H heads, K, V key and value width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import delta_product, lightnet
from ..layers import segment_runs
from ..lightnet.block import positions
from ..lightnet.language_model import places
from .attention import Attention, empty_kv
from .config import RMoEConfig

STATE = {"delta_product": "state", "lightnet": "s"}  # the matrix in a layer's cache


class Places(NamedTuple):
    """What LightNet's positions carry from token to token.

    Attributes:
      tpe: [B, D] state of MD-TPE.
      offset: [B] int32, tokens seen.
    """

    tpe: jax.Array
    offset: jax.Array


class Cache(NamedTuple):
    """What decoding carries: nothing of the router.

    Attributes:
      dense_layers, layers: caches of the mixer (``KVCache``, or another family's ``LayerCache``)
        with a first axis of layers; None where there are no such layers.
      places: of mixer lightnet, else None.
    """

    dense_layers: Any
    layers: Any
    places: Places | None


def mix(c: RMoEConfig, x_BTD, place_BT, mask, segment_ids, cache):
    """y [B, T, D], and the mixer's cache after it, or None without one.

    Call it where a block is built: "attn" becomes a submodule of it.

    Args:
      c: of the model.
      x_BTD: normalised tokens.
      place_BT: of :func:`place`; for lightnet.
      mask, segment_ids, cache: see the mixers.
    """
    options = {"mask": mask, "segment_ids": segment_ids, "cache": cache}
    if c.mixer == "attention":
        return Attention(c, name="attn")(x_BTD, **options)
    if c.mixer == "delta_product":
        y_BTD, after = delta_product.DeltaProduct(c.mixing, name="attn")(x_BTD, **options)
    else:
        layer = lightnet.Mixer(c.mixing, True, name="attn")
        y_BTD, after = layer(x_BTD, place_BT[..., None], **options)
    return y_BTD, None if cache is None else after


def place(c: RMoEConfig, x_BTD, mask, segment_ids, before: Places | None):
    """Positions of lightnet, on the embedded tokens and for its layers, as in ``LightNetLM``.

    Call it where the model is built: "tpe" becomes a submodule of it.

    Returns:
      x [B, T, D] with MD-TPE, places [B or 1, T] for MD-LRPE, and ``Places`` after the last token.
    """
    options = {"mask": mask, "segment_ids": segment_runs(segment_ids, mask)}
    state, offset = (None, None) if before is None else before
    layer: Any = positions(c.mixing, 1, "tpe")
    x_BTD, tpe = layer(x_BTD, state=state, **options)
    place_BT, offset = places(x_BTD.shape[:2], mask, offset)
    return x_BTD, place_BT, Places(tpe, offset)


def empty_cache(c: RMoEConfig, batch: int, length: int) -> Cache:
    """The cache before the first token; of attention with room for ``length``, padding included."""
    where = None
    if c.mixer == "attention":
        layers = [empty_kv(c, batch, length) for _ in range(c.num_hidden_layers)]
    elif c.mixer == "delta_product":
        layers = delta_product.empty_cache(c.mixing, batch)
    else:
        start: Any = lightnet.empty_cache(c.mixing, batch)
        layers, where = start.layers, Places(start.tpe, start.offset)
    stacked = lambda part: jax.tree.map(lambda *x: jnp.stack(x), *part) if part else None
    dense = c.num_dense_layers
    return Cache(stacked(layers[:dense]), stacked(layers[dense:]), where)


def states(c: RMoEConfig, cache: Cache) -> jax.Array:
    """The layers' matrices [layers, B, H, K, V]; not for attention, which has none."""
    parts = [part for part in (cache.dense_layers, cache.layers) if part is not None]
    return jnp.concatenate([getattr(part, STATE[c.mixer]) for part in parts])
