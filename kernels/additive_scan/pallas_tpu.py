"""The additive recurrence as TPU kernels, forward and backward.

The grid is (B, H / G, X): G heads a step, and the X chunks of a row one after the other, with the
state in VMEM. The mathematics is that of ``chunk.py`` with blocks down to single tokens, so that
every pair of different tokens is part of a product of matrices; symbols as there. One thing
differs: the reference of a token is the largest logit so far, m_i, instead of the normaliser,

  exp(k_j - z_i) = exp(k_j - m_i) / n_i,   n_i = sum_{j <= i} exp(k_j - m_i) + exp(z_b - m_i),

because m needs comparisons only and n comes out of the factors of the tree. It is 0 for a
channel that has seen no token at all, and at least 1 for all others.

Inside the kernels G is the leading dimension of every array, which the names leave out.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST
FLOOR = float(jnp.finfo(jnp.float32).min)  # stands for a largest logit of -inf
TILE = 8  # rows of a register
HEADS = 4  # at most, per step


class _Tokens(NamedTuple):
    """A row's arrays as [B, H, T, D], and the number of resets since the token before the chunk."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    f: jax.Array | None
    run: jax.Array | None  # [B, X, 1, C]


class _Factors(NamedTuple):
    """Everything that follows from the logits and the normaliser before the chunk."""

    levels: list[jax.Array]  # right half of a block: exp(r - m_i), left half: exp(k_j - r)
    own_CK: jax.Array  # exp(k_i - m_i)
    inverse_CK: jax.Array  # 1 / n_i
    enter_CK: jax.Array  # exp(z_b - z_i)
    leave_CK: jax.Array  # exp(k_j - z_e)
    z_1K: jax.Array  # z_e
    begun_CK: jax.Array  # whether the channel has seen a token
    inside_CK: jax.Array | bool  # whether the entering state reaches the token


def supports(q, k, v, f, state, run, *, chunk, stride) -> str | None:
    """None, or why the kernels cannot run on these arguments."""
    del k, f, state, run
    if any(d not in (32, 64, 128, 256) for d in (q.shape[-1], v.shape[-1])):
        return f"K and V must be 32, 64, 128 or 256, got {q.shape[-1]} and {v.shape[-1]}"
    if any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in (q, v)):
        return f"arrays must be float32 or bfloat16, got {q.dtype}"
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
    tokens = _tokens(q, k, v, f, run, stride)
    batch, heads, length, key_dim = tokens.q.shape
    value_dim = v.shape[-1]
    grid = batch, heads // _group(heads), length // stride
    z0_BH1K = state[1][:, :, None]
    per_row = lambda *dims: _spec(grid, heads, *dims)
    starts = lambda *dims: pl.BlockSpec((1, 1, heads // grid[1], *dims), lambda b, h, x: (x, b, h, 0, 0))
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    o, s, z, starts_s, starts_z = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, operand=_operand(q, v)),
        grid=grid,
        in_specs=[
            _token_specs(grid, tokens, stride, lambda x: x),
            per_row(key_dim, value_dim),
            per_row(1, key_dim),
        ],
        out_specs=[
            _chunk_spec(grid, heads, stride, value_dim, lambda x: x),
            per_row(key_dim, value_dim),
            per_row(1, key_dim),
            starts(key_dim, value_dim),
            starts(1, key_dim),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length, value_dim), q.dtype),
            float32(*state[0].shape),
            float32(*z0_BH1K.shape),
            float32(grid[2], *state[0].shape),
            float32(grid[2], *z0_BH1K.shape),
        ],
        compiler_params=_PARAMS,
        name="additive_scan_forward",
    )(tokens, state[0], z0_BH1K)
    return _rows(o, q.shape[1]), (s, z[:, :, 0]), (starts_s, starts_z[:, :, :, 0])


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
    tokens = _tokens(q, k, v, f, run, stride)
    do_BHTV = _heads_first(do, stride)
    batch, heads, length, key_dim = tokens.q.shape
    value_dim = v.shape[-1]
    grid = batch, heads // _group(heads), length // stride
    back = lambda x: grid[2] - 1 - x
    per_row = lambda *dims: _spec(grid, heads, *dims)
    chunk_of = lambda width: _chunk_spec(grid, heads, stride, width, back)
    starts_of = lambda *dims: pl.BlockSpec(
        (1, 1, heads // grid[1], *dims), lambda b, h, x: (back(x), b, h, 0, 0)
    )
    r_end_BH1K = (jnp.sum(dfinal[0] * final[0], axis=-1) - dfinal[1])[:, :, None]
    gradients = [tokens.q, tokens.k, tokens.v] + ([] if f is None else [tokens.f])
    *gradients, ds, r = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale, operand=_operand(q, v)),
        grid=grid,
        in_specs=[
            _token_specs(grid, tokens, stride, back),
            starts_of(key_dim, value_dim),
            starts_of(1, key_dim),
            chunk_of(value_dim),
            per_row(key_dim, value_dim),
            per_row(1, key_dim),
        ],
        out_specs=[
            *(chunk_of(x.shape[-1]) for x in gradients),
            per_row(key_dim, value_dim),
            per_row(1, key_dim),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*gradients, dfinal[0], r_end_BH1K))
        ],
        compiler_params=_PARAMS,
        name="additive_scan_backward",
    )(tokens, starts[0], starts[1][:, :, :, None], do_BHTV, dfinal[0], r_end_BH1K)
    dq, dk, dv, *df = (_rows(x, q.shape[1]) for x in gradients)
    dz = jnp.sum(ds * starts[0][0], axis=-1) - r[:, :, 0]
    dz = jnp.where(starts[1][0] == -jnp.inf, 0, dz)
    return dq, dk, dv, df[0] if df else None, (ds, dz)


def _forward_kernel(
    tokens, s0_ref, z0_ref, o_ref, s_ref, z_ref, starts_s_ref, starts_z_ref, *, scale, operand
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        s_ref[...] = s0_ref[...]
        z_ref[...] = z0_ref[...]

    s_KV, z_1K = s_ref[0], z_ref[0]
    starts_s_ref[0, 0], starts_z_ref[0, 0] = s_KV, z_1K
    q_CK, k_CK, v_CV, f_CK, run_CK = _load(tokens, scale)
    x = _factors(k_CK, run_CK, z_1K)
    dot = functools.partial(_dot, operand=operand)

    over_n_CK = q_CK * x.inverse_CK
    a_CC = jnp.where(_pairs(0, k_CK), jnp.sum(_times(over_n_CK * x.own_CK, f_CK), -1, keepdims=True), 0)
    for i, e_CK in enumerate(x.levels):
        a_CC = jnp.where(_pairs(2**i, k_CK), dot("NT", over_n_CK * e_CK, _times(e_CK, f_CK)), a_CC)
    o_CV = dot("NN", a_CC, v_CV) + dot("NN", q_CK * x.enter_CK, s_KV)
    o_ref[0] = o_CV.astype(o_ref.dtype)
    s_ref[0] = _across(x) * s_KV + dot("TN", _times(x.leave_CK, f_CK), v_CV)
    z_ref[0] = x.z_1K


def _backward_kernel(
    tokens, s_ref, z_ref, do_ref, ds_end_ref, r_end_ref, dq_ref, dk_ref, dv_ref, *refs, scale, operand
):
    *df_ref, ds_ref, r_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        ds_ref[...] = ds_end_ref[...]
        r_ref[...] = r_end_ref[...]

    s_KV, z_1K, do_CV = s_ref[0, 0], z_ref[0, 0], do_ref[0].astype(jnp.float32)
    ds_KV, r_1K = ds_ref[0], r_ref[0]
    q_CK, k_CK, v_CV, f_CK, run_CK = _load(tokens, scale)
    x = _factors(k_CK, run_CK, z_1K)
    dot = functools.partial(_dot, operand=operand)

    over_n_CK = q_CK * x.inverse_CK
    own_CK = _times(x.own_CK, f_CK)
    p_C1 = jnp.sum(v_CV * do_CV, axis=-1, keepdims=True)
    p_CC, transposed_CC = dot("NT", do_CV, v_CV), dot("NT", v_CV, do_CV)
    dq_CK = own_CK * p_C1
    df_CK = x.own_CK * over_n_CK * p_C1
    a_CC = jnp.where(_pairs(0, k_CK), jnp.sum(over_n_CK * own_CK, axis=-1, keepdims=True), 0)
    for i, e_CK in enumerate(x.levels):
        keys_CK, read_CK = _times(e_CK, f_CK), over_n_CK * e_CK
        after = _pairs(2**i, k_CK, transposed=True)
        a_CC = jnp.where(after, dot("NT", keys_CK, read_CK), a_CC)
        dq_CK += e_CK * dot("NN", jnp.where(_pairs(2**i, k_CK), p_CC, 0), keys_CK)
        df_CK += e_CK * dot("NN", jnp.where(after, transposed_CC, 0), read_CK)
    dq_CK = x.inverse_CK * dq_CK + x.enter_CK * dot("NT", do_CV, s_KV)
    df_CK += x.leave_CK * dot("NT", v_CV, ds_KV)
    dv_CV = dot("NN", a_CC, do_CV) + dot("NN", _times(x.leave_CK, f_CK), ds_KV)
    ds_before_KV = _across(x) * ds_KV + dot("TN", q_CK * x.enter_CK, do_CV)

    # The keys act through the normaliser too, for which all of dq is needed.
    x_CK = q_CK * dq_CK
    by_z_CK = x_CK * x.inverse_CK
    dk_CK = _times(df_CK, f_CK) - x.leave_CK * r_1K - x.own_CK * by_z_CK
    for i, e_CK in enumerate(x.levels):
        dk_CK -= jnp.where(_right(k_CK, 2**i), 0, e_CK * _from_right(e_CK * by_z_CK, 2**i))
    r_before_1K = x.enter_CK[:, -1:] * r_1K + jnp.sum(x.enter_CK * x_CK, axis=-2, keepdims=True)

    dq_ref[0] = (scale * dq_CK).astype(dq_ref.dtype)
    dk_ref[0] = dk_CK.astype(dk_ref.dtype)
    dv_ref[0] = dv_CV.astype(dv_ref.dtype)
    if df_ref:
        df_ref[0][0] = df_CK.astype(df_ref[0].dtype)
    ds_ref[0] = ds_before_KV
    r_ref[0] = r_before_1K

    # A channel's first key does not make the state decay.
    @pl.when(jnp.min(z_1K) == -jnp.inf)
    def _():
        row_CK = jax.lax.broadcasted_iota(jnp.int32, k_CK.shape, 1)
        ones_8V = jnp.ones((k_CK.shape[0], TILE, v_CV.shape[-1]), jnp.float32)
        kept_1K = _dot("NT", ones_8V, ds_before_KV * s_KV, operand=jnp.float32)[:, :1]
        begun_CK = x.begun_CK & x.inside_CK
        waited_CK = jnp.where(x.begun_CK, 0, x_CK * x.enter_CK)
        kept_1K -= jnp.sum(waited_CK, axis=-2, keepdims=True)
        first_1K = jnp.min(jnp.where(begun_CK, row_CK, row_CK.shape[1]), axis=-2, keepdims=True)
        first_CK = (row_CK == first_1K) & (z_1K == -jnp.inf)
        dk_ref[0] = (dk_CK + jnp.where(first_CK, kept_1K, 0)).astype(dk_ref.dtype)


def _factors(k_CK, run_CK, z_1K) -> _Factors:
    last_CK = _largest(k_CK, run_CK, z_1K)
    own_CK = jnp.exp(k_CK - last_CK)
    inside_CK = True if run_CK is None else run_CK == 0
    where_inside = lambda x: x if run_CK is None else jnp.where(inside_CK, x, 0)

    n_CK = own_CK + where_inside(jnp.exp(z_1K - last_CK))
    levels, half = [], 1
    while half < k_CK.shape[1]:
        middle_CK = _row(last_CK, half, half - 1)
        right = _right(k_CK, half)
        e_CK = jnp.exp(jnp.minimum(jnp.where(right, middle_CK - last_CK, k_CK - middle_CK), 0))
        if run_CK is not None:
            e_CK = jnp.where(run_CK == _row(run_CK, half, half - 1), e_CK, 0)
        n_CK += jnp.where(right, e_CK * _from_left(e_CK, half), 0)
        levels.append(e_CK)
        half *= 2
    begun_CK = n_CK > 0
    inverse_CK = 1 / jnp.where(begun_CK, n_CK, 1)

    # A state without normaliser waits for the first key, and decays from there.
    first_CK = where_inside(begun_CK)
    first_1K = jnp.min(jnp.where(first_CK, last_CK, jnp.inf), axis=-2, keepdims=True)
    start_1K = jnp.where(z_1K == -jnp.inf, first_1K, z_1K)
    enter_CK = jnp.exp(jnp.minimum(start_1K - last_CK, 0)) * inverse_CK
    enter_CK = where_inside(jnp.where(begun_CK, enter_CK, 1))
    leave_CK = jnp.exp(jnp.minimum(k_CK - last_CK[:, -1:], 0)) * inverse_CK[:, -1:]
    if run_CK is not None:
        leave_CK = jnp.where(run_CK == run_CK[:, -1:], leave_CK, 0)
    z_end_1K = last_CK[:, -1:] + jnp.log(n_CK[:, -1:])
    return _Factors(
        levels, own_CK, inverse_CK, enter_CK, leave_CK, z_end_1K, begun_CK, inside_CK
    )


def _largest(k_CK, run_CK, z_1K) -> jax.Array:
    """m: the largest of the logits so far and of z_b, finite."""
    k, run = _tiles(jnp.maximum(k_CK, FLOOR)), None if run_CK is None else _tiles(run_CK)
    row = jax.lax.broadcasted_iota(jnp.int32, k.shape, 2)
    shift = 1
    while shift < TILE:
        earlier = row >= shift
        if run is not None:
            earlier &= run == pltpu.roll(run, shift, 2)
        k = jnp.where(earlier, jnp.maximum(k, pltpu.roll(k, shift, 2)), k)
        shift *= 2
    tiles, before, before_run = [], jnp.maximum(z_1K, FLOOR), 0
    for i in range(k.shape[1]):
        if run is not None:
            before = jnp.where(run[:, i] == before_run, before, FLOOR)
            before_run = run[:, i, -1:]
        tiles.append(jnp.maximum(k[:, i], before))
        before = tiles[-1][:, -1:]
    return jnp.concatenate(tiles, axis=1)


def _row(x_CD, half: int, index: int) -> jax.Array:
    """Row ``index`` of every block of 2 * half rows, on all rows of the block."""
    if half >= TILE:
        blocks = _blocks(x_CD, half)
        row = blocks[:, :, index : index + 1]
        return jnp.broadcast_to(row, blocks.shape).reshape(x_CD.shape)
    tiles = _tiles(x_CD)
    row = jax.lax.broadcasted_iota(jnp.int32, tiles.shape, 2)
    result = tiles[:, :, index : index + 1]
    for start in range(2 * half, TILE, 2 * half):
        result = jnp.where(row < start, result, tiles[:, :, start + index : start + index + 1])
    return jnp.broadcast_to(result, tiles.shape).reshape(x_CD.shape)


def _from_left(x_CD, half: int) -> jax.Array:
    """On all rows of a block of 2 * half rows, the sum over its left half."""
    if half >= TILE:
        blocks = _blocks(x_CD, half)
        total = jnp.sum(blocks[:, :, :half], axis=2, keepdims=True)
        return jnp.broadcast_to(total, blocks.shape).reshape(x_CD.shape)
    return _row(_sums(x_CD, half), half, half - 1)


def _from_right(x_CD, half: int) -> jax.Array:
    if half >= TILE:
        blocks = _blocks(x_CD, half)
        total = jnp.sum(blocks[:, :, half:], axis=2, keepdims=True)
        return jnp.broadcast_to(total, blocks.shape).reshape(x_CD.shape)
    return _row(_sums(x_CD, half), half, 2 * half - 1)


def _sums(x_CD, length: int) -> jax.Array:
    """Sums of ``length`` rows up to a row, within tiles."""
    x, shift = _tiles(x_CD), 1
    while shift < length:
        x += pltpu.roll(x, shift, 2)
        shift *= 2
    return x.reshape(x_CD.shape)


def _right(x_CD, half: int) -> jax.Array:
    """Whether a row lies in the right half of its block."""
    return jax.lax.broadcasted_iota(jnp.int32, x_CD.shape, 1) & half != 0


def _pairs(half: int, x_CD, transposed: bool = False) -> jax.Array:
    """[C, C]: pairs (i, j) that meet where blocks have halves of ``half`` rows; 0: i = j."""
    shape = x_CD.shape[0], x_CD.shape[1], x_CD.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
    if transposed:
        i, j = j, i
    differ = i ^ j
    return (differ >= half) & (differ < max(2 * half, 1)) & (i >= j)


def _across(x: _Factors) -> jax.Array:
    """exp(z_b - z_e): [K, 1]."""
    last = jnp.broadcast_to(x.enter_CK[:, -1:], (x.enter_CK.shape[0], TILE, x.enter_CK.shape[2]))
    return jnp.swapaxes(last, 1, 2)[:, :, :1]


def _times(x_CK, f_CK) -> jax.Array:
    return x_CK if f_CK is None else x_CK * f_CK


def _dot(kind: str, a, b, operand) -> jax.Array:
    """a @ b for every head, in float32; T: transposed first."""
    dims = ((1 if kind[0] == "T" else 2,), (2 if kind[1] == "T" else 1,)), ((0,), (0,))
    precision = HIGHEST if operand == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(operand), b.astype(operand), dims, precision, preferred_element_type=jnp.float32
    )


def _tiles(x_CD) -> jax.Array:
    return x_CD.reshape(x_CD.shape[0], -1, TILE, x_CD.shape[-1])


def _blocks(x_CD, half: int) -> jax.Array:
    return x_CD.reshape(x_CD.shape[0], -1, 2 * half, x_CD.shape[-1])


def _load(tokens: _Tokens, scale):
    q, k, v = (x[0].astype(jnp.float32) for x in tokens[:3])
    f = None if tokens.f is None else tokens.f[0].astype(jnp.float32)
    run = None
    if tokens.run is not None:
        run = jnp.broadcast_to(tokens.run[0], (1, k.shape[-1], k.shape[-2]))
        run = jnp.broadcast_to(jnp.swapaxes(run, 1, 2), k.shape)
    return q * scale, k, v, f, run


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _group(heads: int) -> int:
    return next(n for n in range(min(heads, HEADS), 0, -1) if heads % n == 0)


def _operand(q, v):
    """Dtype of the factors of products: all of them but q, v and the state are at most 1."""
    return jnp.bfloat16 if q.dtype == v.dtype == jnp.bfloat16 else jnp.float32


def _tokens(q, k, v, f, run, chunk: int) -> _Tokens:
    if run is not None:
        run = jnp.pad(run, ((0, 0), (0, -run.shape[1] % chunk)), mode="edge")
        run = run.reshape(run.shape[0], -1, 1, chunk)
        entering = jnp.pad(run[:, :-1, :, -1:], ((0, 0), (1, 0), (0, 0), (0, 0)))
        run = run - entering
    return _Tokens(
        q=_heads_first(q, chunk),
        k=_heads_first(k, chunk, constant_values=-jnp.inf),
        v=_heads_first(v, chunk),
        f=None if f is None else _heads_first(f, chunk),
        run=run,
    )


def _heads_first(x_BTHD, chunk: int, **padding) -> jax.Array:
    """[B, T, H, D] -> [B, H, T, D] with whole chunks."""
    x = jnp.pad(x_BTHD, ((0, 0), (0, -x_BTHD.shape[1] % chunk), (0, 0), (0, 0)), **padding)
    return jnp.swapaxes(x, 1, 2)


def _rows(x_BHTD, tokens: int) -> jax.Array:
    return jnp.swapaxes(x_BHTD, 1, 2)[:, :tokens]


def _spec(grid, heads: int, *dims: int) -> pl.BlockSpec:
    """One block for all of a row."""
    return pl.BlockSpec((1, heads // grid[1], *dims), lambda b, h, x: (b, h, 0, 0))


def _chunk_spec(grid, heads: int, chunk: int, width: int, order) -> pl.BlockSpec:
    block = 1, heads // grid[1], chunk, width
    return pl.BlockSpec(block, lambda b, h, x: (b, h, order(x), 0))


def _token_specs(grid, tokens: _Tokens, chunk: int, order) -> _Tokens:
    spec = lambda x: _chunk_spec(grid, x.shape[1], chunk, x.shape[-1], order)
    run = None
    if tokens.run is not None:
        run = pl.BlockSpec((1, 1, 1, chunk), lambda b, h, x: (b, order(x), 0, 0))
    return _Tokens(*(None if x is None else spec(x) for x in tokens[:4]), run)
