"""What the samplers ask of a network.

Dimensions: B rows, T tokens, D hidden, V real tokens, S >= V columns of the head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import core
import jax.numpy as jnp
import numpy as np


class Network(NamedTuple):
    """A network in two parts, so that the head runs only where it is needed.

    Attributes:
      body: ids [B, T] int32, in [0, V] -> hidden [B, T, D].
      head: hidden [..., D] -> logits [..., S]; the columns from V on are dropped before anything
        else is done.
      vocab_size: V; the mask's id is V.
    """

    body: Callable[[jax.Array], jax.Array]
    head: Callable[[jax.Array], jax.Array]
    vocab_size: int


def real_logits(network: Network, hidden: jax.Array) -> jax.Array:
    """[..., D] -> logits [..., V] of the real tokens, float32 or better.

    Raises:
      ValueError: if the head has fewer than V columns.
    """
    logits = network.head(hidden)
    if logits.shape[-1] < network.vocab_size:
        raise ValueError(f"the head has {logits.shape[-1]} columns, needs {network.vocab_size}")
    wide = logits.dtype if jnp.finfo(logits.dtype).bits >= 32 else jnp.float32
    return logits[..., : network.vocab_size].astype(wide)


def check_ids(network: Network, ids: jax.Array) -> None:
    """A ValueError unless ids [rows, T] are int32 and, where they are known, in [0, V]."""
    if ids.ndim != 2 or ids.dtype != jnp.int32 or 0 in ids.shape:
        raise ValueError(f"ids must be [rows, T] int32, got {ids.shape} {ids.dtype}")
    if isinstance(ids, core.Tracer):
        return
    known = np.asarray(ids)
    if known.min() < 0 or known.max() > network.vocab_size:
        raise ValueError(f"ids must be in [0, {network.vocab_size}], where the last is the mask")
