"""One chunk of the DeltaProduct recurrence in WY form: forward and hand-written backward.

This is the mathematics that chunked implementations share; it knows nothing of scans,
padding or dispatch. Notation (all arrays may carry leading batch dimensions):

  C tokens in the chunk, N steps per token, L = C * N micro-steps, K key, V value.
  s, r  micro-steps (s // N is the token);  t  token
  G_t   log decay accumulated from the start of the chunk, token t included
  H     state entering the chunk [K, V];  H_C  state leaving it

Within the chunk the product of Householder steps unrolls into pseudo-values u_s, with

  H_s = e^{G_s} H + sum_{r <= s} e^{G_s - G_r} k_r u_r^T
  u   = T (beta * v - beta * e^G * (k H)),   T = (I + A)^{-1}
  A_sr = beta_s e^{G_s - G_r} (k_s . k_r)                          for r < s, else 0
  o_t = e^{G_t} q_t H + sum_s P_ts u_s,   P_ts = e^{G_t - G_s} (q_t . k_s)  for s // N <= t
  H_C = e^{G_end} H + sum_s e^{G_end - G_s} k_s u_s^T

(Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", with N steps per
token; q carries the output scale.) Exponents appear only as differences <= 0, masked before
the exponential. A state that is cleared inside the chunk is a mask on the same factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


class Decay(NamedTuple):
    """Decay factors of a chunk; a cleared state is a factor of exactly 0."""

    within_CC: jax.Array  # from token r (column) to token t (row); 0 above the diagonal
    enter_C: jax.Array  # from the chunk's start to token t
    leave_C: jax.Array  # from token t to the chunk's end
    across: jax.Array  # from the chunk's start to its end; no token axis


class Chunk(NamedTuple):
    """Everything about a chunk that does not depend on the state entering it."""

    q_CK: jax.Array
    k_LK: jax.Array
    v_LV: jax.Array
    beta_L1: jax.Array
    decay_LL: jax.Array  # e^{G_s - G_r} for r < s, else 0
    decay_CL: jax.Array  # e^{G_t - G_s} for s // N <= t, else 0
    enter_C1: jax.Array
    enter_L1: jax.Array
    leave_L1: jax.Array
    across_11: jax.Array
    kk_LL: jax.Array  # k_s . k_r
    inverse_LL: jax.Array  # T
    p_CL: jax.Array  # P


def decays(g_C, run_C, entering_run, shape: tuple[int, ...], dtype) -> Decay:
    """Decay factors from log decays and run numbers.

    Args:
      g_C: [..., C] log decay per token (<= 0), or None for no decay.
      run_C: [..., C] number of state resets so far, counted over the whole row, or None.
      entering_run: [...] the run number of the token before the chunk (with run_C).
      shape: [..., C], the leading dimensions of the chunk's arrays.
      dtype: of the result.
    """
    lower_CC = jnp.tril(jnp.ones((*shape, shape[-1]), bool))
    ones_C = jnp.ones(shape, dtype)
    decay = Decay(lower_CC.astype(dtype), ones_C, ones_C, ones_C[..., 0])
    if g_C is not None:
        sum_C = jnp.cumsum(g_C.astype(dtype), axis=-1)
        difference_CC = sum_C[..., :, None] - sum_C[..., None, :]
        within_CC = jnp.exp(jnp.where(lower_CC, difference_CC, 0))
        decay = Decay(
            jnp.where(lower_CC, within_CC, 0),
            jnp.exp(sum_C),
            jnp.exp(sum_C[..., -1:] - sum_C),
            jnp.exp(sum_C[..., -1]),
        )
    if run_C is not None:
        same_CC = run_C[..., :, None] == run_C[..., None, :]
        decay = Decay(
            jnp.where(same_CC, decay.within_CC, 0),
            jnp.where(run_C == entering_run[..., None], decay.enter_C, 0),
            jnp.where(run_C == run_C[..., -1:], decay.leave_C, 0),
            jnp.where(run_C[..., -1] == entering_run, decay.across, 0),
        )
    return decay


def prepare(q_CK, k_LK, v_LV, beta_L, decay: Decay) -> Chunk:
    """The part of a chunk that does not depend on the state."""
    tokens, micro = q_CK.shape[-2], k_LK.shape[-2]
    steps = micro // tokens
    decay_CL = jnp.repeat(decay.within_CC, steps, axis=-1)
    decay_LL = jnp.tril(jnp.repeat(decay_CL, steps, axis=-2), -1)
    kk_LL = _einsum("...sk,...rk->...sr", k_LK, k_LK)
    return Chunk(
        *(q_CK, k_LK, v_LV, beta_L[..., None], decay_LL, decay_CL),
        enter_C1=decay.enter_C[..., None],
        enter_L1=jnp.repeat(decay.enter_C, steps, axis=-1)[..., None],
        leave_L1=jnp.repeat(decay.leave_C, steps, axis=-1)[..., None],
        across_11=decay.across[..., None, None],
        kk_LL=kk_LL,
        inverse_LL=unit_lower_inverse(beta_L[..., None] * decay_LL * kk_LL),
        p_CL=_einsum("...tk,...sk->...ts", q_CK, k_LK) * decay_CL,
    )


def unit_lower_inverse(a_LL: jax.Array) -> jax.Array:
    """(I + A)^{-1} for strictly lower triangular A, by merging diagonal blocks.

    Given the inverse X of the block-diagonal part with blocks of b, the inverse with blocks
    of 2b is X - X A_b X, where A_b holds the blocks that the merge adds: exact algebra, no
    powers of A. (The shorter product (I - A)(I + A^2)(I + A^4)... overflows float32 when
    beta is near 2 and keys are correlated, which is where state tracking lives.)
    """
    size = a_LL.shape[-1]
    index = jnp.arange(size)
    inverse_LL = jnp.broadcast_to(jnp.eye(size, dtype=a_LL.dtype), a_LL.shape)
    block = 1
    while block < size:
        joined = index[:, None] // (2 * block) == index[None, :] // (2 * block)
        split = index[:, None] // block != index[None, :] // block
        added_LL = jnp.where(jnp.broadcast_to(joined & split, a_LL.shape), a_LL, 0)
        if block > 1:  # blocks of 1 have the identity as inverse: nothing to multiply
            added_LL = _einsum("...ij,...jk->...ik", inverse_LL, added_LL)
            added_LL = _einsum("...ij,...jk->...ik", added_LL, inverse_LL)
        inverse_LL = inverse_LL - added_LL
        block *= 2
    return inverse_LL


def pseudo_values(chunk: Chunk, state_KV) -> jax.Array:
    """u = T (beta v - beta e^G k H): [..., L, V]."""
    error_LV = chunk.v_LV - chunk.enter_L1 * _einsum("...sk,...kv->...sv", chunk.k_LK, state_KV)
    return _einsum("...sr,...rv->...sv", chunk.inverse_LL, chunk.beta_L1 * error_LV)


def next_state(chunk: Chunk, u_LV, state_KV) -> jax.Array:
    """H_C from H and the pseudo-values: [..., K, V]."""
    written_KV = _einsum("...sk,...sv->...kv", chunk.leave_L1 * chunk.k_LK, u_LV)
    return chunk.across_11 * state_KV + written_KV


def outputs(chunk: Chunk, u_LV, state_KV) -> jax.Array:
    """o: [..., C, V]."""
    carried_CV = chunk.enter_C1 * _einsum("...tk,...kv->...tv", chunk.q_CK, state_KV)
    return carried_CV + _einsum("...ts,...sv->...tv", chunk.p_CL, u_LV)


def backward(chunk: Chunk, u_LV, state_KV, do_CV, dstate_KV):
    """Gradients of a chunk: no differentiation through the inverse, no division by beta.

    Args:
      chunk, u_LV, state_KV: the chunk, its pseudo-values and the state entering it.
      do_CV: cotangent of the outputs; dstate_KV: cotangent of the state leaving the chunk.

    Returns:
      dq [..., C, K], dk [..., L, K], dv [..., L, V], dbeta [..., L], dg [..., C] and the
      cotangent of the entering state [..., K, V]. dg holds for unmasked and masked chunks
      alike, because every masked factor is 0.
    """
    q_CK, k_LK, enter_C1, leave_L1 = chunk.q_CK, chunk.k_LK, chunk.enter_C1, chunk.leave_L1
    left_LV = leave_L1 * _einsum("...sk,...kv->...sv", k_LK, dstate_KV)
    du_LV = _einsum("...ts,...tv->...sv", chunk.p_CL, do_CV) + left_LV
    e_LV = _einsum("...sr,...sv->...rv", chunk.inverse_LL, du_LV)  # T^T du
    dv_LV = chunk.beta_L1 * e_LV

    # u_s = beta_s (v_s - what the state held for k_s); the held value gives dbeta.
    held_LV = chunk.enter_L1 * _einsum("...sk,...kv->...sv", k_LK, state_KV)
    held_LV = held_LV + _einsum("...sr,...rv->...sv", chunk.decay_LL * chunk.kk_LL, u_LV)
    dbeta_L = jnp.sum(e_LV * (chunk.v_LV - held_LV), axis=-1)

    dkk_LL = -_einsum("...sv,...rv->...sr", dv_LV, u_LV) * chunk.decay_LL
    dqk_CL = _einsum("...tv,...sv->...ts", do_CV, u_LV) * chunk.decay_CL
    dq_CK = enter_C1 * _einsum("...tv,...kv->...tk", do_CV, state_KV)
    dq_CK = dq_CK + _einsum("...ts,...sk->...tk", dqk_CL, k_LK)
    dk_LK = _einsum("...ts,...tk->...sk", dqk_CL, q_CK)
    dk_LK = dk_LK + _einsum("...sr,...rk->...sk", dkk_LL, k_LK)
    dk_LK = dk_LK + _einsum("...sr,...sk->...rk", dkk_LL, k_LK)
    dk_LK = dk_LK + leave_L1 * _einsum("...sv,...kv->...sk", u_LV, dstate_KV)
    dk_LK = dk_LK - chunk.enter_L1 * _einsum("...sv,...kv->...sk", dv_LV, state_KV)

    dstate_in_KV = chunk.across_11 * dstate_KV
    dstate_in_KV = dstate_in_KV + _einsum("...tk,...tv->...kv", enter_C1 * q_CK, do_CV)
    dstate_in_KV = dstate_in_KV - _einsum("...sk,...sv->...kv", chunk.enter_L1 * k_LK, dv_LV)

    dg_C = _decay_gradient(chunk, dq_CK, dv_LV, u_LV, left_LV, state_KV, dstate_KV)
    return dq_CK, dk_LK, dv_LV, dbeta_L, dg_C, dstate_in_KV


def _decay_gradient(chunk, dq_CK, dv_LV, u_LV, left_LV, state_KV, dstate_KV):
    """dg from homogeneity: scaling e^{G_s} scales what micro-step s reads, and undoes v_s.

    dL/dG_s = -v_s . dv_s + [s closes token t] o_t . do_t + [s closes the chunk] <dH_C, H_C>,
    where o_t . do_t = q_t . dq_t because o is linear in q. dg_t sums dL/dG over all
    micro-steps from token t on.
    """
    tokens = dq_CK.shape[-2]
    dvalue_L = jnp.sum(chunk.v_LV * dv_LV, axis=-1)
    dvalue_C = jnp.sum(dvalue_L.reshape(*dvalue_L.shape[:-1], tokens, -1), axis=-1)
    dsum_C = jnp.sum(chunk.q_CK * dq_CK, axis=-1) - dvalue_C
    dend = jnp.sum(chunk.across_11 * state_KV * dstate_KV, axis=(-2, -1))
    dend = dend + jnp.sum(u_LV * left_LV, axis=(-2, -1))
    return jax.lax.cumsum(dsum_C, axis=dsum_C.ndim - 1, reverse=True) + dend[..., None]


def _einsum(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, precision=HIGHEST)
