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
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST
FLOOR = float(jnp.finfo(jnp.float32).min)  # stands for a largest logit of -inf
ROWS, LANES = 8, 128  # of a register
TOGETHER = {jnp.bfloat16: 4, jnp.float32: 2}  # heads whose products alternate
OWN, LATER = -1, -2  # where two tokens do not meet at a level


class _Tokens(NamedTuple):
    """Arrays of all heads, N groups of G; or their blocks, or references to these."""

    q: Any  # [N, G, T, K]
    k: Any
    v: Any  # [N, G, T, V]
    f: Any
    run: Any  # [N, X, G, C], resets since the token before the chunk


class _Factors(NamedTuple):
    """References to what follows from the logits and z_b: [L, C * R, W] each."""

    levels: list[Any]  # right half of a block: exp(r - m_i), left half: exp(k_j - r)
    own: Any  # exp(k_i - m_i)
    inverse: Any  # 1 / n_i
    enter: Any  # exp(z_b - z_i)
    leave: Any  # exp(k_j - z_e); before, the logits
    x: Any  # backward: q dq


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
    tokens = _tokens(q, k, v, f, run, stride)
    groups, heads, length, key_dim = tokens.q.shape
    value_dim, count = v.shape[-1], length // stride
    s, z = (x.reshape(groups, heads, *x.shape[2:]) for x in state)
    state_specs = [_row_spec(heads, key_dim, value_dim), _row_spec(heads, key_dim)]
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    o, *final, starts_s, starts_z = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, operand=_operand(q, v)),
        grid=(groups, count),
        in_specs=[_token_specs(tokens, stride, lambda x: x), *state_specs],
        out_specs=[
            _chunk_spec(tokens.v, stride, lambda x: x),
            *state_specs,
            _start_spec(lambda x: x, heads, key_dim, value_dim),
            _start_spec(lambda x: x, heads, key_dim),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(tokens.v.shape, q.dtype),
            *(float32(*x.shape) for x in (s, z)),
            *(float32(count, *x.shape) for x in (s, z)),
        ],
        scratch_shapes=[_scratch(stride, key_dim), pltpu.VMEM((ROWS, key_dim), jnp.float32)],
        compiler_params=_PARAMS,
        name="additive_scan_forward",
    )(tokens, s, z)
    final = tuple(x.reshape(y.shape) for x, y in zip(final, state, strict=True))
    starts = zip((starts_s, starts_z), state, strict=True)
    return _rows(o, q), final, tuple(x.reshape(count, *y.shape) for x, y in starts)


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
    groups, heads, length, key_dim = tokens.q.shape
    value_dim, count = v.shape[-1], length // stride
    back = lambda x: count - 1 - x
    do_NGTV = _heads_first(do, stride)
    starts_s, starts_z = (x.reshape(count, groups, heads, *x.shape[3:]) for x in starts)
    ds = dfinal[0].reshape(groups, heads, key_dim, value_dim)
    r = (jnp.sum(dfinal[0] * final[0], axis=-1) - dfinal[1]).reshape(groups, heads, key_dim)
    state_specs = [_row_spec(heads, key_dim, value_dim), _row_spec(heads, key_dim)]
    inputs = [x for x in tokens[:4] if x is not None]
    *gradients, ds, r = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale, operand=_operand(q, v)),
        grid=(groups, count),
        in_specs=[
            _token_specs(tokens, stride, back),
            _start_spec(back, heads, key_dim, value_dim),
            _start_spec(back, heads, key_dim),
            _chunk_spec(do_NGTV, stride, back),
            *state_specs,
        ],
        out_specs=[*(_chunk_spec(x, stride, back) for x in inputs), *state_specs],
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, ds, r))],
        scratch_shapes=[
            _scratch(stride, key_dim),
            pltpu.VMEM((3, ROWS, key_dim), jnp.float32),
            pltpu.VMEM((heads, stride, key_dim), jnp.float32),
        ],
        compiler_params=_PARAMS,
        name="additive_scan_backward",
    )(tokens, starts_s, starts_z, do_NGTV, ds, r)
    dq, dk, dv, *df = (_rows(x, q) for x in gradients)
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
        rows = lambda ref: _take(ref, hs)
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
        s_ref[0, hs] = _across(scratch.enter, hs) * s_KV + added_KV


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
        rows = lambda ref: _take(ref, hs)
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
        _put(scratch.x, hs, q_CK * dq_CK)
        dq_ref[0, hs] = (scale * dq_CK).astype(dq_ref.dtype)
        dv_ref[0, hs] = dv_CV.astype(dv_ref.dtype)
        keys_ref[hs] = _times(df_CK, f_CK)
        if df_ref:
            df_ref[0][0, hs] = df_CK.astype(df_ref[0].dtype)
        added_KV = dot("TN", q_CK * enter_CK, do_CV)
        ds_ref[0, hs] = _across(scratch.enter, hs) * ds_KV + added_KV

    # The keys act through the normaliser too, for which all of dq is needed.
    r_before = [
        _through_normaliser(refs, r_1RW)
        for refs, r_1RW in zip(_lane_tiles(scratch), _lanes(r_RK[...]), strict=True)
    ]
    r_RK[...] = _rows_of(r_before)
    r_ref[0] = r_RK[:heads]

    @pl.when(jnp.min(z_ref[0, 0]) == -jnp.inf)
    def _():
        ones_RV = jnp.ones((1, ROWS, do_ref.shape[-1]), jnp.float32)
        for g in range(heads):
            both_KV = ds_ref[0, g] * s_ref[0, 0, g]
            kept_RK[g : g + 1] = _dot("NT", ones_RV, both_KV[None], jnp.float32)[0, :1]
        lanes = zip(_lane_tiles(scratch), _lanes(z_RK[...]), _lanes(kept_RK[...]), strict=True)
        for refs, z_1RW, kept_1RW in lanes:
            _to_first_keys(refs, z_1RW[0], kept_1RW[0])

    @_for_heads(heads, ROWS)
    def _(hs):
        dk_ref[0, hs] = (keys_ref[hs] - _take(scratch.leave, hs)).astype(dk_ref.dtype)


def _prepare(scratch: _Factors, tokens: _Tokens, z_RK) -> jax.Array:
    """Fills the scratch; returns z_e [R, K]."""
    run = None
    if tokens.run is not None:
        run = _runs(tokens.run[0, 0], scratch.own.shape[-1])

    @_for_heads(tokens.k.shape[1], ROWS)
    def _(hs):
        _put(scratch.leave, hs, tokens.k[0, hs].astype(jnp.float32))

    tiles = zip(_lane_tiles(scratch), _lanes(z_RK), strict=True)
    return _rows_of([_tree(refs, run, z_1RW) for refs, z_1RW in tiles])


def _tree(refs: _Factors, run, z_1RW) -> jax.Array:
    """The factors of W channels, from the logits, which are in ``leave``; returns z_e.

    Goes eight tokens at a time, so that registers hold what they need. Blocks of a level that are
    longer than that are passed through: ``total`` is the sum of exp(k_j - r) over the left half.
    """
    count = refs.own.shape[0] // ROWS**2
    last = _largest(refs.leave, run, z_1RW)
    start_1RW, total = z_1RW, {}
    for i in range(count):
        k, m = _eight(refs.leave, i), jnp.concatenate(last[ROWS * i : ROWS * (i + 1)])
        here = None if run is None else run[ROWS * i : ROWS * (i + 1)]
        inside = True if here is None else here == 0
        own = jnp.exp(k - m)
        n = own + _where(inside, jnp.exp(z_1RW - m))
        _set_eight(refs.own, i, own)
        for level, ref in enumerate(refs.levels):
            half = 2**level
            if half < ROWS:
                (k_left, _), (m_left, m_right) = _halves(k, half), _halves(m, half)
                r = m_left[:, -1:]
                left, right = jnp.exp(k_left - r), jnp.exp(r - m_right)
                if here is not None:
                    run_left, run_right = _halves(here, half)
                    left = _where(run_left == run_left[:, -1:], left)
                    right = _where(run_right == run_left[:, -1:], right)
                n_left, n_right = _halves(n, half)
                n = _join(n_left, n_right + right * jnp.sum(left, axis=1, keepdims=True))
                e = _join(left, right)
            else:
                middle = ROWS * i // (2 * half) * 2 * half + half - 1
                same = True if run is None else here == run[middle : middle + 1]
                if _in_left(i, half):
                    e = _where(same, jnp.exp(k - last[middle]))
                    total[half] = jnp.sum(e, axis=0, keepdims=True) + _or_zero(total, half, i)
                else:
                    e = _where(same, jnp.exp(last[middle] - m))
                    n += e * total[half]
            _set_eight(ref, i, e)
        begun = n > 0
        inverse = 1 / jnp.where(begun, n, 1)
        _set_eight(refs.inverse, i, inverse)
        # A state without normaliser waits for the first key, and decays from there.
        first_1RW = jnp.min(jnp.where(begun & inside, m, jnp.inf), axis=0, keepdims=True)
        waiting_1RW = (start_1RW == -jnp.inf) & (first_1RW < jnp.inf)
        start_1RW = jnp.where(waiting_1RW, first_1RW, start_1RW)
        enter = jnp.where(begun, jnp.exp(start_1RW - m) * inverse, 1)
        _set_eight(refs.enter, i, _where(inside, enter))
    for i in range(count):
        leave = jnp.exp(_eight(refs.leave, i) - last[-1]) * inverse[-1:]
        to_end = True if run is None else run[ROWS * i : ROWS * (i + 1)] == run[-1:]
        _set_eight(refs.leave, i, _where(to_end, leave))
    return last[-1] + jnp.log(n[-1:])


def _largest(k_ref, run, z_1RW) -> list[jax.Array]:
    """m: the largest of the logits so far and of z_b, finite: [1, R, W] for every token."""
    last, before_1RW = [], jnp.maximum(z_1RW, FLOOR)
    for i in range(k_ref.shape[0] // ROWS):
        if run is not None:
            same = run[i : i + 1] == (run[i - 1 : i] if i else 0)
            before_1RW = jnp.where(same, before_1RW, FLOOR)
        before_1RW = jnp.maximum(before_1RW, k_ref[ROWS * i : ROWS * (i + 1)][None])
        last.append(before_1RW)
    return last


def _through_normaliser(refs: _Factors, r_1RW) -> jax.Array:
    """Puts what the keys of W channels receive through z, from x, into ``leave``; returns R_b."""
    r_before_1RW, total = refs.enter[-ROWS:][None] * r_1RW, {}
    for i in reversed(range(refs.own.shape[0] // ROWS**2)):
        x, enter = _eight(refs.x, i), _eight(refs.enter, i)
        r_before_1RW += jnp.sum(enter * x, axis=0, keepdims=True)
        x *= _eight(refs.inverse, i)
        w = _eight(refs.own, i) * x + _eight(refs.leave, i) * r_1RW
        for level, ref in enumerate(refs.levels):
            half, e = 2**level, _eight(ref, i)
            if half < ROWS:
                (left, right), (w_left, w_right) = _halves(e, half), _halves(w, half)
                x_right = _halves(x, half)[1]
                w_left += left * jnp.sum(right * x_right, axis=1, keepdims=True)
                w = _join(w_left, w_right)
            elif _in_left(i, half):
                w += e * total[half]
            else:
                total[half] = jnp.sum(e * x, axis=0, keepdims=True) + _or_zero(total, half, i + 1)
        _set_eight(refs.leave, i, w)
    return r_before_1RW


def _to_first_keys(refs: _Factors, z_RW, kept_RW) -> None:
    """A channel's first key does not make the state decay: corrects what ``leave`` holds.

    kept_RW is <dS_b, S_b>, of which the tokens before the first key are no part.
    """

    def token(i, carry):
        waiting, kept_RW = carry
        rows = pl.ds(pl.multiple_of(ROWS * i, ROWS), ROWS)
        enter_RW = refs.enter[rows, :]
        waiting = jnp.where(enter_RW > 0, waiting, 0)  # up to the end of the segment
        there = refs.own[rows, :] > 0
        refs.leave[rows, :] -= jnp.where(there, waiting * kept_RW, 0)
        waiting = jnp.where(there, 0, waiting)
        return waiting, kept_RW - waiting * enter_RW * refs.x[rows, :]

    waiting = (z_RW == -jnp.inf).astype(jnp.float32)
    jax.lax.fori_loop(0, refs.own.shape[0] // ROWS, token, (waiting, kept_RW))


def _in_left(i: int, half: int) -> bool:
    """Whether the i-th eight tokens lie in the left half of a block of 2 * half."""
    return ROWS * i & half == 0


def _or_zero(total: dict[int, jax.Array], half: int, i: int):
    """The sum so far, none at the edge of a block."""
    return 0 if ROWS * i % (2 * half) == 0 else total[half]


def _runs(run_GC, width: int) -> jax.Array:
    """[G, C] on all lanes: [C, R, W]."""
    missing = ROWS - run_GC.shape[0]
    if missing:
        run_GC = jnp.concatenate([run_GC, jnp.zeros((missing, run_GC.shape[1]), run_GC.dtype)])
    column = lambda i: jnp.broadcast_to(run_GC[:, i : i + 1], (ROWS, width))
    return jnp.stack([column(i) for i in range(run_GC.shape[1])])


def _where(condition, x):
    return x if condition is True else jnp.where(condition, x, 0)


def _eight(ref, i: int) -> jax.Array:
    """Eight tokens of [C * R, W]: [8, R, W]."""
    return ref[ROWS**2 * i : ROWS**2 * (i + 1)].reshape(ROWS, ROWS, ref.shape[-1])


def _set_eight(ref, i: int, x) -> None:
    ref[ROWS**2 * i : ROWS**2 * (i + 1)] = x.reshape(-1, x.shape[-1])


def _halves(x_8RW, half: int) -> tuple[jax.Array, jax.Array]:
    """Left and right halves of all blocks of 2 * half tokens: [n, half, R, W] each."""
    x = x_8RW.reshape(-1, 2, half, *x_8RW.shape[1:])
    return x[:, 0], x[:, 1]


def _join(left, right) -> jax.Array:
    return jnp.stack([left, right], axis=1).reshape(ROWS, *left.shape[2:])


def _lanes(x_RK) -> list[jax.Array]:
    """[1, R, W] each."""
    width = min(x_RK.shape[-1], LANES)
    return [x_RK[None, :, i : i + width] for i in range(0, x_RK.shape[-1], width)]


def _rows_of(lanes: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(lanes, axis=-1)[0]


def _lane_tiles(scratch: _Factors) -> list[_Factors]:
    tile = lambda i: jax.tree.map(lambda ref: ref.at[i], scratch)
    return [tile(i) for i in range(scratch.own.shape[0])]


def _for_heads(heads: int, together: int):
    """Runs a function on all heads, some together: between them they hide latencies."""
    together = math.gcd(heads, together)

    def loop(function):
        body = lambda i, _: function(pl.ds(i * together, together))
        jax.lax.fori_loop(0, heads // together, body, None)

    return loop


def _take(ref, heads: pl.Slice) -> jax.Array:
    """Rows of some heads: [L, C * R, W] -> [P, C, K]."""
    count = ref.shape[1] // ROWS
    lanes = lambda g: [ref[i, pl.ds(g, count, ROWS), :] for i in range(ref.shape[0])]
    return jnp.stack([jnp.concatenate(lanes(heads.start + j), axis=-1) for j in range(heads.size)])


def _put(ref, heads: pl.Slice, x_CK) -> None:
    for j in range(heads.size):
        for i, x_1CW in enumerate(_lanes(x_CK[j])):
            ref[i, pl.ds(heads.start + j, x_1CW.shape[1], ROWS), :] = x_1CW[0]


def _across(enter_ref, heads: pl.Slice) -> jax.Array:
    """exp(z_b - z_e) [P, K, 1] of some heads: the last token's factor, as a column."""
    end = enter_ref.shape[1] - ROWS + heads.start
    columns = []
    for j in range(heads.size):
        lanes = [enter_ref[i, pl.ds(end + j, 1), :] for i in range(enter_ref.shape[0])]
        row_1K = jnp.concatenate(lanes, axis=-1)
        row_RK = jnp.broadcast_to(row_1K, (ROWS, row_1K.shape[1]))
        columns.append(jnp.swapaxes(row_RK, 0, 1)[:, :1])
    return jnp.stack(columns)


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
    precision = HIGHEST if operand == jnp.float32 else None
    product = lambda a, b: jax.lax.dot_general(
        a.astype(operand), b.astype(operand), dims, precision, preferred_element_type=jnp.float32
    )
    return jnp.stack([product(a[i], b[i]) for i in range(a.shape[0])])


def _load(tokens: _Tokens, heads: pl.Slice, scale):
    """q with the scale, v and f of some heads."""
    q, v = (x[0, heads].astype(jnp.float32) for x in (tokens.q, tokens.v))
    return scale * q, v, None if tokens.f is None else tokens.f[0, heads].astype(jnp.float32)


_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20
)


def _scratch(chunk: int, key_dim: int) -> _Factors:
    width = min(key_dim, LANES)
    ref = pltpu.VMEM((key_dim // width, chunk * ROWS, width), jnp.float32)
    return _Factors([ref] * (chunk.bit_length() - 1), *[ref] * 5)


def _group(rows: int) -> int:
    return next(n for n in range(ROWS, 0, -1) if rows % n == 0)


def _operand(q, v):
    """Dtype of the operands of products; all but q, v and the states are at most 1."""
    return jnp.bfloat16 if q.dtype == v.dtype == jnp.bfloat16 else jnp.float32


def _tokens(q, k, v, f, run, chunk: int) -> _Tokens:
    if run is not None:
        batch, heads = q.shape[0], q.shape[2]
        run = jnp.pad(run, ((0, 0), (0, -run.shape[1] % chunk)), mode="edge")
        run = run.reshape(batch, -1, chunk)
        run -= jnp.pad(run[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
        run = jnp.broadcast_to(run[:, None], (batch, heads, *run.shape[1:]))
        run = run.reshape(-1, _group(batch * heads), *run.shape[2:]).swapaxes(1, 2)
    return _Tokens(
        q=_heads_first(q, chunk),
        k=_heads_first(k, chunk, constant_values=-jnp.inf),
        v=_heads_first(v, chunk),
        f=None if f is None else _heads_first(f, chunk),
        run=run,
    )


def _heads_first(x_BTHD, chunk: int, **padding) -> jax.Array:
    """[B, T, H, D] -> [N, G, T, D] with whole chunks."""
    batch, tokens, heads, width = x_BTHD.shape
    x = jnp.pad(x_BTHD, ((0, 0), (0, -tokens % chunk), (0, 0), (0, 0)), **padding)
    return jnp.swapaxes(x, 1, 2).reshape(-1, _group(batch * heads), x.shape[1], width)


def _rows(x_NGTD, like) -> jax.Array:
    """Back to the batch, tokens and heads of ``like``."""
    batch, tokens, heads, _ = like.shape
    x = x_NGTD.reshape(batch, heads, *x_NGTD.shape[2:])
    return jnp.swapaxes(x, 1, 2)[:, :tokens]


def _row_spec(*dims: int) -> pl.BlockSpec:
    """One block for all chunks of a row."""
    return pl.BlockSpec((1, *dims), lambda n, x: (n, *(0 for _ in dims)))


def _start_spec(order, *dims: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, *dims), lambda n, x: (order(x), n, *(0 for _ in dims)))


def _chunk_spec(x_NGTD, chunk: int, order) -> pl.BlockSpec:
    block = 1, x_NGTD.shape[1], chunk, x_NGTD.shape[3]
    return pl.BlockSpec(block, lambda n, x: (n, 0, order(x), 0))


def _token_specs(tokens: _Tokens, chunk: int, order) -> _Tokens:
    q, k, v, f = (None if x is None else _chunk_spec(x, chunk, order) for x in tokens[:4])
    run = None
    if tokens.run is not None:
        block = 1, 1, *tokens.run.shape[2:]
        run = pl.BlockSpec(block, lambda n, x: (n, order(x), 0, 0))
    return _Tokens(q, k, v, f, run)
