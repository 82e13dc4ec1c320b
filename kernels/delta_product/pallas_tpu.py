"""DeltaProduct as two Pallas TPU kernels, forward and backward: scans over windows of tokens.

The mathematics and the symbols are those of ``chunk.py``; only what the hardware asks for is
written anew. The grid is (batch, group of heads, window). Windows of ``stride`` tokens follow one
another on the same core, the state stays in VMEM, and the heads of a group go through every
product side by side, which hides the latency of the matrix unit.

Dimensions besides those of ``chunk.py``: X windows, M chunks per window, h heads per group.
Micro-steps are ordered step by step, not token by token: micro-step (t, j) of a chunk is row
j * C + t, so that the N blocks of a chunk are concatenated and never interleaved. Masks compare
the true order t * N + j; merging blocks commutes with a permutation.

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

from . import chunk as chunk_lib

MICRO_STEPS = 128  # of a chunk at most: rows of the matrix unit
GROUP = 4  # heads per grid step at most
WIDTHS = (32, 64, 128, 256)


class Sizes(NamedTuple):
    """What is static about a call."""

    tokens: int  # T
    steps: int  # N
    chunk: int  # C
    chunks: int  # M
    windows: int  # X
    group: int  # h
    operand: jnp.dtype  # of the factors of matrix products
    scale: float
    has_decay: bool
    has_run: bool


class Chunk(NamedTuple):
    """Everything about a chunk of h heads that does not depend on the state entering it."""

    q_CK: jax.Array
    k_LK: jax.Array
    v_LV: jax.Array  # float32, as all below
    beta_L1: jax.Array
    decay_LL: jax.Array  # from micro-step r (column) to s (row) for r before s, else 0
    decay_CL: jax.Array  # to token t (row), times the scale of the output
    enter_C1: jax.Array | float  # times the scale of the output
    enter_L1: jax.Array | float
    leave_L1: jax.Array | float
    across_11: jax.Array | float
    kk_LL: jax.Array
    inverse_LL: jax.Array
    p_CL: jax.Array


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
    o = _like(tokens[0], q.dtype, width=v.shape[-1])
    final = _like(state, jnp.float32)
    starts = jax.ShapeDtypeStruct((sizes.windows, *state.shape), jnp.float32)
    o, final, starts = _call(
        *(_forward_kernel, sizes, lambda x: x),
        {"tokens": tokens, "chunks": [_factors(sizes, beta, g, run)], "states": [state]},
        {"tokens": [o], "states": [final], "starts": [starts]},
    )
    return _tokens_first(sizes, o)[:, :, 0], final, starts


def backward(q, k, v, beta, g, run, starts, do, dfinal, *, scale, chunk, stride):
    """Gradients of ``forward`` from the states that it kept.

    Args:
      starts: [X, B, H, K, V]; do: [B, T, H, V]; dfinal: [B, H, K, V]; the others as there.

    Returns:
      dq, dk, dv, dbeta, dg in the shapes and dtypes of their inputs (dg is None without g), and
      dstate [B, H, K, V] in float32.
    """
    sizes = _sizes(q, k, v, g, run, scale, chunk, stride)
    tokens = [_heads_first(sizes, x) for x in (q, k, v, do)]
    factors = _factors(sizes, beta, g, run)
    per_chunk = lambda width: jax.ShapeDtypeStruct(
        (*factors.shape[:3], sizes.group, width), jnp.float32
    )
    dfactors = [per_chunk(sizes.chunk * sizes.steps)]  # dbeta
    if sizes.has_decay:
        dfactors += [per_chunk(sizes.chunk), per_chunk(v.shape[-1])]  # dsum, dend
    dq, dk, dv, *dfactors, dstate = _call(
        *(_backward_kernel, sizes, lambda x: sizes.windows - 1 - x),
        {"tokens": tokens, "chunks": [factors], "starts": [starts], "states": [dfinal]},
        {
            "tokens": [_like(x, y.dtype) for x, y in zip(tokens, (q, k, v), strict=False)],
            "chunks": dfactors,
            "states": [_like(dfinal, jnp.float32)],
        },
    )
    dq, dk, dv = (_tokens_first(sizes, x) for x in (dq, dk, dv))
    dbeta = _steps_last(sizes, dfactors[0], sizes.steps).astype(beta.dtype)
    dg = None if g is None else _decay_gradient(sizes, *dfactors[1:]).astype(g.dtype)
    return dq[:, :, 0], dk, dv, dbeta, dg, dstate


# Kernels. Refs hold the blocks of one group of heads and one window.


def _forward_kernel(sizes, q, k, v, factors, state, o, final, starts):
    @pl.when(pl.program_id(2) == 0)
    def _():
        final[...] = state[...]

    dot = functools.partial(_dot, sizes.operand)
    state_KV = final[...]
    starts[...] = state_KV
    for m in range(sizes.chunks):
        chunk = _prepare(sizes, m, q, k, v, factors)
        u_LV, _ = _pseudo_values(dot, chunk, state_KV)
        o_CV = chunk.enter_C1 * dot(chunk.q_CK, state_KV) + dot(chunk.p_CL, u_LV)
        o[0, :, _span(sizes, m)] = o_CV.astype(o.dtype)
        state_KV = _next_state(dot, chunk, u_LV, state_KV)
    final[...] = state_KV


def _backward_kernel(sizes, q, k, v, do, factors, starts, dfinal, dq, dk, dv, *rest):
    *dfactors, dstate = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dfinal[...]

    dot = functools.partial(_dot, sizes.operand)
    state_KV, entered = starts[...], []
    for m in range(sizes.chunks):
        chunk = _prepare(sizes, m, q, k, v, factors)
        u_LV, error_LV = _pseudo_values(dot, chunk, state_KV)
        entered.append((chunk, u_LV, error_LV, state_KV))
        if m + 1 < sizes.chunks:
            state_KV = _next_state(dot, chunk, u_LV, state_KV)
    dstate_KV = dstate[...]
    for m in reversed(range(sizes.chunks)):
        do_CV = do[0, :, _span(sizes, m)]
        *dtokens, gradients, dstate_KV = _chunk_backward(sizes, *entered[m], do_CV, dstate_KV)
        for ref, gradient in zip((dq, dk, dv), dtokens, strict=True):
            for j in range(ref.shape[0]):
                rows = gradient[:, j * sizes.chunk : (j + 1) * sizes.chunk]
                ref[j, :, _span(sizes, m)] = rows.astype(ref.dtype)
        for ref, gradient in zip(dfactors, gradients, strict=True):
            ref[m] = gradient
    dstate[...] = dstate_KV


def _prepare(sizes: Sizes, m: int, q, k, v, factors) -> Chunk:
    """The part of chunk m of the window that does not depend on the state."""
    dot = functools.partial(_dot, sizes.operand)
    q_CK = q[0, :, _span(sizes, m)]
    k_LK, v_LV = (
        jnp.concatenate([x[j, :, _span(sizes, m)] for j in range(sizes.steps)], axis=1)
        for x in (k, v)
    )
    rows, group, tokens = factors[m], sizes.group, sizes.chunk
    columns = rows.T
    heads = lambda i: range(i * group, (i + 1) * group)
    row = lambda i: jnp.stack([rows[h : h + 1] for h in heads(i)])
    column = lambda i: jnp.stack([columns[:, h : h + 1] for h in heads(i)])

    token_CL, _ = _order(sizes, tokens)
    _, order_LL = _order(sizes, tokens * sizes.steps)
    within_CL = token_CL[1] <= token_CL[0]
    if sizes.has_run:
        within_CL &= columns[:tokens, -1:] == rows[-1:]
    decay_CL = within_CL.astype(jnp.float32)[None]
    beta_L1 = column(0)
    enter_C1 = enter_L1 = leave_L1 = across_11 = 1.0
    if sizes.has_decay or sizes.has_run:
        enter_L1, leave_L1 = column(1), column(2)
        enter_C1 = enter_L1[:, :tokens]
        across_11 = row(1)[:, :, tokens - 1 : tokens]
    if sizes.has_decay:
        decay_CL = jnp.where(within_CL[None], jnp.exp(column(3)[:, :tokens] - row(3)), 0)
    before_LL = (order_LL[1] < order_LL[0])[None]
    decay_LL = jnp.where(before_LL, jnp.concatenate([decay_CL] * sizes.steps, axis=1), 0)
    kk_LL = dot(k_LK, k_LK, (2, 2))
    decay_CL = sizes.scale * decay_CL
    return Chunk(
        *(q_CK, k_LK, v_LV.astype(jnp.float32), beta_L1, decay_LL, decay_CL),
        enter_C1=sizes.scale * enter_C1,
        enter_L1=enter_L1,
        leave_L1=leave_L1,
        across_11=across_11,
        kk_LL=kk_LL,
        inverse_LL=_inverse(sizes, beta_L1 * decay_LL * kk_LL, order_LL),
        p_CL=decay_CL * dot(q_CK, k_LK, (2, 2)),
    )


def _order(sizes: Sizes, rows: int):
    """Token and true micro-step, as pairs (of the row, of the column), of a [rows, L] matrix."""
    shape = (rows, sizes.chunk * sizes.steps)
    index = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1)]
    token = [i & (sizes.chunk - 1) for i in index]
    order = [t * sizes.steps + (i - t) // sizes.chunk for i, t in zip(index, token, strict=True)]
    return token, order


def _inverse(sizes: Sizes, a_LL, order_LL) -> jax.Array:
    """(I + A)^{-1} by merging blocks, as in ``chunk.py``, for permuted micro-steps.

    Two micro-steps meet in the merge of blocks of b where the highest bit in which their numbers
    differ is b.
    """
    dot = functools.partial(_dot, sizes.operand)
    differ_LL = (order_LL[0] ^ order_LL[1])[None]
    eye_LL = (differ_LL == 0).astype(jnp.float32)
    inverse_LL = eye_LL - jnp.where(differ_LL == 1, a_LL, 0)
    for level in range(1, (a_LL.shape[-1] - 1).bit_length()):
        added_LL = jnp.where(differ_LL >> level == 1, a_LL, 0)
        inverse_LL = inverse_LL - dot(dot(inverse_LL, added_LL), inverse_LL)
    if sizes.operand == jnp.bfloat16:
        rounded_LL = inverse_LL.astype(jnp.bfloat16)
        low_LL = a_LL - a_LL.astype(jnp.bfloat16).astype(jnp.float32)
        inverse_LL = rounded_LL.astype(jnp.float32)
        rest_LL = eye_LL - inverse_LL - dot(a_LL, rounded_LL) - dot(low_LL, rounded_LL)
        inverse_LL = inverse_LL + dot(rounded_LL, rest_LL)
    return inverse_LL


def _pseudo_values(dot, chunk: Chunk, state_KV):
    """u = T (beta error) and error = v - e^G k H: [h, L, V] each."""
    error_LV = chunk.v_LV - chunk.enter_L1 * dot(chunk.k_LK, state_KV)
    return dot(chunk.inverse_LL, chunk.beta_L1 * error_LV), error_LV


def _next_state(dot, chunk: Chunk, u_LV, state_KV):
    return chunk.across_11 * state_KV + dot(chunk.k_LK, chunk.leave_L1 * u_LV, (1, 1))


def _chunk_backward(sizes, chunk: Chunk, u_LV, error_LV, state_KV, do_CV, dstate_KV):
    """Gradients of a chunk; see ``chunk.backward``, whose v - held is error - (decay kk) u here.

    Returns:
      dq, dk, dv; rows [h, ...] of dbeta and, with a decay, of dsum and dend; dstate.
    """
    dot = functools.partial(_dot, sizes.operand)
    q_CK, k_LK, beta_L1 = chunk.q_CK, chunk.k_LK, chunk.beta_L1
    left_LV = chunk.leave_L1 * dot(k_LK, dstate_KV)
    du_LV = dot(chunk.p_CL, do_CV, (1, 1)) + left_LV
    e_LV = dot(chunk.inverse_LL, du_LV, (1, 1))  # T^T du
    dv_LV = beta_L1 * e_LV

    eu_LL = dot(e_LV, u_LV, (2, 2)) * chunk.decay_LL
    dbeta_L1 = _row_sum(e_LV * error_LV) - _row_sum(eu_LL * chunk.kk_LL)
    dkk_LL = beta_L1 * eu_LL
    dqk_CL = dot(do_CV, u_LV, (2, 2)) * chunk.decay_CL

    read_CV = chunk.enter_C1 * do_CV.astype(jnp.float32)
    held_LV = chunk.enter_L1 * dv_LV
    dq_CK = dot(read_CV, state_KV, (2, 2)) + dot(dqk_CL, k_LK)
    dk_LK = dot(dqk_CL, q_CK, (1, 1)) - dot(dkk_LL + dkk_LL.transpose(0, 2, 1), k_LK)
    dk_LK = dk_LK + dot(chunk.leave_L1 * u_LV, dstate_KV, (2, 2)) - dot(held_LV, state_KV, (2, 2))

    carried_KV = chunk.across_11 * dstate_KV
    dstate_in_KV = carried_KV + dot(q_CK, read_CV, (1, 1)) - dot(k_LK, held_LV, (1, 1))

    gradients = [_as_rows(dbeta_L1)]
    if sizes.has_decay:
        dvalue_L1 = _row_sum(chunk.v_LV * dv_LV)
        dsum_C1 = _row_sum(q_CK.astype(jnp.float32) * dq_CK)
        for j in range(sizes.steps):
            dsum_C1 = dsum_C1 - dvalue_L1[:, j * sizes.chunk : (j + 1) * sizes.chunk]
        dend_V = jnp.sum(carried_KV * state_KV, axis=1) + jnp.sum(u_LV * left_LV, axis=1)
        gradients += [_as_rows(dsum_C1), dend_V]
    return dq_CK, dk_LK, dv_LV, gradients, dstate_in_KV


def _row_sum(x):
    return jnp.sum(x, axis=-1, keepdims=True)


def _as_rows(x_L1):
    """Columns [h, L, 1] as rows [h, L]."""
    return jnp.concatenate([x_L1[h] for h in range(x_L1.shape[0])], axis=1).T


def _dot(operand, a, b, contract=(2, 1)):
    """Product per head, summed over axis contract[0] of a and contract[1] of b, in float32."""
    precision = jax.lax.Precision.HIGHEST if operand == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return jax.lax.dot_general(
        *(a.astype(operand), b.astype(operand), dimensions),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _span(sizes: Sizes, m: int) -> slice:
    """The tokens of chunk m of a window."""
    return slice(m * sizes.chunk, (m + 1) * sizes.chunk)


# Around the kernels: sizes, layouts, the call.


def _default_chunk(steps: int, stride: int) -> int:
    return min(stride, 1 << (MICRO_STEPS // steps).bit_length() - 1)


def _sizes(q, k, v, g, run, scale, chunk, stride) -> Sizes:
    tokens, steps, heads = k.shape[1:4]
    chunk = _default_chunk(steps, stride) if chunk is None else chunk
    rounded = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    return Sizes(
        tokens=tokens,
        steps=steps,
        chunk=chunk,
        chunks=stride // chunk,
        windows=pl.cdiv(tokens, stride),
        group=max(h for h in range(1, GROUP + 1) if heads % h == 0),
        operand=jnp.dtype(jnp.bfloat16 if rounded else jnp.float32),
        scale=scale,
        has_decay=g is not None,
        has_run=run is not None,
    )


def _like(x, dtype, width=None) -> jax.ShapeDtypeStruct:
    shape = x.shape if width is None else (*x.shape[:-1], width)
    return jax.ShapeDtypeStruct(shape, dtype)


def _pad(sizes: Sizes, x, mode="constant"):
    """Pads axis 1 to whole windows, with tokens that do nothing."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, sizes.windows * sizes.chunks * sizes.chunk - sizes.tokens)
    return jnp.pad(x, padding, mode=mode)


def _heads_first(sizes: Sizes, x):
    """[B, T, (N,) H, D] -> [B, N or 1, H, X * M * C, D] in the dtype of factors."""
    x = x[:, :, None] if x.ndim == 4 else x
    return _pad(sizes, x.astype(sizes.operand)).transpose(0, 2, 3, 1, 4)


def _tokens_first(sizes: Sizes, x):
    """[B, N, H, X * M * C, D] -> [B, T, N, H, D]."""
    return x.transpose(0, 3, 1, 2, 4)[:, : sizes.tokens]


def _factors(sizes: Sizes, beta, g, run):
    """Rows beta, enter, leave, G and run of every chunk: [B, H / h, X * M, rows, L]."""
    rows = [_chunk_rows(sizes, beta)]
    tile = lambda x: jnp.tile(x, sizes.steps)
    sum_C = decay = None
    if g is not None:
        g = _chunk_rows(sizes, g[:, :, None])
        sum_C = jnp.cumsum(g, axis=-1)
    entering_run = None
    if run is not None:
        run = _pad(sizes, run, mode="edge")
        chunked = (run.shape[0], 1, run.shape[1] // sizes.chunk, 1, sizes.chunk)
        entering_run = jnp.pad(run[:, :-1], ((0, 0), (1, 0))).reshape(chunked)[..., 0]
        run = run.reshape(chunked)
    if g is not None or run is not None:
        shape = (*rows[0].shape[:-1], sizes.chunk)
        decay = chunk_lib.decays(g, run, entering_run, shape, jnp.float32)
        rows += [tile(decay.enter_C), tile(decay.leave_C)]
    if sum_C is not None:
        rows.append(tile(sum_C))
    if run is not None:
        shape = (*rows[0].shape[:-2], 1, sizes.chunk)
        rows.append(tile(jnp.broadcast_to(run.astype(jnp.float32), shape)))
    return jnp.concatenate(rows, axis=-2)


def _chunk_rows(sizes: Sizes, x):
    """[B, T, N, H] -> [B, H / h, X * M, h, C * N] in float32."""
    x = _pad(sizes, x.astype(jnp.float32))
    batch, _, steps, heads = x.shape
    x = x.reshape(batch, -1, sizes.chunk, steps, heads // sizes.group, sizes.group)
    x = x.transpose(0, 4, 1, 5, 3, 2)
    return x.reshape(*x.shape[:4], steps * sizes.chunk)


def _steps_last(sizes: Sizes, x, steps: int):
    """The inverse: [B, H / h, X * M, h, C * N] -> [B, T, N, H]."""
    batch, groups, chunks = x.shape[:3]
    x = x.reshape(batch, groups, chunks, sizes.group, steps, sizes.chunk)
    x = x.transpose(0, 2, 5, 4, 1, 3)
    x = x.reshape(batch, chunks * sizes.chunk, steps, groups * sizes.group)
    return x[:, : sizes.tokens]


def _decay_gradient(sizes: Sizes, dsum_C, dend_V):
    """dg_t sums dL/dG of its chunk from token t on: [B, T, H]."""
    dsum_C = jax.lax.cumsum(dsum_C, axis=dsum_C.ndim - 1, reverse=True)
    dg_C = dsum_C + jnp.sum(dend_V, axis=-1, keepdims=True)
    return _steps_last(sizes, dg_C, 1)[:, :, 0]


def _call(kernel, sizes: Sizes, window, inputs: dict, outputs: dict):
    """Runs a kernel on the grid (batch, group of heads, window).

    ``inputs`` and ``outputs`` list arrays (or their shapes) by kind, in the kernel's order;
    ``window`` maps the third index of the grid to the window it works on.
    """
    index = {
        "tokens": lambda b, g, x: (b, 0, g, window(x), 0),
        "chunks": lambda b, g, x: (b, g, window(x), 0, 0),
        "states": lambda b, g, x: (b, g, 0, 0),
        "starts": lambda b, g, x: (window(x), b, g, 0, 0),
    }
    block = {
        "tokens": lambda s: (None, s[1], sizes.group, sizes.chunks * sizes.chunk, s[4]),
        "chunks": lambda s: (None, None, sizes.chunks, *s[3:]),
        "states": lambda s: (None, sizes.group, *s[2:]),
        "starts": lambda s: (None, None, sizes.group, *s[3:]),
    }
    specs = lambda arrays: [
        pl.BlockSpec(block[kind](x.shape), index[kind]) for kind in arrays for x in arrays[kind]
    ]
    flat = lambda arrays: [x for kind in arrays for x in arrays[kind]]
    batch, _, heads = inputs["tokens"][0].shape[:3]
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        grid=(batch, heads // sizes.group, sizes.windows),
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        out_shape=flat(outputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name=kernel.__name__.strip("_"),
    )(*flat(inputs))
