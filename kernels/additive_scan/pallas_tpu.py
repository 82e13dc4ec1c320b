"""The additive recurrence as TPU kernels, forward and backward.

The grid is (B * H / G, X): G heads a step, and the X chunks of their rows one after the other,
with the states in VMEM. The mathematics is that of ``chunk.py`` with blocks down to single tokens,
so that all pairs of different tokens come from products of matrices; symbols as there. One thing
differs: the reference of a token is the largest logit so far, m_i, instead of the normaliser,

  exp(k_j - z_i) = exp(k_j - m_i) / n_i,   n_i = sum_{j <= i} exp(k_j - m_i) + exp(z_b - m_i),

because m needs comparisons only and n comes out of the factors of the tree. It is 0 for a
channel that has seen no token at all, and at least 1 for all others.

Products want the tokens of a head as rows of a matrix. Everything along time wants them one
register apart, which holds the same token of eight heads: the tree then moves no rows within
registers. Arrays go from one layout to the other through VMEM, with strided loads and stores.
Dimensions: G heads of a step, C tokens, K, V, and L * W = K lanes for the second layout, in which
the eight heads are R.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..per_device import varying
from .tpu_layout import (
    PARAMS,
    Tokens,
    chunk_spec,
    heads_first,
    row_spec,
    start_spec,
    token_specs,
    tokens_first,
    tokens_of,
)
from .tpu_tree import (
    ROWS,
    Factors,
    across,
    lane_tiles,
    lanes_of,
    put,
    rows_of,
    runs_on_lanes,
    scratch_of,
    take,
    through_normaliser,
    to_first_keys,
    tree,
)

HIGHEST = jax.lax.Precision.HIGHEST
TOGETHER = {jnp.bfloat16: 4, jnp.float32: 2}  # heads whose products alternate
OWN, LATER = -1, -2  # where two tokens do not meet at a level


def supports(q, k, v, f, state, run, *, scale, chunk, stride) -> str | None:
    """None, or why the kernels cannot run on these arguments."""
    del state, run, scale
    if any(d not in (32, 64, 128, 256) for d in (q.shape[-1], v.shape[-1])):
        return f"K and V must be 32, 64, 128 or 256, got {q.shape[-1]} and {v.shape[-1]}"
    for x in (q, k, v, f):
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"arrays must be float32 or bfloat16, got {x.dtype}"
    if stride not in (16, 32, 64, 128):
        return f"stride must be 16, 32, 64 or 128 tokens, got {stride}"
    if chunk not in (None, stride):
        return f"a chunk must hold the {stride} tokens of a stride, got {chunk}"
    return None


def forward(q, k, v, f, state, run, *, scale, chunk, stride):
    """Runs the recurrence over rows.

    Args:
      q, k: [B, T, H, K]; v: [B, T, H, V]; f: [B, T, H, K] factors on the keys, or None.
      state: (S [B, H, K, V], z [B, H, K]) before the first token, float32.
      run: [B, T] number of resets so far, or None.
      scale: factor on the output.
      chunk: tokens per chunk: None or ``stride``.
      stride: tokens between the states that are kept.

    Returns:
      o [B, T, H, V] in q's dtype, the state after the last token, and the states before every
      ``stride`` tokens: (S [X, B, H, K, V], z [X, B, H, K]).
    """
    del chunk
    tokens = tokens_of(q, k, v, f, run, stride)
    groups, heads, length, key_dim = tokens.q.shape
    value_dim, count = v.shape[-1], length // stride
    s, z = (x.reshape(groups, heads, *x.shape[2:]) for x in state)
    state_specs = [row_spec(heads, key_dim, value_dim), row_spec(heads, key_dim)]
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    o, *final, starts_s, starts_z = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, operand=_operand(q, v)),
        grid=(groups, count),
        in_specs=[token_specs(tokens, stride, lambda x: x), *state_specs],
        out_specs=[
            chunk_spec(tokens.v, stride, lambda x: x),
            *state_specs,
            start_spec(lambda x: x, heads, key_dim, value_dim),
            start_spec(lambda x: x, heads, key_dim),
        ],
        out_shape=varying(
            [
                jax.ShapeDtypeStruct(tokens.v.shape, q.dtype),
                *(float32(*x.shape) for x in (s, z)),
                *(float32(count, *x.shape) for x in (s, z)),
            ],
            jax.tree.leaves((tokens, s, z)),
        ),
        scratch_shapes=[scratch_of(stride, key_dim), pltpu.VMEM((ROWS, key_dim), jnp.float32)],
        compiler_params=PARAMS,
        name="additive_scan_forward",
    )(tokens, s, z)
    final = tuple(x.reshape(y.shape) for x, y in zip(final, state, strict=True))
    starts = zip((starts_s, starts_z), state, strict=True)
    return tokens_first(o, q), final, tuple(x.reshape(count, *y.shape) for x, y in starts)


def backward(q, k, v, f, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of :func:`forward`, from its arguments, its states and their cotangents.

    Args:
      starts, final: the states that ``forward`` returns.
      do: [B, T, H, V]; dfinal: cotangents of the state after the last token.

    Returns:
      dq, dk, dv, df (None without f) in the dtypes of the inputs, and (dS, dz) of the state
      before the first token.
    """
    del chunk
    tokens = tokens_of(q, k, v, f, run, stride)
    groups, heads, length, key_dim = tokens.q.shape
    value_dim, count = v.shape[-1], length // stride
    back = lambda x: count - 1 - x
    do_NGTV = heads_first(do, stride)
    starts_s, starts_z = (x.reshape(count, groups, heads, *x.shape[3:]) for x in starts)
    ds = dfinal[0].reshape(groups, heads, key_dim, value_dim)
    r = (jnp.sum(dfinal[0] * final[0], axis=-1) - dfinal[1]).reshape(groups, heads, key_dim)
    state_specs = [row_spec(heads, key_dim, value_dim), row_spec(heads, key_dim)]
    inputs = [x for x in tokens[:4] if x is not None]
    *gradients, ds, r = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale, operand=_operand(q, v)),
        grid=(groups, count),
        in_specs=[
            token_specs(tokens, stride, back),
            start_spec(back, heads, key_dim, value_dim),
            start_spec(back, heads, key_dim),
            chunk_spec(do_NGTV, stride, back),
            *state_specs,
        ],
        out_specs=[*(chunk_spec(x, stride, back) for x in inputs), *state_specs],
        out_shape=varying(
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, ds, r)],
            jax.tree.leaves((tokens, starts_s, starts_z, do_NGTV, ds, r)),
        ),
        scratch_shapes=[
            scratch_of(stride, key_dim),
            pltpu.VMEM((3, ROWS, key_dim), jnp.float32),
            pltpu.VMEM((heads, stride, key_dim), jnp.float32),
        ],
        compiler_params=PARAMS,
        name="additive_scan_backward",
    )(tokens, starts_s, starts_z, do_NGTV, ds, r)
    dq, dk, dv, *df = (tokens_first(x, q) for x in gradients)
    ds = ds.reshape(dfinal[0].shape)
    dz = jnp.sum(ds * starts[0][0], axis=-1) - r.reshape(dfinal[1].shape)
    dz = jnp.where(starts[1][0] == -jnp.inf, 0, dz)
    return dq, dk, dv, df[0] if df else None, (ds, dz)


def _forward_kernel(tokens, s0_ref, z0_ref, o_ref, s_ref, z_ref, *refs, scale, operand):
    starts_s_ref, starts_z_ref, scratch, z_RK = refs
    heads, chunk = tokens.q.shape[1:3]

    @pl.when(pl.program_id(1) == 0)
    def _():
        s_ref[...] = s0_ref[...]
        z_RK[:heads] = z0_ref[0]

    starts_s_ref[0] = s_ref[...]
    starts_z_ref[0, 0] = z_RK[:heads]
    z_RK[...] = _prepare(scratch, tokens, z_RK[...])
    z_ref[0] = z_RK[:heads]

    dot = functools.partial(_dot, operand=operand)
    meet_CC = _meetings(chunk)[0]

    @_for_heads(heads, TOGETHER[operand])
    def _(hs):
        rows = lambda ref: take(ref, hs)
        q_CK, v_CV, f_CK = _load(tokens, hs, scale)
        s_KV, over_n_CK = s_ref[0, hs], q_CK * rows(scratch.inverse)
        own_C1 = jnp.sum(_times(over_n_CK * rows(scratch.own), f_CK), axis=-1, keepdims=True)
        a_CC = jnp.where(meet_CC == OWN, own_C1, 0)
        for i, level in enumerate(scratch.levels):
            e_CK, (_, right) = rows(level), _sides(2**i)
            pairs_hC = dot("NT", right(over_n_CK) * right(e_CK), _times(e_CK, f_CK))
            a_hC = jnp.where(right(meet_CC) == i, pairs_hC, right(a_CC))
            a_CC = _replace(a_CC, a_hC, 2**i, right=True)
        o_CV = dot("NN", a_CC, v_CV) + dot("NN", q_CK * rows(scratch.enter), s_KV)
        o_ref[0, hs] = o_CV.astype(o_ref.dtype)
        added_KV = dot("TN", _times(rows(scratch.leave), f_CK), v_CV)
        s_ref[0, hs] = across(scratch.enter, hs) * s_KV + added_KV


def _backward_kernel(tokens, s_ref, z_ref, do_ref, ds_end_ref, r_end_ref, *refs, scale, operand):
    dq_ref, dk_ref, dv_ref, *df_ref, ds_ref, r_ref, scratch, rows_ref, keys_ref = refs
    z_RK, r_RK, kept_RK = (rows_ref.at[i] for i in range(3))
    heads, chunk = tokens.q.shape[1:3]

    @pl.when(pl.program_id(1) == 0)
    def _():
        ds_ref[...] = ds_end_ref[...]
        r_RK[:heads] = r_end_ref[0]

    z_RK[:heads] = z_ref[0, 0]
    _prepare(scratch, tokens, z_RK[...])
    dot = functools.partial(_dot, operand=operand)
    meet_CC, met_CC = _meetings(chunk)

    @_for_heads(heads, TOGETHER[operand])
    def _(hs):
        rows = lambda ref: take(ref, hs)
        q_CK, v_CV, f_CK = _load(tokens, hs, scale)
        do_CV, s_KV, ds_KV = do_ref[0, hs].astype(jnp.float32), s_ref[0, 0, hs], ds_ref[0, hs]
        inverse_CK, enter_CK, leave_CK = (
            rows(ref) for ref in (scratch.inverse, scratch.enter, scratch.leave)
        )
        over_n_CK, own_CK = q_CK * inverse_CK, _times(rows(scratch.own), f_CK)
        p_C1 = jnp.sum(v_CV * do_CV, axis=-1, keepdims=True)
        p_CC, transposed_CC = dot("NT", do_CV, v_CV), dot("NT", v_CV, do_CV)
        dq_CK = own_CK * p_C1
        df_CK = rows(scratch.own) * over_n_CK * p_C1
        own_C1 = jnp.sum(over_n_CK * own_CK, axis=-1, keepdims=True)
        a_CC = jnp.where(met_CC == OWN, own_C1, 0)  # transposed
        for i, level in enumerate(scratch.levels):
            e_CK, (left, right) = rows(level), _sides(2**i)
            keys_CK, read_CK = _times(e_CK, f_CK), over_n_CK * e_CK
            after, before = left(met_CC) == i, right(meet_CC) == i
            a_hC = jnp.where(after, dot("NT", left(keys_CK), read_CK), left(a_CC))
            dq_hK = dot("NN", jnp.where(before, right(p_CC), 0), keys_CK)
            df_hK = dot("NN", jnp.where(after, left(transposed_CC), 0), read_CK)
            dq_hK = right(dq_CK) + right(e_CK) * dq_hK
            df_hK = left(df_CK) + left(e_CK) * df_hK
            a_CC = _replace(a_CC, a_hC, 2**i, right=False)
            dq_CK = _replace(dq_CK, dq_hK, 2**i, right=True)
            df_CK = _replace(df_CK, df_hK, 2**i, right=False)
        dq_CK = inverse_CK * dq_CK + enter_CK * dot("NT", do_CV, s_KV)
        df_CK += leave_CK * dot("NT", v_CV, ds_KV)
        dv_CV = dot("NN", a_CC, do_CV) + dot("NN", _times(leave_CK, f_CK), ds_KV)
        put(scratch.x, hs, q_CK * dq_CK)
        dq_ref[0, hs] = (scale * dq_CK).astype(dq_ref.dtype)
        dv_ref[0, hs] = dv_CV.astype(dv_ref.dtype)
        keys_ref[hs] = _times(df_CK, f_CK)
        if df_ref:
            df_ref[0][0, hs] = df_CK.astype(df_ref[0].dtype)
        added_KV = dot("TN", q_CK * enter_CK, do_CV)
        ds_ref[0, hs] = across(scratch.enter, hs) * ds_KV + added_KV

    # The keys act through the normaliser too, for which all of dq is needed.
    r_before = [
        through_normaliser(refs, r_1RW)
        for refs, r_1RW in zip(lane_tiles(scratch), lanes_of(r_RK[...]), strict=True)
    ]
    r_RK[...] = rows_of(r_before)
    r_ref[0] = r_RK[:heads]

    @pl.when(jnp.min(z_ref[0, 0]) == -jnp.inf)
    def _():
        ones_RV = jnp.ones((1, ROWS, do_ref.shape[-1]), jnp.float32)
        for g in range(heads):
            both_KV = ds_ref[0, g] * s_ref[0, 0, g]
            kept_RK[g : g + 1] = _dot("NT", ones_RV, both_KV[None], jnp.float32)[0, :1]
        lanes = zip(lane_tiles(scratch), lanes_of(z_RK[...]), lanes_of(kept_RK[...]), strict=True)
        for refs, z_1RW, kept_1RW in lanes:
            to_first_keys(refs, z_1RW[0], kept_1RW[0])

    @_for_heads(heads, ROWS)
    def _(hs):
        dk_ref[0, hs] = (keys_ref[hs] - take(scratch.leave, hs)).astype(dk_ref.dtype)


def _prepare(scratch: Factors, tokens: Tokens, z_RK) -> jax.Array:
    """Fills the scratch; returns z_e [R, K]."""
    run = None
    if tokens.run is not None:
        run = runs_on_lanes(tokens.run[0, 0], scratch.own.shape[-1])

    @_for_heads(tokens.k.shape[1], ROWS)
    def _(hs):
        put(scratch.leave, hs, tokens.k[0, hs].astype(jnp.float32))

    tiles = zip(lane_tiles(scratch), lanes_of(z_RK), strict=True)
    return rows_of([tree(refs, run, z_1RW) for refs, z_1RW in tiles])


def _for_heads(heads: int, together: int):
    """Runs a function on all heads, some together: between them they hide latencies."""
    together = math.gcd(heads, together)

    def loop(function):
        body = lambda i, _: function(pl.ds(i * together, together))
        jax.lax.fori_loop(0, heads // together, body, None)

    return loop


def _meetings(chunk: int) -> tuple[jax.Array, jax.Array]:
    """[1, C, C] levels at which token i (row) meets token j <= i; and with j as the row."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (1, chunk, chunk), axis) for axis in (1, 2))
    level = jnp.full(i.shape, OWN, jnp.int32)
    for bit in range(chunk.bit_length() - 1):
        level = jnp.where((i ^ j) >= 2**bit, bit, level)
    return jnp.where(i >= j, level, LATER), jnp.where(i <= j, level, LATER)


def _sides(half: int):
    """Two functions that take the rows of the left and of the right halves of blocks.

    Where halves are shorter than a register, both leave all rows.
    """
    if half < ROWS:
        return (lambda x_CD: x_CD,) * 2

    def side(x_CD, i: int):
        blocks = x_CD.reshape(x_CD.shape[0], -1, 2, half, x_CD.shape[-1])
        return blocks[:, :, i].reshape(x_CD.shape[0], -1, x_CD.shape[-1])

    return functools.partial(side, i=0), functools.partial(side, i=1)


def _replace(x_CD, rows_hD, half: int, right: bool) -> jax.Array:
    """x with other rows on one side, see :func:`_sides`."""
    if half < ROWS:
        return rows_hD
    left_hD, right_hD = (side(x_CD) for side in _sides(half))
    sides = (left_hD, rows_hD) if right else (rows_hD, right_hD)
    blocks = [x.reshape(x.shape[0], -1, half, x.shape[-1]) for x in sides]
    return jnp.stack(blocks, axis=2).reshape(x_CD.shape)


def _times(x_CK, f_CK) -> jax.Array:
    return x_CK if f_CK is None else x_CK * f_CK


def _dot(kind: str, a, b, operand) -> jax.Array:
    """a @ b for every head, in float32; T: transposed first."""
    dims = ((0 if kind[0] == "T" else 1,), (1 if kind[1] == "T" else 0,)), ((), ())
    precision = HIGHEST if operand == jnp.float32 else jax.lax.Precision.DEFAULT
    product = lambda a, b: jax.lax.dot_general(
        a.astype(operand), b.astype(operand), dims, precision, preferred_element_type=jnp.float32
    )
    return jnp.stack([product(a[i], b[i]) for i in range(a.shape[0])])


def _load(tokens: Tokens, heads: pl.Slice, scale):
    """q with the scale, v and f of some heads."""
    q, v = (x[0, heads].astype(jnp.float32) for x in (tokens.q, tokens.v))
    return scale * q, v, None if tokens.f is None else tokens.f[0, heads].astype(jnp.float32)


def _operand(q, v):
    """Dtype of the operands of products; all but q, v and the states are at most 1."""
    return jnp.bfloat16 if q.dtype == v.dtype == jnp.bfloat16 else jnp.float32
