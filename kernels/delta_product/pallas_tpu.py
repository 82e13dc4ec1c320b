"""DeltaProduct as two Pallas TPU kernels, forward and backward: scans over windows of tokens.

The mathematics and the symbols are those of ``chunk.py``; only what the hardware asks for is
written anew. The grid is (group of heads, window). Windows of ``stride`` tokens follow one another
on the same core, the state stays in VMEM, and the heads of a group, of any rows of the batch, go
through every product side by side, which hides the latency of the matrix unit.

Dimensions besides those of ``chunk.py``:
  X windows, M chunks per window, h heads per group
  R = C + L rows that read the state: the queries, then the keys; that makes
    scores_RL = [P; kk with its decay], and o and the held values are the same expression
  W lanes: a factor per row is kept repeated along the lanes

Micro-steps are ordered step by step, not token by token: micro-step (t, j) of a chunk is row
j * C + t, so that the N blocks of a chunk are concatenated and never interleaved.

float32 inputs are multiplied at full precision. For bfloat16 inputs the factors of products are
rounded to bfloat16 and everything else is float32; a Newton step then removes what rounding A
cost the inverse.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from .tpu_inverse import dot_general, inverse, number, truncate
from .tpu_layout import (
    MICRO_STEPS,
    Sizes,
    call,
    default_chunk,
    factors_of,
    heads_first,
    sizes_of,
    steps_last,
    tokens_first,
)

WIDTHS = (32, 64, 128, 256)


class Chunk(NamedTuple):
    """Everything about a chunk of h heads that does not depend on the state entering it."""

    qk_RK: jax.Array
    v_LV: jax.Array
    beta_LW: jax.Array
    enter_RW: jax.Array | None  # None: 1; repeats every C rows, so the first L serve the keys
    leave_LW: jax.Array | None
    across_11: jax.Array | None
    decay_RL: jax.Array  # 0 where micro-step s is not before the row
    scores_RL: jax.Array
    inverse_LL: jax.Array


def supports(q, k, v, beta, g, state, run, *, scale, chunk, stride) -> str | None:
    """Why these arguments of ``forward`` do not fit the kernels, or None."""
    del beta, g, state, run, scale
    steps, widths = k.shape[2], (q.shape[-1], v.shape[-1])
    dtypes = {jnp.dtype(x.dtype).name for x in (q, k, v)}
    if not dtypes <= {"float32", "bfloat16"}:
        return f"q, k, v must be float32 or bfloat16, not {sorted(dtypes)}"
    if steps > 4:
        return f"N must be 1 to 4, not {steps}"
    if not set(widths) <= set(WIDTHS):
        return f"K and V must be among {WIDTHS}, not {widths}"
    chunk = default_chunk(steps, stride) if chunk is None else chunk
    if chunk < 16 or chunk & (chunk - 1) or stride % chunk:
        return f"chunk must be a power of two >= 16 that divides the stride {stride}, not {chunk}"
    if chunk * steps > MICRO_STEPS:
        return f"a chunk holds at most {MICRO_STEPS} micro-steps, not {chunk * steps}"
    if stride > 4 * chunk:
        return f"the stride {stride} is longer than four chunks of {chunk}"
    return None


def forward(q, k, v, beta, g, state, run, *, scale, chunk, stride):
    """The outputs, the final state, and the states at the start of every window.

    Args:
      q: [B, T, H, K]; k: [B, T, N, H, K]; v: [B, T, N, H, V]; beta: [B, T, N, H].
      g: [B, T, H] or None; state: [B, H, K, V]; run: [B, T] resets so far, or None.
      scale: factor on o; chunk: tokens per chunk, or None; stride: tokens per window.

    Returns:
      o [B, T, H, V] in q's dtype; final [B, H, K, V] and starts [X, B, H, K, V] in float32.
    """
    sizes = sizes_of(q, k, v, g, run, scale, chunk, stride)
    tokens = [heads_first(sizes, x) for x in (q, k, v)]
    state = state.astype(jnp.float32)
    shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    o, final, starts = call(
        *(_forward_kernel, sizes, lambda x: x),
        {"tokens": tokens, "chunks": [factors_of(sizes, beta, g, run)], "states": [state]},
        {
            "tokens": [shape((*tokens[0].shape[:4], v.shape[-1]), q.dtype)],
            "states": [shape(state.shape, jnp.float32)],
            "starts": [shape((sizes.windows, *state.shape), jnp.float32)],
        },
    )
    return tokens_first(sizes, o)[:, :, 0], final, starts


def backward(q, k, v, beta, g, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of ``forward`` from the states that it kept.

    Args:
      starts: [X, B, H, K, V]; do: [B, T, H, V]; dfinal: [B, H, K, V]; the others as there.

    Returns:
      dq, dk, dv, dbeta, dg in the shapes and dtypes of their inputs (dg is None without g), and
      dstate [B, H, K, V] in float32.
    """
    del final
    sizes = sizes_of(q, k, v, g, run, scale, chunk, stride)
    tokens = [heads_first(sizes, x) for x in (q, k, v, do)]
    factors = factors_of(sizes, beta, g, run)
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    rows = lambda width: jax.ShapeDtypeStruct((*factors.shape[:2], sizes.group, width), jnp.float32)
    drows = [rows(sizes.micro)]  # dbeta
    if sizes.has_decay:
        drows += [rows(sizes.chunk), rows(v.shape[-1])]  # dsum, dend
    starts, dfinal = (x.astype(jnp.float32) for x in (starts, dfinal))
    dq, dk, dv, *drows, dstate = call(
        *(_backward_kernel, sizes, lambda x: sizes.windows - 1 - x),
        {"tokens": tokens, "chunks": [factors], "starts": [starts], "states": [dfinal]},
        {
            "tokens": [like(x, y.dtype) for x, y in zip(tokens, (q, k, v), strict=False)],
            "chunks": drows,
            "states": [like(dfinal, jnp.float32)],
        },
    )
    dq, dk, dv = (tokens_first(sizes, x) for x in (dq, dk, dv))
    dbeta = steps_last(sizes, drows[0], sizes.steps).astype(beta.dtype)
    dg = None if g is None else _decay_gradient(sizes, *drows[1:]).astype(g.dtype)
    return dq[:, :, 0], dk, dv, dbeta, dg, dstate


# Kernels. Refs hold the blocks of one group of heads and one window: [r, N, h / r, M * C, D].


def _forward_kernel(sizes: Sizes, q, k, v, factors, state, o, final, starts):
    @pl.when(pl.program_id(1) == 0)
    def _():
        final[...] = state[...]

    dot = functools.partial(dot_general, sizes.operand)
    starts[...] = final[...]
    state_KV = _heads(final[...])
    for m in range(sizes.chunks):
        chunk = _prepare(sizes, m, q, k, v, factors)
        read_RV = _times(chunk.enter_RW, dot(chunk.qk_RK, state_KV))
        u_LV = _pseudo_values(sizes, chunk, _keys(sizes, read_RV))[0]
        o_CV = read_RV[:, : sizes.chunk] + dot(chunk.scores_RL[:, : sizes.chunk], u_LV)
        _set_tokens(sizes, o, 0, m, sizes.scale * o_CV)
        state_KV = _next_state(sizes, chunk, u_LV, state_KV)
    final[...] = state_KV.reshape(final.shape)


def _backward_kernel(sizes: Sizes, q, k, v, do, factors, starts, dfinal, dq, dk, dv, *rest):
    *drows, dstate = rest

    @pl.when(pl.program_id(1) == 0)
    def _():
        dstate[...] = dfinal[...]

    dot = functools.partial(dot_general, sizes.operand)
    state_KV, entered = _heads(starts[...]), []
    for m in range(sizes.chunks):
        chunk = _prepare(sizes, m, q, k, v, factors)
        held_LV = _times(chunk.enter_RW, dot(_keys(sizes, chunk.qk_RK), state_KV))
        u_LV, error_LV = _pseudo_values(sizes, chunk, held_LV)
        entered.append((chunk, u_LV, error_LV, state_KV))
        if m + 1 < sizes.chunks:
            state_KV = _next_state(sizes, chunk, u_LV, state_KV)
    dstate_KV = _heads(dstate[...])
    for m in reversed(range(sizes.chunks)):
        do_CV = sizes.scale * _tokens(sizes, do, 0, m).astype(jnp.float32)
        chunk, u_LV, error_LV, state_KV = entered[m]
        dqk_RK, dv_LV, gradients, dstate_KV = _chunk_backward(
            *(sizes, chunk, u_LV, error_LV, state_KV, do_CV, dstate_KV)
        )
        _set_tokens(sizes, dq, 0, m, dqk_RK[:, : sizes.chunk])
        for j in range(sizes.steps):
            step = slice(j * sizes.chunk, (j + 1) * sizes.chunk)
            _set_tokens(sizes, dk, j, m, _keys(sizes, dqk_RK)[:, step])
            _set_tokens(sizes, dv, j, m, dv_LV[:, step])
        for ref, gradient in zip(drows, gradients, strict=True):
            ref[m] = gradient
    dstate[...] = dstate_KV.reshape(dstate.shape)


def _prepare(sizes: Sizes, m: int, q, k, v, factors) -> Chunk:
    """The part of chunk m of the window that does not depend on the state."""
    dot = functools.partial(dot_general, sizes.operand)
    steps = lambda ref: [_tokens(sizes, ref, j, m) for j in range(ref.shape[1])]
    qk_RK = jnp.concatenate(steps(q) + steps(k), axis=1)
    v_LV = jnp.concatenate(steps(v), axis=1)
    width = max(sizes.micro, qk_RK.shape[-1], v_LV.shape[-1])
    row, column = _rows_and_columns(sizes, factors[m], width)
    beta_LW = column(0, sizes.micro)
    decay_CL, *decay = _decays(sizes, row, column)
    decay_RL = jnp.concatenate([decay_CL] * (1 + sizes.steps), axis=1)
    decay_RL = jnp.where(_before(sizes), decay_RL, 0)
    scores_RL = decay_RL * dot(qk_RK, _keys(sizes, qk_RK), (2, 2))
    return Chunk(
        *(qk_RK, v_LV.astype(jnp.float32), beta_LW, *decay),
        decay_RL=decay_RL,
        scores_RL=scores_RL,
        inverse_LL=inverse(sizes, _times(beta_LW, _keys(sizes, scores_RL))),
    )


def _decays(sizes: Sizes, row, column):
    """Decay factors from G and run numbers, as ``chunk.decays``: [h or 1, C, L], R, L, across."""
    tokens, steps = sizes.chunk, sizes.steps
    last = lambda x_1L: x_1L[:, :, tokens - 1 : tokens]
    decay_CL = jnp.ones((1, tokens, sizes.micro), jnp.float32)
    enter_CW = leave_CW = across_11 = None
    if sizes.has_decay:
        sum_CW, sum_1L = column(1, tokens), row(1)
        decay_CL = jnp.exp(sum_CW[:, :, : sizes.micro] - sum_1L)
        enter_CW, leave_CW = jnp.exp(sum_CW), jnp.exp(last(sum_1L) - sum_CW)
        across_11 = jnp.exp(last(sum_1L))
    if sizes.has_run:
        run_CW, run_1L, entering_11 = column(-2, tokens), row(-2), last(row(-1))
        where = lambda mask, x: jnp.where(mask, 1.0 if x is None else x, 0.0)
        decay_CL = where(run_CW[:, :, : sizes.micro] == run_1L, decay_CL)
        enter_CW = where(run_CW == entering_11, enter_CW)
        leave_CW = where(run_CW == last(run_1L), leave_CW)
        across_11 = where(last(run_1L) == entering_11, across_11)
    repeat = lambda x_CW, n: None if x_CW is None else jnp.concatenate([x_CW] * n, axis=1)
    return decay_CL, repeat(enter_CW, 1 + steps), repeat(leave_CW, steps), across_11


def _pseudo_values(sizes: Sizes, chunk: Chunk, held_LV):
    """u = T (beta error) and error = v - e^G k H: [h, L, V] each."""
    error_LV = chunk.v_LV - held_LV
    return dot_general(sizes.operand, chunk.inverse_LL, _times(chunk.beta_LW, error_LV)), error_LV


def _next_state(sizes: Sizes, chunk: Chunk, u_LV, state_KV):
    k_LK = _keys(sizes, chunk.qk_RK)
    written_KV = dot_general(sizes.operand, k_LK, _times(chunk.leave_LW, u_LV), (1, 1))
    return _times(chunk.across_11, state_KV) + written_KV


def _chunk_backward(sizes: Sizes, chunk: Chunk, u_LV, error_LV, state_KV, do_CV, dstate_KV):
    """Gradients of a chunk; see ``chunk.backward``.

    Returns:
      dq above dk [h, R, K]; dv; rows [h, ...] of dbeta and, with a decay, of dsum and dend; dstate.
    """
    dot, keys = functools.partial(dot_general, sizes.operand), functools.partial(_keys, sizes)
    qk_RK, tokens = chunk.qk_RK, sizes.chunk
    left_LV = _times(chunk.leave_LW, dot(keys(qk_RK), dstate_KV))
    du_LV = dot(chunk.scores_RL[:, :tokens], do_CV, (1, 1)) + left_LV
    e_LV = dot(chunk.inverse_LL, du_LV, (1, 1))  # T^T du
    dv_LV = _times(chunk.beta_LW, e_LV)

    du_RL = dot(jnp.concatenate([do_CV, e_LV], axis=1), u_LV, (2, 2))
    dbeta_L1 = _sum(e_LV * error_LV) - _sum(keys(du_RL) * keys(chunk.scores_RL))
    dscores = [du_RL[:, :tokens], -_times(chunk.beta_LW, keys(du_RL))]
    dqk_RL = jnp.concatenate(dscores, axis=1) * chunk.decay_RL
    dread_RV = _times(chunk.enter_RW, jnp.concatenate([do_CV, -dv_LV], axis=1))

    dqk_RK = dot(dread_RV, state_KV, (2, 2)) + dot(dqk_RL, keys(qk_RK))
    dk_LK = dot(dqk_RL, qk_RK, (1, 1)) + dot(_times(chunk.leave_LW, u_LV), dstate_KV, (2, 2))
    dqk_RK = jnp.concatenate([dqk_RK[:, :tokens], keys(dqk_RK) + dk_LK], axis=1)
    carried_KV = _times(chunk.across_11, dstate_KV)
    gradients = [_as_rows(dbeta_L1)]
    if sizes.has_decay:
        dsum_C1 = _sum(qk_RK[:, :tokens].astype(jnp.float32) * dqk_RK[:, :tokens])
        dvalue_L1 = _sum(chunk.v_LV * dv_LV)
        for j in range(sizes.steps):
            dsum_C1 = dsum_C1 - dvalue_L1[:, j * tokens : (j + 1) * tokens]
        dend_V = jnp.sum(carried_KV * state_KV, axis=1) + jnp.sum(u_LV * left_LV, axis=1)
        gradients += [_as_rows(dsum_C1), dend_V]
    return dqk_RK, dv_LV, gradients, carried_KV + dot(qk_RK, dread_RV, (1, 1))


def _rows_and_columns(sizes: Sizes, rows, width: int):
    """Functions that give quantity i of ``_factors`` as [h, 1, L], and as [h, length, W].

    The matrix unit makes the columns, exactly: the three bfloat16 parts of a float32, times ones.
    """
    high = truncate(rows)
    middle = truncate(rows - high)
    parts = jnp.concatenate([high, middle, rows - high - middle], axis=0)
    parts_LP = parts.T.astype(jnp.bfloat16)
    count = rows.shape[0]
    part_PW = jax.lax.broadcasted_iota(jnp.int32, (3 * count, width), 0)
    heads = lambda i: range(i * sizes.group % count, i * sizes.group % count + sizes.group)

    def column(i, length):
        picked = [
            (part_PW == r) | (part_PW == r + count) | (part_PW == r + 2 * count) for r in heads(i)
        ]
        ones = [jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16) for mask in picked]
        dot = functools.partial(
            *(jax.lax.dot, parts_LP[:length]),
            precision=jax.lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        return jnp.stack([dot(x) for x in ones])

    return lambda i: jnp.stack([rows[r : r + 1] for r in heads(i)]), column


def _before(sizes: Sizes):
    """Whether the row reads the state after micro-step s (column): [1, R, L]."""
    shape = (1, sizes.chunk, sizes.micro)
    token, other = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    queries = (other & (sizes.chunk - 1)) <= token
    return jnp.concatenate([queries, number(sizes, 2) < number(sizes, 1)], axis=1)


def _times(factor: jax.Array | None, x: jax.Array) -> jax.Array:
    """Rows of x by their factors, of which there may be more rows and lanes; None is 1."""
    return x if factor is None else factor[:, : x.shape[1], : x.shape[2]] * x


def _keys(sizes: Sizes, x: jax.Array) -> jax.Array:
    """The rows of the keys: [., R, .] -> [., L, .]."""
    return x[:, sizes.chunk :]


def _sum(x):
    return jnp.sum(x, axis=-1, keepdims=True)


def _as_rows(x_L1):
    """Columns [h, L, 1] as rows [h, L]."""
    return jnp.concatenate([x_L1[h] for h in range(x_L1.shape[0])], axis=1).T


def _heads(x: jax.Array) -> jax.Array:
    """Rows times heads of a row as the heads of the group: [r, h / r, ., .] -> [h, ., .]."""
    return x.reshape(-1, *x.shape[2:])


def _tokens(sizes: Sizes, ref, j: int, m: int) -> jax.Array:
    """Step j of chunk m of the window: [h, C, D] of the ref's [r, N, h / r, M * C, D]."""
    return _heads(ref[:, j, :, m * sizes.chunk : (m + 1) * sizes.chunk])


def _set_tokens(sizes: Sizes, ref, j: int, m: int, x: jax.Array) -> None:
    x = x.reshape(sizes.rows, -1, *x.shape[1:]).astype(ref.dtype)
    ref[:, j, :, m * sizes.chunk : (m + 1) * sizes.chunk] = x


def _decay_gradient(sizes: Sizes, dsum_C, dend_V):
    """dg_t sums dL/dG of its chunk from token t on: [B, T, H]."""
    dsum_C = jax.lax.cumsum(dsum_C, axis=dsum_C.ndim - 1, reverse=True)
    dg_C = dsum_C + jnp.sum(dend_V, axis=-1, keepdims=True)
    return steps_last(sizes, dg_C, 1)[:, :, 0]
