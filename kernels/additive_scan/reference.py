"""The definition of the additive recurrence, one token after another.

Dimensions: B batch, T tokens, H heads, K key channels, V value.

The keys are logits. Per key channel the state S is the average of the values so far, weighted by
a softmax of the logits over time, and z is the logarithm of the sum of the weights (Qin et al.,
"You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", 2024):

  z_t = log(exp(z_{t-1}) + exp(k_t))
  S_t = exp(z_{t-1} - z_t) S_{t-1} + exp(k_t - z_t) v_t^T
  o_t = scale * S_t^T q_t

Optional factors f_t multiply the weight exp(k_t - z_t) of a value and leave z alone: that is how a
position (MD-LRPE) turns a key after it has been normalised.

A logit of -inf is a token that is not there. Before the first token z is -inf, and a state that
is given without z does not decay at the first token: exp(z_{t-1} - z_t) := 1.

This file is meant to be read and to be trusted, not to be fast. It works in any float dtype, and
its gradients come from automatic differentiation.
"""

import jax
import jax.numpy as jnp

State = tuple[jax.Array, jax.Array]  # S [B, H, K, V], z [B, H, K]


def additive_scan_reference(q, k, v, k_factor, state: State, reset, *, scale, chunk_size=None):
    """Runs the recurrence with ``lax.scan`` over tokens.

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      k_factor: [B, T, H, K], or None for ones.
      state: S [B, H, K, V] and z [B, H, K] before the first token.
      reset: [B, T] bool, True where the state is cleared before the token, or None.
      scale: factor on the output.
      chunk_size: ignored; part of the common signature.

    Returns:
      o [B, T, H, V] in q's dtype, and the state after the last token.
    """
    del chunk_size

    def token(state, inputs):
        q_BHK, k_BHK, v_BHV, f_BHK, reset_B = inputs
        if reset_B is not None:
            s_BHKV, z_BHK = state
            s_BHKV = jnp.where(reset_B[:, None, None, None], 0, s_BHKV)
            state = s_BHKV, jnp.where(reset_B[:, None, None], -jnp.inf, z_BHK)
        o_BHV, state = additive_step(q_BHK, k_BHK, v_BHV, f_BHK, state, scale=scale)
        return state, o_BHV

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, k_factor, reset))
    state, o_TBHV = jax.lax.scan(token, state, tokens)
    return jnp.moveaxis(o_TBHV, 0, 1), state


def additive_step(q, k, v, k_factor, state: State, *, scale):
    """One token: q, k [B, H, K]; v [B, H, V]; k_factor [B, H, K] or None."""
    s_BHKV, before_BHK = state
    dtype = s_BHKV.dtype
    q_BHK, k_BHK, v_BHV = (x.astype(dtype) for x in (q, k, v))
    # The inner `where`s keep gradients finite where nothing has come yet.
    none = (before_BHK == -jnp.inf) & (k_BHK == -jnp.inf)
    fill = lambda x_BHK: jnp.where(none, 0, x_BHK)
    sum_BHK = jnp.logaddexp(fill(before_BHK), fill(k_BHK))
    first = before_BHK == -jnp.inf
    decay_BHK = jnp.exp(jnp.where(first, 0, before_BHK - sum_BHK))
    weight_BHK = jnp.exp(k_BHK - sum_BHK)
    if k_factor is not None:
        weight_BHK = weight_BHK * k_factor.astype(dtype)
    s_BHKV = decay_BHK[..., None] * s_BHKV + weight_BHK[..., None] * v_BHV[..., None, :]
    o_BHV = scale * jnp.sum(s_BHKV * q_BHK[..., None], axis=-2)
    return o_BHV.astype(q.dtype), (s_BHKV, jnp.where(none, -jnp.inf, sum_BHK))
