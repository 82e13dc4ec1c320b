"""One chunk of the DeltaProduct recurrence in WY form: forward and hand-written backward.

This is the mathematics of a chunk in plain JAX; it knows nothing of scans, padding or dispatch.
Notation (all arrays may carry leading batch dimensions):

  C tokens in the chunk, N steps per token, L = C * N micro-steps, K key, V value.
  s, r  micro-steps (s // N is the token);  t  token
  G_t   log decay accumulated from the start of the chunk, token t included
  H     state entering the chunk [K, V];  H_C  state leaving it

Within the chunk the product of Householder steps unrolls into pseudo-values u_s, with

  H_s = e^{G_s} H + sum_{r <= s} e^{G_s - G_r} k_r u_r^T
  u   = T (beta * v - beta * e^G * (k H)),   T = (I + beta M)^{-1}
  M_sr = e^{G_s - G_r} (k_s . k_r)                                for r < s, else 0
  o_t = e^{G_t} q_t H + sum_s P_ts u_s,   P_ts = e^{G_t - G_s} (q_t . k_s)  for s // N <= t
  H_C = e^{G_end} H + sum_s e^{G_end - G_s} k_s u_s^T

(Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", with N steps per
token; q carries the output scale.) A query meets the state and the keys as a key does, only that
it writes nothing. So the C queries and L keys are stacked into R = C + L rows Y = [q; k], and
what both need is one product:

  W = [P; M] = decay * (Y k^T),   Y H = [q H; k H]

and backward, with X = [do; -dv] and the cotangent dH_C of the leaving state,

  e = T^T (P^T do + e^{G_end - G} k dH_C),   dv = beta e
  dW = decay * (X u^T)
  dY = e^G * (X H^T) + dW k,   and for the keys further  dW^T Y + e^{G_end - G} u dH_C^T
  dH = e^{G_end} dH_C + (e^G Y)^T X
  dbeta_s = e_s . (v_s - what the state held for k_s)

Exponents appear only as differences <= 0, masked before the exponential. A state that is cleared
inside the chunk is a mask on the same factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..products import product, transposed_product


class Decay(NamedTuple):
    """Decay factors of a chunk; a cleared state is a factor of exactly 0."""

    within_CC: jax.Array  # from token r (column) to token t (row); 0 above the diagonal
    enter_C: jax.Array  # from the chunk's start to token t
    leave_C: jax.Array  # from token t to the chunk's end
    across: jax.Array  # from the chunk's start to its end; no token axis


class Chunk(NamedTuple):
    """Everything about a chunk that does not depend on the state entering it."""

    y_RK: jax.Array  # queries, then keys
    k_LK: jax.Array
    v_LV: jax.Array
    beta_L1: jax.Array
    decay_RL: jax.Array  # e^{G_t - G_s} for s // N <= t, and e^{G_s - G_r} for r < s; else 0
    enter_R1: jax.Array
    leave_L1: jax.Array
    across_11: jax.Array
    w_RL: jax.Array  # P and M
    inverse_LL: jax.Array  # T

    @property
    def tokens(self) -> int:
        return self.y_RK.shape[-2] - self.k_LK.shape[-2]


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
    tokens = q_CK.shape[-2]
    steps = k_LK.shape[-2] // tokens
    decay_CL = jnp.repeat(decay.within_CC, steps, axis=-1)
    decay_LL = jnp.tril(jnp.repeat(decay_CL, steps, axis=-2), -1)
    decay_RL = jnp.concatenate([decay_CL, decay_LL], axis=-2)
    enter_L = jnp.repeat(decay.enter_C, steps, axis=-1)
    y_RK = jnp.concatenate([q_CK, k_LK], axis=-2)
    w_RL = decay_RL * product("...rk,...sk->...rs", y_RK, k_LK)
    beta_L1 = beta_L[..., None]
    return Chunk(
        *(y_RK, k_LK, v_LV, beta_L1, decay_RL),
        enter_R1=jnp.concatenate([decay.enter_C, enter_L], axis=-1)[..., None],
        leave_L1=jnp.repeat(decay.leave_C, steps, axis=-1)[..., None],
        across_11=decay.across[..., None, None],
        w_RL=w_RL,
        inverse_LL=unit_lower_inverse(beta_L1 * w_RL[..., tokens:, :]),
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
            added_LL = product("...ij,...jk->...ik", inverse_LL, added_LL)
            added_LL = product("...ij,...jk->...ik", added_LL, inverse_LL)
        inverse_LL = inverse_LL - added_LL
        block *= 2
    return inverse_LL


def pass_state(chunk: Chunk, state_KV) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the rows read of the entering state, and the chunk's effect on it.

    Returns:
      read_CV: e^G q H; error_LV: v - e^G k H; u_LV: the pseudo-values; the leaving state [K, V].
    """
    read_RV = chunk.enter_R1 * product("...rk,...kv->...rv", chunk.y_RK, state_KV)
    error_LV = chunk.v_LV - read_RV[..., chunk.tokens :, :]
    u_LV = product("...sr,...rv->...sv", chunk.inverse_LL, chunk.beta_L1 * error_LV)
    written_KV = transposed_product(chunk.leave_L1 * chunk.k_LK, u_LV)
    state_KV = chunk.across_11 * state_KV + written_KV
    return read_RV[..., : chunk.tokens, :], error_LV, u_LV, state_KV


def outputs(chunk: Chunk, read_CV, u_LV) -> jax.Array:
    """o: [..., C, V]."""
    p_CL = chunk.w_RL[..., : chunk.tokens, :]
    return read_CV + product("...ts,...sv->...tv", p_CL, u_LV)


def backward(chunk: Chunk, state_KV, error_LV, u_LV, do_CV, dstate_KV, dlater):
    """Gradients of a chunk: no differentiation through the inverse, no division by beta.

    Args:
      chunk, state_KV: the chunk and the state entering it.
      error_LV, u_LV: of :func:`pass_state`.
      do_CV: cotangent of the outputs; dstate_KV: cotangent of the state leaving the chunk.
      dlater: [...] the gradient that g of a token after the chunk would get, if it decayed the
        leaving state: <dH_C, H_C>.

    Returns:
      dq [..., C, K], dk [..., L, K], dv [..., L, V], dbeta [..., L], dg [..., C], the cotangent
      of the entering state [..., K, V], and what is ``dlater`` for the chunk before.
    """
    tokens = chunk.tokens
    p_CL, m_LL = chunk.w_RL[..., :tokens, :], chunk.w_RL[..., tokens:, :]
    left_LV = chunk.leave_L1 * product("...sk,...kv->...sv", chunk.k_LK, dstate_KV)
    e_LV = transposed_product(chunk.inverse_LL, transposed_product(p_CL, do_CV) + left_LV)
    dv_LV = chunk.beta_L1 * e_LV
    held_LV = product("...sr,...rv->...sv", m_LL, u_LV)  # by the chunk; error_LV has H's part
    dbeta_L = jnp.sum(e_LV * (error_LV - held_LV), axis=-1)

    x_RV = jnp.concatenate([do_CV, -dv_LV], axis=-2)
    dw_RL = chunk.decay_RL * product("...rv,...sv->...rs", x_RV, u_LV)
    dy_RK = chunk.enter_R1 * product("...rv,...kv->...rk", x_RV, state_KV)
    dy_RK = dy_RK + product("...rs,...sk->...rk", dw_RL, chunk.k_LK)
    dq_CK, dk_LK = dy_RK[..., :tokens, :], dy_RK[..., tokens:, :]
    dk_LK = dk_LK + transposed_product(dw_RL, chunk.y_RK)
    dk_LK = dk_LK + chunk.leave_L1 * product("...sv,...kv->...sk", u_LV, dstate_KV)
    dentering_KV = chunk.across_11 * dstate_KV
    dentering_KV = dentering_KV + transposed_product(chunk.enter_R1 * chunk.y_RK, x_RV)

    dg_C = _decay_gradient(chunk, dq_CK, dv_LV, dlater)
    return dq_CK, dk_LK, dv_LV, dbeta_L, dg_C, dentering_KV, dg_C[..., 0]


def _decay_gradient(chunk: Chunk, dq_CK, dv_LV, dlater):
    """dg from homogeneity: scaling e^{G_s} scales what micro-step s reads, and undoes v_s.

    dL/dG_s = -v_s . dv_s + [s closes token t] o_t . do_t, where o_t . do_t = q_t . dq_t because o
    is linear in q; dg_t sums dL/dG over all micro-steps from token t on. What comes after a
    cleared state sums to 0, so that clearing needs no mask.
    """
    tokens = chunk.tokens
    dvalue_L = jnp.sum(chunk.v_LV * dv_LV, axis=-1)
    dvalue_C = jnp.sum(dvalue_L.reshape(*dvalue_L.shape[:-1], tokens, -1), axis=-1)
    dsum_C = jnp.sum(chunk.y_RK[..., :tokens, :] * dq_CK, axis=-1) - dvalue_C
    return jax.lax.cumsum(dsum_C, axis=dsum_C.ndim - 1, reverse=True) + dlater[..., None]
