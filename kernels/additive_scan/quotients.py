"""One chunk of the additive recurrence with one reference for all its tokens: the usual case.

Notation as in ``chunk.py``. With a reference r per key channel, the largest of the chunk's keys and
the entering normaliser, every weight is a quotient of two numbers that are computed once per token:

  e_j = exp(k_j - r),   E_i = exp(z_b - r) + sum_{j <= i} e_j = exp(z_i - r),
  exp(k_j - z_i) = e_j / E_i,   exp(z_b - z_i) = exp(z_b - r) / E_i

so that a chunk takes one exponential per key, and products of matrices:

  o_i = (q_i / E_i) (exp(z_b - r) S) + sum_{j <= i} ((q_i / E_i) . (e_j f_j)) v_j

All terms are positive and at most C + 1, which keeps their relative precision down to the smallest
float32. Only where the keys of 16 or 32 neighbours rise by some 70 do the first of them get lost:
``sound`` tells, and such rows are computed by ``chunk.py``, whose weights are exact for all keys.
So are states that wait for their first key.

Backward, with x = q dq, and R as in ``chunk.py``:

  dk_j = e_j (f_j d(e f)_j - R_e / E_e - sum_{i >= j} x_i / E_i)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..products import product, transposed_product

SMALLEST = 1e-30  # of E; keys that matter to it are then far from float32's 1e-38


class Chunk(NamedTuple):
    q_CK: jax.Array  # with the output scale
    v_CV: jax.Array
    f_CK: jax.Array | None  # factors on the keys
    e_CK: jax.Array  # exp(k_j - r)
    inverse_CK: jax.Array  # 1 / E_i
    within_CC: jax.Array  # 1 where token i sees token j: j <= i and no reset between them
    enter_CK: jax.Array  # exp(z_b - z_i)
    leave_CK: jax.Array  # exp(k_j - z_e)
    across_K1: jax.Array  # exp(z_b - z_e)
    z_K: jax.Array  # z_e
    sound: jax.Array  # bool, of all rows together


def prepare(q_CK, k_CK, v_CV, f_CK, before_K, run_C1=None, entering_11=None) -> Chunk:
    """The chunk of arrays, of the entering normaliser and of resets (numbers or None)."""
    tokens = k_CK.shape[-2]
    within_CC = jnp.tril(jnp.ones((*k_CK.shape[:-1], tokens), k_CK.dtype))
    if run_C1 is not None:
        within_CC = jnp.where(run_C1 == jnp.swapaxes(run_C1, -1, -2), within_CC, 0)

    before_1K = before_K[..., None, :]
    top_1K = jnp.maximum(jnp.max(k_CK, axis=-2, keepdims=True), before_1K)
    r_1K = jnp.where(top_1K == -jnp.inf, 0, top_1K)
    e_CK, old_CK = jnp.exp(k_CK - r_1K), jnp.exp(before_1K - r_1K)
    ending_CK, begun_CK = e_CK, before_1K > -jnp.inf
    if run_C1 is not None:
        old_CK = jnp.where(run_C1 == entering_11, old_CK, 0)
        begun_CK = begun_CK & (run_C1 == entering_11)
        ending_CK = jnp.where(run_C1 == run_C1[..., -1:, :], e_CK, 0)
    sum_CK = old_CK + _matmul(within_CC, e_CK)
    inverse_CK = jnp.where(sum_CK > 0, 1 / sum_CK, 0)
    enter_CK = old_CK * inverse_CK
    return Chunk(
        *(q_CK, v_CV, f_CK, e_CK, inverse_CK, within_CC, enter_CK),
        leave_CK=ending_CK * inverse_CK[..., -1:, :],
        across_K1=jnp.swapaxes(enter_CK[..., -1:, :], -1, -2),
        z_K=r_1K[..., 0, :] + jnp.log(sum_CK[..., -1, :]),
        # A sum of nothing is exactly 0; a sum that has lost its first keys is below the smallest.
        sound=jnp.all((sum_CK >= SMALLEST) | ((sum_CK == 0) & (k_CK == -jnp.inf) & ~begun_CK)),
    )


def outputs(chunk: Chunk, s_KV) -> jax.Array:
    """o [C, V]."""
    o_CV = _matmul(chunk.q_CK * chunk.enter_CK, s_KV)
    return o_CV + _matmul(_scores(chunk), chunk.v_CV)


def next_state(chunk: Chunk, s_KV) -> jax.Array:
    """S_e [K, V]."""
    keys_CK = _times(chunk.leave_CK, chunk.f_CK)
    return chunk.across_K1 * s_KV + transposed_product(keys_CK, chunk.v_CV)


def backward(chunk: Chunk, s_KV, do_CV, ds_KV, r_K):
    """Gradients of one chunk; arguments and results as in ``chunk.py``."""
    q_CK, v_CV, e_CK, inverse_CK = chunk.q_CK, chunk.v_CV, chunk.e_CK, chunk.inverse_CK
    p_CC = jnp.where(chunk.within_CC > 0, _by_rows(do_CV, v_CV), 0)
    dq_CK = chunk.enter_CK * _by_rows(do_CV, s_KV)
    dq_CK += inverse_CK * _matmul(p_CC, _times(e_CK, chunk.f_CK))
    dv_CV = transposed_product(_scores(chunk), do_CV)
    dv_CV += _matmul(_times(chunk.leave_CK, chunk.f_CK), ds_KV)
    df_CK = chunk.leave_CK * _by_rows(v_CV, ds_KV)
    df_CK += e_CK * transposed_product(p_CC, q_CK * inverse_CK)

    x_CK = q_CK * dq_CK
    later_CK = transposed_product(chunk.within_CC, inverse_CK * x_CK)
    dk_CK = _times(df_CK, chunk.f_CK) - e_CK * later_CK - chunk.leave_CK * r_K[..., None, :]
    r_before_K = chunk.across_K1[..., 0] * r_K + jnp.sum(chunk.enter_CK * x_CK, axis=-2)
    ds_before_KV = chunk.across_K1 * ds_KV
    ds_before_KV += transposed_product(q_CK * chunk.enter_CK, do_CV)
    df_CK = None if chunk.f_CK is None else df_CK
    return dq_CK, dk_CK, dv_CV, df_CK, ds_before_KV, r_before_K


def _scores(chunk: Chunk) -> jax.Array:
    keys_CK = _times(chunk.e_CK, chunk.f_CK)
    a_CC = _by_rows(chunk.q_CK * chunk.inverse_CK, keys_CK)
    return jnp.where(chunk.within_CC > 0, a_CC, 0)


def _times(x_CK, f_CK) -> jax.Array:
    return x_CK if f_CK is None else x_CK * f_CK


def _matmul(a, b) -> jax.Array:
    return product("...ij,...jk->...ik", a, b)


def _by_rows(a, b) -> jax.Array:
    """a b^T."""
    return product("...ik,...jk->...ij", a, b)
