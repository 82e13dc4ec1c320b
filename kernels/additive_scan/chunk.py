"""One chunk of the additive recurrence: forward and hand-written backward.

This is the mathematics that chunked implementations share; it knows nothing of scans, padding
or dispatch. Notation (arrays may carry leading batch dimensions):

  C tokens of the chunk, K key channels, V value
  i, j   tokens, j <= i         b   before the chunk         e   its last token
  S, z   state; z_i after token i

Every factor is the exponential of something <= 0, and no common reference serves all chunks:
rising keys overflow it, falling ones lose everything. So tokens meet in a tree. A pair (j, i)
meets at the one level where j lies in the left half of a block and i in the right half; with r
the normaliser at the end of that left half,

  exp(k_j - z_i) = exp(k_j - r) exp(r - z_i),

both at most 1, which makes the level a product of matrices. The smallest blocks, of LEAF tokens,
are evaluated pair by pair. Backward, with P_ij = v_j . do_i, D_ijc = exp(k_jc - z_ic) and the
factors f_j on the keys:

  dq_i = exp(z_b - z_i) S_b do_i + sum_j D_ij f_j P_ij
  dv_j = sum_i (sum_c q_ic D_ijc f_jc) do_i + dS_e^T (exp(k_j - z_e) f_j)
  df_j = exp(k_j - z_e) dS_e v_j + sum_i D_ij q_i P_ij
  dk_j = f_j df_j - exp(k_j - z_e) R_e - sum_i D_ij q_i dq_i
  R_b  = exp(z_b - z_e) R_e + sum_i exp(z_b - z_i) q_i dq_i

where R = <dS, S> - dz stands for everything that reaches the normaliser from later tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAF = 4
HIGHEST = jax.lax.Precision.HIGHEST


class Chunk(NamedTuple):
    """A chunk's arrays and its factors towards the outside."""

    q_CK: jax.Array  # with the output scale
    k_CK: jax.Array
    v_CV: jax.Array
    f_CK: jax.Array | None  # factors on the keys
    z_CK: jax.Array
    run_C1: jax.Array | None  # number of resets so far
    enter_CK: jax.Array  # exp(z_b - z_i)
    leave_CK: jax.Array  # exp(k_j - z_e)
    across_K1: jax.Array  # exp(z_b - z_e)
    first_CK: jax.Array  # the first key that a channel has ever seen


class _Level(NamedTuple):
    """A level of the tree: n blocks of two halves of h tokens."""

    half: int
    enter_nhK: jax.Array  # exp(r - z_i)
    leave_nhK: jax.Array  # exp(k_j - r)


def prepare(q_CK, k_CK, v_CV, f_CK, z_CK, before_K, run_C1=None, entering_run_1=None) -> Chunk:
    """The chunk of arrays, of the normaliser ``before_K`` and of resets (numbers or None)."""
    last_1K, before_1K = z_CK[..., -1:, :], before_K[..., None, :]
    inside = to_end = True
    if run_C1 is not None:
        inside, to_end = run_C1 == entering_run_1, run_C1 == run_C1[..., -1:, :]
    # A state without normaliser waits for the first key, and decays from there.
    waiting = before_1K == -jnp.inf
    begun_CK = (z_CK != -jnp.inf) & inside
    start_1K = jnp.min(jnp.where(begun_CK, z_CK, jnp.inf), axis=-2, keepdims=True)
    start_1K = jnp.where(waiting, start_1K, before_1K)
    enter_CK = jnp.where(z_CK == -jnp.inf, 1, _factor(start_1K, z_CK))
    enter_CK = jnp.where(inside, enter_CK, 0)
    earlier_CK = jnp.concatenate([jnp.zeros_like(begun_CK[..., :1, :]), begun_CK[..., :-1, :]], -2)
    return Chunk(
        *(q_CK, k_CK, v_CV, f_CK, z_CK, run_C1),
        enter_CK=enter_CK,
        leave_CK=jnp.where(to_end, _factor(k_CK, last_1K), 0),
        across_K1=jnp.swapaxes(enter_CK[..., -1:, :], -1, -2),
        first_CK=(waiting & begun_CK & ~earlier_CK).astype(z_CK.dtype),
    )


def normalisers(k_CK, before_K, run_C1=None, entering_run_1=None) -> jax.Array:
    """z_i [C, K]: every token with its own maximum, for keys of any size."""
    tokens = k_CK.shape[-2]
    sees_CC = jnp.tril(jnp.ones((*k_CK.shape[:-1], tokens), bool))
    before_CK = jnp.broadcast_to(before_K[..., None, :], k_CK.shape)
    if run_C1 is not None:
        sees_CC = sees_CC & (run_C1 == _transpose(run_C1))
        before_CK = jnp.where(run_C1 == entering_run_1, before_CK, -jnp.inf)
    keys_CCK = jnp.where(sees_CC[..., None], k_CK[..., None, :, :], -jnp.inf)
    top_CK = jnp.maximum(jnp.max(keys_CCK, axis=-2), before_CK)
    finite_CK = jnp.where(top_CK == -jnp.inf, 0, top_CK)
    sum_CK = jnp.sum(jnp.exp(keys_CCK - finite_CK[..., :, None, :]), axis=-2)
    return finite_CK + jnp.log(sum_CK + jnp.exp(before_CK - finite_CK))


def outputs(chunk: Chunk, s_KV) -> jax.Array:
    """o [C, V]."""
    o_CV = _matmul(chunk.q_CK * chunk.enter_CK, s_KV)
    pairs_nllK = _on_pairs(chunk, _leaf_pairs(chunk))
    a_nll = jnp.sum(_leaves(chunk.q_CK)[..., :, None, :] * pairs_nllK, axis=-1)
    o_CV += _merge(_matmul(a_nll, _leaves(chunk.v_CV)))
    for level in _levels(chunk):
        (_, q_nhK), (v_nhV, _) = (_halves(x, level.half) for x in (chunk.q_CK, chunk.v_CV))
        keys_nhK = _on_left(chunk, level)
        a_nhh = _matmul(q_nhK * level.enter_nhK, _transpose(keys_nhK))
        o_CV += _right(_matmul(a_nhh, v_nhV))
    return o_CV


def next_state(chunk: Chunk, s_KV) -> jax.Array:
    """S_e [K, V]."""
    return chunk.across_K1 * s_KV + _matmul(_transpose(_keys(chunk)), chunk.v_CV)


def backward(chunk: Chunk, s_KV, do_CV, ds_KV, r_K):
    """Gradients of one chunk.

    Args:
      chunk, s_KV: its arrays, and the state that enters it.
      do_CV: cotangent of the outputs.
      ds_KV, r_K: dS_e and R_e, with everything after the chunk.

    Returns:
      dq [C, K] (of q with the scale), dk [C, K], dv [C, V], df [C, K] or None, dS_b [K, V],
      R_b [K].
    """
    q_CK, v_CV = chunk.q_CK, chunk.v_CV
    read_CK = q_CK * chunk.enter_CK
    dq_CK = chunk.enter_CK * _matmul(do_CV, _transpose(s_KV))
    dv_CV = _matmul(_keys(chunk), ds_KV)
    ds_before_KV = chunk.across_K1 * ds_KV + _matmul(_transpose(read_CK), do_CV)

    pairs_nllK = _leaf_pairs(chunk)
    keys_nllK = _on_pairs(chunk, pairs_nllK)
    q_nlK, v_nlV, do_nlV = (_leaves(x) for x in (q_CK, v_CV, do_CV))
    p_nll = _matmul(do_nlV, _transpose(v_nlV))
    a_nll = jnp.sum(q_nlK[..., :, None, :] * keys_nllK, axis=-1)
    dq_CK += _merge(jnp.sum(p_nll[..., None] * keys_nllK, axis=-2))
    dv_CV += _merge(_matmul(_transpose(a_nll), do_nlV))
    df_CK = chunk.leave_CK * _matmul(v_CV, _transpose(ds_KV))
    qp_nllK = q_nlK[..., :, None, :] * p_nll[..., None]
    df_CK += _merge(jnp.sum(pairs_nllK * qp_nllK, axis=-3))

    levels = _levels(chunk)
    for level in levels:
        _, q_nhK = _halves(q_CK, level.half)
        (v_nhV, _), (_, do_nhV) = _halves(v_CV, level.half), _halves(do_CV, level.half)
        q_nhK = q_nhK * level.enter_nhK
        p_nhh = _matmul(do_nhV, _transpose(v_nhV))
        keys_nhK = _on_left(chunk, level)
        a_nhh = _matmul(q_nhK, _transpose(keys_nhK))
        dq_CK += _right(level.enter_nhK * _matmul(p_nhh, keys_nhK))
        dv_CV += _left(_matmul(_transpose(a_nhh), do_nhV))
        df_CK += _left(level.leave_nhK * _matmul(_transpose(p_nhh), q_nhK))

    # The keys act through the normaliser too, for which all of dq is needed.
    x_CK = q_CK * dq_CK
    dk_CK = df_CK if chunk.f_CK is None else chunk.f_CK * df_CK
    dk_CK -= chunk.leave_CK * r_K[..., None, :]
    dk_CK -= _merge(jnp.sum(pairs_nllK * _leaves(x_CK)[..., :, None, :], axis=-3))
    for level in levels:
        _, x_nhK = _halves(x_CK, level.half)
        by_z_n1K = jnp.sum(level.enter_nhK * x_nhK, axis=-2, keepdims=True)
        dk_CK -= _left(level.leave_nhK * by_z_n1K)
    r_before_K = chunk.across_K1[..., 0] * r_K + jnp.sum(chunk.enter_CK * x_CK, axis=-2)

    # A channel's first key does not make the state decay.
    kept_K = jnp.sum(ds_before_KV * s_KV, axis=-1)
    waited_CK = jnp.where(chunk.z_CK == -jnp.inf, chunk.enter_CK * x_CK, 0)
    kept_K -= jnp.sum(waited_CK, axis=-2)
    dk_CK += chunk.first_CK * kept_K[..., None, :]
    df_CK = None if chunk.f_CK is None else df_CK
    return dq_CK, dk_CK, dv_CV, df_CK, ds_before_KV, r_before_K


def _keys(chunk: Chunk) -> jax.Array:
    """exp(k_j - z_e) f_j."""
    return chunk.leave_CK if chunk.f_CK is None else chunk.leave_CK * chunk.f_CK


def _on_pairs(chunk: Chunk, pairs_nllK) -> jax.Array:
    """D_ij f_j within the leaves."""
    return pairs_nllK if chunk.f_CK is None else pairs_nllK * _leaves(chunk.f_CK)[..., None, :, :]


def _on_left(chunk: Chunk, level: _Level) -> jax.Array:
    """exp(k_j - r) f_j of a level."""
    if chunk.f_CK is None:
        return level.leave_nhK
    return level.leave_nhK * _halves(chunk.f_CK, level.half)[0]


def _levels(chunk: Chunk) -> list[_Level]:
    levels, half = [], min(LEAF, chunk.q_CK.shape[-2])
    while half < chunk.q_CK.shape[-2]:
        (k_nhK, _), (left_nhK, right_nhK) = (_halves(x, half) for x in (chunk.k_CK, chunk.z_CK))
        middle_n1K = left_nhK[..., -1:, :]
        enter_nhK, leave_nhK = _factor(middle_n1K, right_nhK), _factor(k_nhK, middle_n1K)
        if chunk.run_C1 is not None:
            left_nh1, right_nh1 = _halves(chunk.run_C1, half)
            enter_nhK = jnp.where(right_nh1 == left_nh1[..., -1:, :], enter_nhK, 0)
            leave_nhK = jnp.where(left_nh1 == left_nh1[..., -1:, :], leave_nhK, 0)
        levels.append(_Level(half, enter_nhK, leave_nhK))
        half *= 2
    return levels


def _leaf_pairs(chunk: Chunk) -> jax.Array:
    """D within the leaves: [n, l, l, K], 0 for j > i."""
    k_nlK, z_nlK = _leaves(chunk.k_CK), _leaves(chunk.z_CK)
    pairs_nllK = _factor(k_nlK[..., None, :, :], z_nlK[..., :, None, :])
    leaf = k_nlK.shape[-2]
    pairs_nllK = jnp.where(jnp.tril(jnp.ones((leaf, leaf), bool))[..., None], pairs_nllK, 0)
    if chunk.run_C1 is not None:
        run_nl1 = _leaves(chunk.run_C1)
        same_nll1 = run_nl1[..., :, None, :] == run_nl1[..., None, :, :]
        pairs_nllK = jnp.where(same_nll1, pairs_nllK, 0)
    return pairs_nllK


def _factor(a, z) -> jax.Array:
    """exp(a - z), at most 1: 0 for a = -inf, whatever z is."""
    return jnp.exp(jnp.minimum(a - jnp.where(z == -jnp.inf, 0, z), 0))


def _halves(x_CD, half: int) -> tuple[jax.Array, jax.Array]:
    """The left and right halves of all blocks of 2 * half tokens: [n, half, D] each."""
    x = x_CD.reshape(*x_CD.shape[:-2], -1, 2, half, x_CD.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _left(x_nhD) -> jax.Array:
    """Left halves back to [C, D], with zeros on the right."""
    return _merge(jnp.concatenate([x_nhD, jnp.zeros_like(x_nhD)], axis=-2))


def _right(x_nhD) -> jax.Array:
    return _merge(jnp.concatenate([jnp.zeros_like(x_nhD), x_nhD], axis=-2))


def _leaves(x_CD) -> jax.Array:
    leaf = min(LEAF, x_CD.shape[-2])
    return x_CD.reshape(*x_CD.shape[:-2], -1, leaf, x_CD.shape[-1])


def _merge(x_nlD) -> jax.Array:
    """[n, l, D] -> [n * l, D]."""
    return x_nlD.reshape(*x_nlD.shape[:-3], -1, x_nlD.shape[-1])


def _transpose(x) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _matmul(a, b) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)
