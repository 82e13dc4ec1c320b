"""The definition of the (gated) DeltaProduct recurrence, one token after another.

Dimensions: B batch, T tokens, N Householder steps per token, H heads, K key, V value.

For token t the state S (a K x V matrix per head) is first decayed, then taken through N
delta steps, then read (Siems et al., "DeltaProduct: Improving State-Tracking in Linear
RNNs via Householder Products", 2025, section 3; the gate as in Gated DeltaNet):

  S <- exp(g_t) S
  S <- (I - beta_j k_j k_j^T) S + beta_j k_j v_j^T        for j = 0 .. N-1
  o_t = scale * S^T q_t

This file is meant to be read and to be trusted, not to be fast. It works in any float
dtype, and its gradients come from automatic differentiation.
"""

import jax
import jax.numpy as jnp


def delta_product_reference(q, k, v, beta, g, state, reset, *, scale, chunk_size=None):
    """Runs the recurrence with ``lax.scan`` over tokens.

    Args:
      q: [B, T, H, K].
      k: [B, T, N, H, K].
      v: [B, T, N, H, V].
      beta: [B, T, N, H].
      g: [B, T, H] log decay, or None.
      state: [B, H, K, V], the state before the first token.
      reset: [B, T] bool, True where the state is cleared before the token, or None.
      scale: factor on the output.
      chunk_size: ignored; part of the common signature.

    Returns:
      o [B, T, H, V] in q's dtype, and the state after the last token [B, H, K, V].
    """
    del chunk_size
    tokens = (q, k, v, beta, g, reset)  # None entries are empty pytrees: scan passes them on

    def token(state_BHKV, token_inputs):
        q_BHK, k_BNHK, v_BNHV, beta_BNH, g_BH, reset_B = token_inputs
        if reset_B is not None:
            state_BHKV = jnp.where(reset_B[:, None, None, None], 0, state_BHKV)
        o_BHV, state_BHKV = delta_product_step(
            q_BHK, k_BNHK, v_BNHV, beta_BNH, g_BH, state_BHKV, scale=scale
        )
        return state_BHKV, o_BHV

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, o_TBHV = jax.lax.scan(token, state, tokens)
    return jnp.moveaxis(o_TBHV, 0, 1), state


def delta_product_step(q, k, v, beta, g, state, *, scale):
    """One token: q [B,H,K], k [B,N,H,K], v [B,N,H,V], beta [B,N,H], g [B,H] or None."""
    dtype = state.dtype
    q_BHK, k_BNHK, v_BNHV, beta_BNH = (x.astype(dtype) for x in (q, k, v, beta))
    if g is not None:
        state = jnp.exp(g.astype(dtype))[:, :, None, None] * state
    for j in range(k.shape[1]):
        k_BHK = k_BNHK[:, j]
        predicted_BHV = _read(state, k_BHK)
        u_BHV = beta_BNH[:, j, :, None] * (v_BNHV[:, j] - predicted_BHV)
        state = state + k_BHK[..., :, None] * u_BHV[..., None, :]
    return (scale * _read(state, q_BHK)).astype(q.dtype), state


def _read(state_BHKV, key_BHK):
    """State^T key, as a sum over the key dimension: [B, H, V]."""
    return jnp.sum(state_BHKV * key_BHK[..., None], axis=-2)
