"""Losses that keep the experts of a mixture equally busy, and the logits small.

Dimensions: L layers, T tokens, E experts, J chosen.

All are functions of the statistics of a layer, which are sums over the tokens of a microbatch,
those on all devices. The balance is a product of means: every microbatch has its own, and a batch
in several of them has another loss than in one. The number of devices changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FORMS = ("pooled", "layer_mean", "layer_sum")


class Statistics(NamedTuple):
    """Sums over the tokens of a layer, or of L layers along a first axis.

    Attributes:
      chosen: [E] how often each expert was chosen.
      probability: [E] of each expert, of the softmax over all.
      z: [] of logsumexp(logits) squared.
      tokens: [] how many.
    """

    chosen: jax.Array
    probability: jax.Array
    z: jax.Array
    tokens: jax.Array


def statistics(
    logits: jax.Array,
    index: jax.Array,
    mask: jax.Array | None = None,
    temperature: float = 1.0,
) -> Statistics:
    """Of logits [T, E] and choices [T, J]; tokens whose mask [T] is False do not count.

    Probabilities are of the logits divided by the temperature.
    """
    real_T = jnp.ones(len(logits), logits.dtype) if mask is None else mask.astype(logits.dtype)
    chosen_TJE = jax.nn.one_hot(index, logits.shape[1], dtype=logits.dtype)
    lse_T = jax.nn.logsumexp(logits, axis=1)
    return Statistics(
        jnp.einsum("t,tje->e", real_T, chosen_TJE),
        jnp.einsum("t,te->e", real_T, jax.nn.softmax(logits / temperature, axis=1)),
        jnp.sum(real_T * jnp.square(lse_T)),
        jnp.sum(real_T),
    )


def balance(s: Statistics, form: str, choices: int) -> jax.Array:
    """Load balance of L layers, smallest where all experts are used alike.

    With c_e the times an expert was chosen, P_e its mean probability:

      "pooled": E sum_e c_e / T  P_e, over the tokens of all layers together, whose smallest value
        is J (transformers' Mixtral, and the large models);
      "layer_mean": the mean over layers of the same;
      "layer_sum": the sum over layers of E sum_e c_e / (T J)  P_e / J, 1 / J each (FastMoE's, and
        the small models).

    Args:
      s: statistics with a first axis of L layers.
      form: one of FORMS.
      choices: J.
    """
    experts = s.chosen.shape[-1]
    if form == "pooled":
        s = jax.tree.map(lambda x: jnp.sum(x, axis=0, keepdims=True), s)
    elif form not in FORMS:
        raise ValueError(f"balance form {form!r} must be one of {', '.join(FORMS)}")
    tokens_L1 = jnp.maximum(s.tokens, 1)[:, None]
    loss_L = experts * jnp.sum(s.chosen / tokens_L1 * (s.probability / tokens_L1), axis=1)
    return jnp.sum(loss_L) / choices**2 if form == "layer_sum" else jnp.mean(loss_L)


def z_loss(s: Statistics) -> jax.Array:
    """Mean over layers and tokens of logsumexp(logits) squared (Zoph et al. 2022, equation 5)."""
    return jnp.mean(s.z / jnp.maximum(s.tokens, 1))
