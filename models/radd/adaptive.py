"""Orders that the network decides: the surest positions first.

Dimensions: R requests, B slots, T tokens, D hidden, V real tokens.

How many positions an event unmasks is the plan's: that of a diffusion sampler, or one. Which ones
is found from the distributions of all masked positions, so that the head runs everywhere in each
event. The law is another than that of the diffusion.
"""

import functools

import jax
import jax.numpy as jnp

from ..generation import Sampling
from . import events
from .network import Network, real_logits
from .plans import Plan

ORDERS = ("confidence", "entropy")


def sample(
    network: Network,
    key: jax.Array,
    start_RT: jax.Array,
    plan: Plan,
    sampling: Sampling | None = None,
    slots: int | None = None,
    *,
    order: str = "confidence",
) -> events.Sampled:
    """Fills the masks of all requests, as :func:`events.sample` does, but for the positions.

    Args:
      plan: how many positions an event unmasks; all masks of the start must be in it.
      order: confidence: the highest probability of a token first; entropy: the lowest entropy.
        Both of the network's distribution, before ``sampling``'s temperature and filters. The
        first of equals comes first.

    Raises:
      ValueError: as there, and for an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    choose = functools.partial(_surest, network, order)
    return events.sample(network, key, start_RT, plan, sampling, slots, choose=choose)


def _surest(network: Network, order: str, hidden_BTD, ids_BT, order_BT, first_B):
    """Masked positions, the surest first."""

    def doubt(hidden_BCD):
        log_p = jax.nn.log_softmax(real_logits(network, hidden_BCD), axis=-1)
        if order == "confidence":
            return -jnp.max(log_p, axis=-1)
        return -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, jnp.finfo(log_p.dtype).min), axis=-1)

    batch, tokens, width = hidden_BTD.shape
    size = min(tokens, events.PIECE)
    pieces = -(-tokens // size)  # so that logits of all positions need not be held at once
    padded = jnp.pad(hidden_BTD, ((0, 0), (0, pieces * size - tokens), (0, 0)))
    doubt_PBC = jax.lax.map(doubt, padded.reshape(batch, pieces, size, width).swapaxes(0, 1))
    doubt_BT = doubt_PBC.swapaxes(0, 1).reshape(batch, pieces * size)[:, :tokens]
    doubt_BT = jnp.where(ids_BT == network.vocab_size, doubt_BT, jnp.inf)
    return jnp.argsort(doubt_BT, axis=1).astype(order_BT.dtype), jnp.zeros_like(first_B)
