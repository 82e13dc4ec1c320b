"""Entropies of a network's output at the clean tokens, and the likelihood of a fixed order.

Dimensions: B examples, T tokens, V real tokens, S >= V columns of a network's output.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype


def cross_entropy(logits_BTS: jax.Array, x0_BT: jax.Array, vocabulary: int) -> jax.Array:
    """-log softmax over the first V columns, at x0: [B, T], float32 or better.

    Args:
      logits_BTS: logits, or logs of what they stand for; columns from V on are ignored.
      x0_BT: ids below V.
      vocabulary: V.
    """
    if logits_BTS.shape[-1] < vocabulary:
        raise ValueError(f"{logits_BTS.shape[-1]} columns for a vocabulary of {vocabulary}")
    logits_BTV = logits_BTS[..., :vocabulary]
    logits_BTV = logits_BTV.astype(accumulation_dtype(logits_BTV.dtype))
    return jax.nn.logsumexp(logits_BTV, axis=-1) - _at(logits_BTV, x0_BT)


def score_entropy(
    log_score_BTV: jax.Array,
    x0_BT: jax.Array,
    mask_BT: jax.Array,
    rate_B: jax.Array,
    log_odds_B: jax.Array,
) -> jax.Array:
    """The score entropy of scores that need not be normalised, per token: [B, T], 0 unmasked.

      sigma [ sum_v score_v - s log(score_x0) + s (log(s) - 1) ]     (Lou et al. 2024)

    Of score = s c with a normalised c it is t_dse's sigma s CE.

    Args:
      log_score_BTV: over the real tokens only.
      x0_BT: ids below V.
      mask_BT: bool.
      rate_B, log_odds_B: sigma and log(s), the schedule's ``rate`` and ``log_odds`` at t.
    """
    dtype = log_score_BTV.dtype
    log_s_B1, rate_B1 = log_odds_B.astype(dtype)[:, None], rate_B.astype(dtype)[:, None]
    s_B1 = jnp.exp(log_s_B1)
    total_BT = jnp.sum(jnp.exp(log_score_BTV), axis=-1)
    entropy_BT = total_BT - s_B1 * _at(log_score_BTV, x0_BT) + s_B1 * (log_s_B1 - 1)
    return jnp.where(mask_BT, rate_B1 * entropy_BT, 0)


def ar_nats(
    conditionals: Callable[[jax.Array], jax.Array],
    x0_BT: jax.Array,
    order: jax.Array,
    mask_id: int,
) -> jax.Array:
    """-log q(x0) of a network that fills positions in a fixed order, T calls of it: [B].

    Args:
      conditionals: ids [B, T] -> log probabilities [B, T, >= V].
      x0_BT: ids below V.
      order: positions, first to last: [T], or [B, T] with one order per example.
      mask_id: what stands for a masked token.
    """
    order_BT = order if order.ndim == 2 else jnp.tile(order[None], (x0_BT.shape[0], 1))
    if order_BT.shape != x0_BT.shape:
        raise ValueError(f"an order of {order.shape} does not fit ids {x0_BT.shape}")
    rank_BT = jnp.argsort(order_BT, axis=1).astype(jnp.int32)  # when each position is filled

    def fill(_, step):
        x_BT = jnp.where(rank_BT >= step, jnp.asarray(mask_id, x0_BT.dtype), x0_BT)
        log_BT = _at(conditionals(x_BT), x0_BT)
        return None, jnp.sum(jnp.where(rank_BT == step, log_BT, 0), axis=1)

    steps_T = jnp.arange(x0_BT.shape[1], dtype=jnp.int32)
    return -jnp.sum(jax.lax.scan(fill, None, steps_T)[1], axis=0)


def _at(values_BTV: jax.Array, x0_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BTV, x0_BT[..., None], axis=-1)[..., 0]
