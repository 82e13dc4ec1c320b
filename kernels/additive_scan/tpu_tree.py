"""What runs along time in the TPU kernels of the additive scan: the factors of the tree.

One register holds the same token of eight heads, and the tree of ``pallas_tpu.py`` moves no rows
within registers. Dimensions: C tokens, R the eight heads, L * W = K lanes; G heads in use.
"""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

FLOOR = float(jnp.finfo(jnp.float32).min)  # stands for a largest logit of -inf
ROWS, LANES = 8, 128  # of a register


class Factors(NamedTuple):
    """References to what follows from the logits and z_b: [L, C * R, W] each."""

    levels: list[Any]  # right half of a block: exp(r - m_i), left half: exp(k_j - r)
    own: Any  # exp(k_i - m_i)
    inverse: Any  # 1 / n_i
    enter: Any  # exp(z_b - z_i)
    leave: Any  # exp(k_j - z_e); before, the logits
    x: Any  # backward: q dq


def scratch_of(chunk: int, key_dim: int) -> Factors:
    width = min(key_dim, LANES)
    ref = pltpu.VMEM((key_dim // width, chunk * ROWS, width), jnp.float32)
    return Factors([ref] * (chunk.bit_length() - 1), *[ref] * 5)


def tree(refs: Factors, run, z_1RW) -> jax.Array:
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


def through_normaliser(refs: Factors, r_1RW) -> jax.Array:
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


def to_first_keys(refs: Factors, z_RW, kept_RW) -> None:
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


def runs_on_lanes(run_GC, width: int) -> jax.Array:
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


def lanes_of(x_RK) -> list[jax.Array]:
    """[1, R, W] each."""
    width = min(x_RK.shape[-1], LANES)
    return [x_RK[None, :, i : i + width] for i in range(0, x_RK.shape[-1], width)]


def rows_of(lanes: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(lanes, axis=-1)[0]


def lane_tiles(scratch: Factors) -> list[Factors]:
    tile = lambda i: jax.tree.map(lambda ref: ref.at[i], scratch)
    return [tile(i) for i in range(scratch.own.shape[0])]


def take(ref, heads: pl.Slice) -> jax.Array:
    """Rows of some heads: [L, C * R, W] -> [P, C, K]."""
    count = ref.shape[1] // ROWS
    lanes = lambda g: [ref[i, pl.ds(g, count, ROWS), :] for i in range(ref.shape[0])]
    return jnp.stack([jnp.concatenate(lanes(heads.start + j), axis=-1) for j in range(heads.size)])


def put(ref, heads: pl.Slice, x_CK) -> None:
    for j in range(heads.size):
        for i, x_1CW in enumerate(lanes_of(x_CK[j])):
            ref[i, pl.ds(heads.start + j, x_1CW.shape[1], ROWS), :] = x_1CW[0]


def across(enter_ref, heads: pl.Slice) -> jax.Array:
    """exp(z_b - z_e) [P, K, 1] of some heads: the last token's factor, as a column."""
    end = enter_ref.shape[1] - ROWS + heads.start
    columns = []
    for j in range(heads.size):
        lanes = [enter_ref[i, pl.ds(end + j, 1), :] for i in range(enter_ref.shape[0])]
        row_1K = jnp.concatenate(lanes, axis=-1)
        row_RK = jnp.broadcast_to(row_1K, (ROWS, row_1K.shape[1]))
        columns.append(jnp.swapaxes(row_RK, 0, 1)[:, :1])
    return jnp.stack(columns)
