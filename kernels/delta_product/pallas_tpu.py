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
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

MICRO_STEPS = 128  # of a chunk at most: rows of the matrix unit
BLOCK = 16  # tokens: rows of a bfloat16 tile
GROUP = 8  # heads per grid step at most, if N = 1 and widths are at most 128
WIDTHS = (32, 64, 128, 256)
VMEM = 56 << 20  # bytes: below the 64 MiB of a TPU v5p core


class Sizes(NamedTuple):
    """What is static about a call."""

    batch: int  # B
    tokens: int  # T
    steps: int  # N
    heads: int  # H
    chunk: int  # C
    chunks: int  # M
    windows: int  # X
    group: int  # h
    operand: jnp.dtype  # of the factors of matrix products
    scale: float
    has_decay: bool
    has_run: bool

    @property
    def micro(self) -> int:  # L
        return self.chunk * self.steps


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
    chunk = _default_chunk(steps, stride) if chunk is None else chunk
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
    sizes = _sizes(q, k, v, g, run, scale, chunk, stride)
    tokens = [_heads_first(sizes, x) for x in (q, k, v)]
    state = state.astype(jnp.float32).reshape(-1, *state.shape[2:])
    shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    o, final, starts = _call(
        *(_forward_kernel, sizes, lambda x: x),
        {"tokens": tokens, "chunks": [_factors(sizes, beta, g, run)], "states": [state]},
        {
            "tokens": [shape((*tokens[0].shape[:3], v.shape[-1]), q.dtype)],
            "states": [shape(state.shape, jnp.float32)],
            "starts": [shape((sizes.windows, *state.shape), jnp.float32)],
        },
    )
    split = lambda x: x.reshape(*x.shape[:-3], sizes.batch, sizes.heads, *x.shape[-2:])
    return _tokens_first(sizes, o)[:, :, 0], split(final), split(starts)


def backward(q, k, v, beta, g, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of ``forward`` from the states that it kept.

    Args:
      starts: [X, B, H, K, V]; do: [B, T, H, V]; dfinal: [B, H, K, V]; the others as there.

    Returns:
      dq, dk, dv, dbeta, dg in the shapes and dtypes of their inputs (dg is None without g), and
      dstate [B, H, K, V] in float32.
    """
    del final
    sizes = _sizes(q, k, v, g, run, scale, chunk, stride)
    tokens = [_heads_first(sizes, x) for x in (q, k, v, do)]
    factors = _factors(sizes, beta, g, run)
    join = lambda x: x.astype(jnp.float32).reshape(*x.shape[:-4], -1, *x.shape[-2:])
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    rows = lambda width: jax.ShapeDtypeStruct((*factors.shape[:2], sizes.group, width), jnp.float32)
    drows = [rows(sizes.micro)]  # dbeta
    if sizes.has_decay:
        drows += [rows(sizes.chunk), rows(v.shape[-1])]  # dsum, dend
    dfinal = join(dfinal)
    dq, dk, dv, *drows, dstate = _call(
        *(_backward_kernel, sizes, lambda x: sizes.windows - 1 - x),
        {"tokens": tokens, "chunks": [factors], "starts": [join(starts)], "states": [dfinal]},
        {
            "tokens": [like(x, y.dtype) for x, y in zip(tokens, (q, k, v), strict=False)],
            "chunks": drows,
            "states": [like(dfinal, jnp.float32)],
        },
    )
    dq, dk, dv = (_tokens_first(sizes, x) for x in (dq, dk, dv))
    dbeta = _steps_last(sizes, drows[0], sizes.steps).astype(beta.dtype)
    dg = None if g is None else _decay_gradient(sizes, *drows[1:]).astype(g.dtype)
    return dq[:, :, 0], dk, dv, dbeta, dg, dstate.reshape(starts.shape[1:])


# Kernels. Refs hold the blocks of one group of heads and one window.


def _forward_kernel(sizes: Sizes, q, k, v, factors, state, o, final, starts):
    @pl.when(pl.program_id(1) == 0)
    def _():
        final[...] = state[...]

    dot = functools.partial(_dot, sizes.operand)
    state_KV = final[...]
    starts[...] = state_KV
    for m in range(sizes.chunks):
        chunk = _prepare(sizes, m, q, k, v, factors)
        read_RV = _times(chunk.enter_RW, dot(chunk.qk_RK, state_KV))
        u_LV = _pseudo_values(sizes, chunk, _keys(sizes, read_RV))[0]
        o_CV = read_RV[:, : sizes.chunk] + dot(chunk.scores_RL[:, : sizes.chunk], u_LV)
        o[0, :, _span(sizes, m)] = (sizes.scale * o_CV).astype(o.dtype)
        state_KV = _next_state(sizes, chunk, u_LV, state_KV)
    final[...] = state_KV


def _backward_kernel(sizes: Sizes, q, k, v, do, factors, starts, dfinal, dq, dk, dv, *rest):
    *drows, dstate = rest

    @pl.when(pl.program_id(1) == 0)
    def _():
        dstate[...] = dfinal[...]

    dot = functools.partial(_dot, sizes.operand)
    state_KV, entered = starts[...], []
    for m in range(sizes.chunks):
        chunk = _prepare(sizes, m, q, k, v, factors)
        held_LV = _times(chunk.enter_RW, dot(_keys(sizes, chunk.qk_RK), state_KV))
        u_LV, error_LV = _pseudo_values(sizes, chunk, held_LV)
        entered.append((chunk, u_LV, error_LV, state_KV))
        if m + 1 < sizes.chunks:
            state_KV = _next_state(sizes, chunk, u_LV, state_KV)
    dstate_KV = dstate[...]
    for m in reversed(range(sizes.chunks)):
        do_CV = sizes.scale * do[0, :, _span(sizes, m)].astype(jnp.float32)
        chunk, u_LV, error_LV, state_KV = entered[m]
        dqk_RK, dv_LV, gradients, dstate_KV = _chunk_backward(
            *(sizes, chunk, u_LV, error_LV, state_KV, do_CV, dstate_KV)
        )
        dq[0, :, _span(sizes, m)] = dqk_RK[:, : sizes.chunk].astype(dq.dtype)
        for j in range(sizes.steps):
            step = slice(j * sizes.chunk, (j + 1) * sizes.chunk)
            dk[j, :, _span(sizes, m)] = _keys(sizes, dqk_RK)[:, step].astype(dk.dtype)
            dv[j, :, _span(sizes, m)] = dv_LV[:, step].astype(dv.dtype)
        for ref, gradient in zip(drows, gradients, strict=True):
            ref[m] = gradient
    dstate[...] = dstate_KV


def _prepare(sizes: Sizes, m: int, q, k, v, factors) -> Chunk:
    """The part of chunk m of the window that does not depend on the state."""
    dot = functools.partial(_dot, sizes.operand)
    steps = range(sizes.steps)
    qk_RK = jnp.concatenate([x[:, _span(sizes, m)] for x in (q[0], *(k[j] for j in steps))], axis=1)
    v_LV = jnp.concatenate([v[j, :, _span(sizes, m)] for j in steps], axis=1)
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
        inverse_LL=_inverse(sizes, _times(beta_LW, _keys(sizes, scores_RL))),
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
    return _dot(sizes.operand, chunk.inverse_LL, _times(chunk.beta_LW, error_LV)), error_LV


def _next_state(sizes: Sizes, chunk: Chunk, u_LV, state_KV):
    k_LK = _keys(sizes, chunk.qk_RK)
    written_KV = _dot(sizes.operand, k_LK, _times(chunk.leave_LW, u_LV), (1, 1))
    return _times(chunk.across_11, state_KV) + written_KV


def _chunk_backward(sizes: Sizes, chunk: Chunk, u_LV, error_LV, state_KV, do_CV, dstate_KV):
    """Gradients of a chunk; see ``chunk.backward``.

    Returns:
      dq above dk [h, R, K]; dv; rows [h, ...] of dbeta and, with a decay, of dsum and dend; dstate.
    """
    dot, keys = functools.partial(_dot, sizes.operand), functools.partial(_keys, sizes)
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


def _inverse(sizes: Sizes, a_LL) -> jax.Array:
    """(I + A)^{-1} by merging blocks, as in ``chunk.py``: X - X A_b X = (I - X A_b) X.

    X is block diagonal, so it is kept as the rows of one block, side by side for all blocks:
    [h, N * block, L] for blocks of so many tokens. Micro-steps meet in the merge of blocks of b
    where b is the highest bit in which their numbers differ.
    """
    dot = functools.partial(_dot, sizes.operand)
    differ_LL = _differ(sizes)
    numbers = 1 << (sizes.steps - 1).bit_length()  # per token
    eye_LL = jnp.where(differ_LL == 0, 1.0, 0.0)
    block = min(BLOCK, sizes.chunk)
    eye_bL = _block_rows(sizes, block, eye_LL)
    x_bL = eye_bL - _block_rows(sizes, block, jnp.where(differ_LL == 1, a_LL, 0))
    for level in range(1, (sizes.chunk * numbers - 1).bit_length()):
        x_bL = x_bL.astype(sizes.operand)
        x_LL = jnp.where(differ_LL < block * numbers, _repeat(sizes, block, x_bL), _zero(x_bL))
        xa_bL = dot(x_bL, jnp.where(differ_LL >> level == 1, a_LL, 0))
        if 1 << level < block * numbers:
            x_bL = dot(eye_bL - xa_bL, x_LL)
        else:
            x_bL = _double(sizes, block, x_bL, dot(-xa_bL, x_LL).astype(sizes.operand))
            block *= 2
    return x_bL if sizes.operand == jnp.float32 else _newton(a_LL, x_bL, eye_LL)


def _newton(a_LL, x_LL, eye_LL):
    """X + X (I - (I + A) X), where (I + A) is the sum of two bfloat16 matrices."""
    dot = functools.partial(_dot, jnp.dtype(jnp.bfloat16))
    x_LL = x_LL.astype(jnp.bfloat16)
    high_LL = _truncate(a_LL)
    sum_LL = jnp.concatenate([eye_LL + high_LL, a_LL - high_LL], axis=2)
    return dot(x_LL, 2 * eye_LL - dot(sum_LL, jnp.concatenate([x_LL, x_LL], axis=1)))


def _block_rows(sizes: Sizes, block: int, x_LL):
    """Rows of the diagonal blocks of so many tokens, side by side: [., N * block, L]."""
    token_1L = jax.lax.broadcasted_iota(jnp.int32, (1, 1, sizes.micro), 2) & (sizes.chunk - 1)
    rows = []
    for first in range(0, sizes.micro, sizes.chunk):
        rows_bL = x_LL[:, first : first + block]
        for start in range(block, sizes.chunk, block):
            here = x_LL[:, first + start : first + start + block]
            rows_bL = jnp.where(token_1L // block == start // block, here, rows_bL)
        rows.append(rows_bL)
    return jnp.concatenate(rows, axis=1)


def _repeat(sizes: Sizes, block: int, x_bL):
    """Rows of a block as rows of every block: [., L, L]."""
    steps = [x_bL[:, j * block : (j + 1) * block] for j in range(sizes.steps)]
    return jnp.concatenate([x for x in steps for _ in range(sizes.chunk // block)], axis=1)


def _double(sizes: Sizes, block: int, x_bL, below_bL):
    """Rows of blocks twice as large, from those of the halves and those below the diagonal."""
    second = jax.lax.broadcasted_iota(jnp.int32, (1, block, sizes.micro), 2) & block != 0
    rows = []
    for j in range(sizes.steps):
        x, below = (y[:, j * block : (j + 1) * block] for y in (x_bL, below_bL))
        rows += [jnp.where(second, _zero(x), x), jnp.where(second, x, below)]
    return jnp.concatenate(rows, axis=1)


def _number(sizes: Sizes, axis: int):
    """A number per micro-step along an axis of [1, L, L] that grows in the true order."""
    index = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.micro, sizes.micro), axis)
    token, step = index & (sizes.chunk - 1), index >> (sizes.chunk.bit_length() - 1)
    return (token << (sizes.steps - 1).bit_length()) + step


def _differ(sizes: Sizes):
    return _number(sizes, 1) ^ _number(sizes, 2)


def _before(sizes: Sizes):
    """Whether the row reads the state after micro-step s (column): [1, R, L]."""
    shape = (1, sizes.chunk, sizes.micro)
    token, other = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    queries = (other & (sizes.chunk - 1)) <= token
    return jnp.concatenate([queries, _number(sizes, 2) < _number(sizes, 1)], axis=1)


def _rows_and_columns(sizes: Sizes, rows, width: int):
    """Functions that give quantity i of ``_factors`` as [h, 1, L], and as [h, length, W].

    The matrix unit makes the columns, exactly: the three bfloat16 parts of a float32, times ones.
    """
    high = _truncate(rows)
    middle = _truncate(rows - high)
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


def _truncate(x):
    """The leading bits of a float32 that a bfloat16 holds, as a float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & -65536, jnp.float32)


def _times(factor: jax.Array | None, x: jax.Array) -> jax.Array:
    """Rows of x by their factors, of which there may be more rows and lanes; None is 1."""
    return x if factor is None else factor[:, : x.shape[1], : x.shape[2]] * x


def _keys(sizes: Sizes, x: jax.Array) -> jax.Array:
    """The rows of the keys: [., R, .] -> [., L, .]."""
    return x[:, sizes.chunk :]


def _sum(x):
    return jnp.sum(x, axis=-1, keepdims=True)


def _zero(x):
    return jnp.zeros((), x.dtype)


def _as_rows(x_L1):
    """Columns [h, L, 1] as rows [h, L]."""
    return jnp.concatenate([x_L1[h] for h in range(x_L1.shape[0])], axis=1).T


def _dot(operand, a, b, contract=(2, 1)):
    """Product per head, summed over axis contract[0] of a and contract[1] of b, in float32."""
    full = operand == jnp.float32
    return jax.lax.dot_general(
        *(a.astype(operand), b.astype(operand)),
        (((contract[0],), (contract[1],)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _span(sizes: Sizes, m: int) -> slice:
    """The tokens of chunk m of a window."""
    return slice(m * sizes.chunk, (m + 1) * sizes.chunk)


# Around the kernels: sizes, layouts, the call.


def _default_chunk(steps: int, stride: int) -> int:
    return min(stride, 1 << (MICRO_STEPS // steps).bit_length() - 1)


def _sizes(q, k, v, g, run, scale, chunk, stride) -> Sizes:
    batch, tokens, steps, heads = k.shape[:4]
    chunk = _default_chunk(steps, stride) if chunk is None else chunk
    rounded = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    # More than one step means fewer tokens per chunk, and room for twice as many heads.
    limit = GROUP * min(steps, 2) * 128 // max(128, q.shape[-1], v.shape[-1])
    return Sizes(
        batch=batch,
        tokens=tokens,
        steps=steps,
        heads=heads,
        chunk=chunk,
        chunks=stride // chunk,
        windows=pl.cdiv(tokens, stride),
        group=max(h for h in range(1, limit + 1) if batch * heads % h == 0),
        operand=jnp.dtype(jnp.bfloat16 if rounded else jnp.float32),
        scale=scale,
        has_decay=g is not None,
        has_run=run is not None,
    )


def _pad(sizes: Sizes, x, mode="constant"):
    """Pads axis 1 to whole windows, with tokens that do nothing."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, sizes.windows * sizes.chunks * sizes.chunk - sizes.tokens)
    return jnp.pad(x, padding, mode=mode)


def _heads_first(sizes: Sizes, x):
    """[B, T, (N,) H, D] -> [N or 1, B * H, X * M * C, D] in the dtype of factors."""
    x = x[:, :, None] if x.ndim == 4 else x
    x = _pad(sizes, x.astype(sizes.operand)).transpose(2, 0, 3, 1, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _tokens_first(sizes: Sizes, x):
    """[N, B * H, X * M * C, D] -> [B, T, N, H, D]."""
    x = x.reshape(-1, sizes.batch, sizes.heads, *x.shape[2:])
    return x.transpose(1, 3, 0, 2, 4)[:, : sizes.tokens]


def _factors(sizes: Sizes, beta, g, run):
    """beta, G, run and entering run (those in use) as rows: [B * H / h, X * M, rows * h, L]."""
    rows = [_chunk_rows(sizes, _pad(sizes, beta))]
    if g is not None:  # e^-104 is 0 in float32: more would only cost G its digits
        g = _chunk_rows(sizes, _pad(sizes, g[:, :, None]))
        rows.append(jnp.cumsum(jnp.maximum(g, -104), axis=-1))
    if run is not None:
        run = jnp.broadcast_to(run[..., None, None], (*run.shape, 1, sizes.heads))
        run = _pad(sizes, run, mode="edge")
        entering_run = jnp.pad(run[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        run, entering_run = (_chunk_rows(sizes, x) for x in (run, entering_run))
        rows += [run, jnp.broadcast_to(entering_run[..., :1], run.shape)]
    rows = [jnp.tile(x, sizes.micro // x.shape[-1]) for x in rows]
    return jnp.concatenate(rows, axis=-2)


def _chunk_rows(sizes: Sizes, x):
    """[B, T, N or 1, H] -> [B * H / h, X * M, h, C * N] in float32."""
    batch, tokens, steps, heads = x.shape
    x = x.astype(jnp.float32).reshape(batch, tokens // sizes.chunk, sizes.chunk, steps, heads)
    x = x.transpose(0, 4, 1, 3, 2)
    x = x.reshape(-1, sizes.group, tokens // sizes.chunk, steps * sizes.chunk)
    return x.transpose(0, 2, 1, 3)


def _steps_last(sizes: Sizes, x, steps: int):
    """The inverse: [B * H / h, X * M, h, C * N] -> [B, T, N, H]."""
    chunks = x.shape[1]
    x = x.transpose(0, 2, 1, 3)
    x = x.reshape(sizes.batch, sizes.heads, chunks, steps, sizes.chunk).transpose(0, 2, 4, 3, 1)
    x = x.reshape(sizes.batch, chunks * sizes.chunk, steps, sizes.heads)
    return x[:, : sizes.tokens]


def _decay_gradient(sizes: Sizes, dsum_C, dend_V):
    """dg_t sums dL/dG of its chunk from token t on: [B, T, H]."""
    dsum_C = jax.lax.cumsum(dsum_C, axis=dsum_C.ndim - 1, reverse=True)
    dg_C = dsum_C + jnp.sum(dend_V, axis=-1, keepdims=True)
    return _steps_last(sizes, dg_C, 1)[:, :, 0]


def _call(kernel, sizes: Sizes, window, inputs: dict, outputs: dict):
    """Runs a kernel on the grid (group of heads, window).

    ``inputs`` and ``outputs`` list arrays (or their shapes) by kind, in the kernel's order;
    ``window`` maps the second index of the grid to the window it works on.
    """
    index = {
        "tokens": lambda h, x: (0, h, window(x), 0),
        "chunks": lambda h, x: (h, window(x), 0, 0),
        "states": lambda h, x: (h, 0, 0),
        "starts": lambda h, x: (window(x), h, 0, 0),
    }
    block = {
        "tokens": lambda s: (s[0], sizes.group, sizes.chunks * sizes.chunk, s[3]),
        "chunks": lambda s: (None, sizes.chunks, *s[2:]),
        "states": lambda s: (sizes.group, *s[1:]),
        "starts": lambda s: (None, sizes.group, *s[2:]),
    }
    flat = lambda arrays: [(kind, x) for kind in arrays for x in arrays[kind]]
    specs = lambda arrays: [
        pl.BlockSpec(block[kind](x.shape), index[kind]) for kind, x in flat(arrays)
    ]
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        grid=(sizes.batch * sizes.heads // sizes.group, sizes.windows),
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        out_shape=_varying([x for _, x in flat(outputs)], [x for _, x in flat(inputs)]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        name="delta_product" + kernel.__name__.removesuffix("_kernel"),
    )(*(x for _, x in flat(inputs)))


def _varying(shapes, inputs):
    """Shapes of outputs that vary over the axes of ``jax.shard_map`` over which any input does."""

    def outputs(*inputs):
        seed = sum(x.ravel()[0].astype(jnp.float32) for x in inputs)
        return [jnp.broadcast_to(seed, x.shape).astype(x.dtype) for x in shapes]

    return jax.eval_shape(outputs, *inputs)
