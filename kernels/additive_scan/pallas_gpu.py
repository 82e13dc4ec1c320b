"""The additive recurrence on Hopper GPUs: the chunks of ``quotients.py`` on tensor cores.

Symbols as there; a chunk is the C tokens of a stride, at most 64. Per direction there are two
kernels over all chunks side by side and one that goes through them:

  prepare      queries (q / E) exp(z_b - r) and keys exp(k - z_e) f, which meet the state, and the
               scores of a chunk's tokens
  forward      a program per row and 64 values goes through the chunks, the state in registers
  backward     as forward, from the end, with the cotangent of the state in registers; and dv
  gradients    what is left: dq, df and dk

The state is kept transposed, [V, K], as in the kernels of DeltaProduct. The normalisers between
chunks need no matrices; XLA finds them beforehand, and R of the backward afterwards. Sums over
tokens, E and what the keys receive through it, are products with a matrix of ones, exact but for
the float32 that is multiplied as the sum of two bfloat16.

As in the form for CPU, a call whose keys rise so much within a chunk that the first of them are
lost is computed once more by ``xla.py``, and so is one with states that wait for their first key.
"""

import functools

import jax
import jax.numpy as jnp

from .. import hopper
from ..hopper import (
    ROWS,
    by_row,
    pl,
    plgpu,
    product,
    row,
    store_transposed,
    tile,
    vectors,
)
from ..hopper_scans import (
    SQUARE,
    WIDTHS,
    block,
    enter_segments,
    float32,
    of_chunk,
    of_tokens,
    read_state,
    segments_of,
    state_memory,
    write_state,
)
from ..rows import whole_strides
from . import xla
from .gpu_chunks import (
    gradients as gradients_of,
    grid_of,
    prepare,
)
from .gpu_layout import (
    ACROSS,
    ENDING,
    OLD,
    linear_scan,
    normalisers,
    tokens_of,
    whole,
)
from .quotients import SMALLEST


def supports(q, k, v, f, state, run, *, scale, chunk, stride) -> str | None:
    """Why these arguments of ``forward`` do not fit the kernels, or None."""
    del state, run, scale
    widths = q.shape[-1], v.shape[-1]
    factors, others = (q, v), [x for x in (k, f) if x is not None]
    names = lambda arrays: sorted({jnp.dtype(x.dtype).name for x in arrays})
    if names(factors) != ["bfloat16"]:
        return f"q and v must be bfloat16, the factors of tensor cores, not {names(factors)}"
    if not {*names(others)} <= {"bfloat16", "float32"}:
        return f"k and its factors must be bfloat16 or float32, not {names(others)}"
    if not set(widths) <= set(WIDTHS):
        return f"K and V must be among {WIDTHS}, not {widths}"
    if stride not in (16, 32, 64):
        return f"stride must be 16, 32 or 64 tokens, not {stride}"
    if chunk not in (None, stride):
        return f"a chunk must hold the {stride} tokens of a stride, not {chunk}"
    return hopper.unavailable(q.shape[0] * q.shape[2], q.shape[1] // stride)


def forward(q, k, v, f, state, run, *, scale, chunk, stride):
    """Outputs, final state and the states at the start of all strides, as in ``backends.py``."""
    again = functools.partial(xla.forward, scale=scale, chunk=chunk, stride=stride)
    again = functools.partial(again, q, k, v, f, state, run)
    length = q.shape[1]
    q, k, v, f, run = whole(q, k, v, f, run, stride)
    z, channels = normalisers(k, state[1], run, stride)
    tokens = tokens_of(run, q, stride)
    prepared = prepare(q, k, f, channels, tokens, scale, stride)
    through = functools.partial(_forward, v, prepared, channels, stride=stride)
    states = _entering(through, channels, jnp.swapaxes(state[0], -1, -2), v.shape[-1])
    results = through(states)
    final = jnp.swapaxes(results["final"][:, :, -1], -1, -2)
    starts = results["starts"], jnp.moveaxis(z[:, :, :-1], 2, 0)
    new = results["o"][:, :length], (final, z[:, :, -1]), starts
    return _unless_lost(_sound(prepared, channels, z, state), new, again)


def backward(q, k, v, f, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of the inputs and of the initial state, as in ``backends.py``."""
    again = functools.partial(xla.backward, scale=scale, chunk=chunk, stride=stride)
    again = functools.partial(again, q, k, v, f, run, starts, final, do, dfinal)
    length, do = q.shape[1], whole_strides(do.astype(q.dtype), stride)
    q, k, v, f, run = whole(q, k, v, f, run, stride)
    first = tuple(x[0] for x in starts)
    z, channels = normalisers(k, first[1], run, stride)
    tokens = tokens_of(run, q, stride)
    prepared = prepare(q, k, f, channels, tokens, scale, stride)
    ds_final, dz_final = dfinal
    through = functools.partial(_backward, v, do, prepared, channels, stride=stride)
    last = jnp.swapaxes(ds_final, -1, -2)
    passed = through(_entering(through, channels, last, v.shape[-1], reverse=True))
    new = gradients_of(
        *(q, k, v, f, do, starts[0], passed["dstates"], channels, tokens, scale, stride)
    )

    # R: what a chunk's end gets through z, and the keys from it.
    r_last = jnp.sum(ds_final * final[0], axis=-1) - dz_final
    entered = jnp.sum(new["entered"], axis=-2).reshape(*channels.shape[:3], -1)
    r = linear_scan(channels[..., ACROSS, :], entered, r_last)
    by_token = lambda x: jnp.moveaxis(x, 1, 2)[:, :, None]  # [B, H, X, K] -> [B, X, 1, H, K]
    chunks = lambda x: x.reshape(x.shape[0], -1, stride, *x.shape[2:])
    z_end = by_token(z[:, :, 1:])
    ending = tokens[:, :, ENDING, :stride, None, None]
    leave = jnp.exp(chunks(k).astype(jnp.float32) - z_end)
    leave = jnp.where((ending > 0) & (z_end > -jnp.inf), leave, 0)
    dk = chunks(new["dk"]) - leave * by_token(r[:, :, 1:])
    gradients = (new["dq"], dk.reshape(k.shape).astype(k.dtype), passed["dv"], new.get("df"))
    ds = jnp.swapaxes(passed["final"][:, :, 0], -1, -2)
    dz = jnp.where(first[1] == -jnp.inf, 0, jnp.sum(ds * first[0], axis=-1) - r[:, :, 0])
    cut = tuple(None if x is None else x[:, :length] for x in gradients)
    results = (*cut, (ds, dz))
    return _unless_lost(_sound(prepared, channels, z, first), results, again)


def _unless_lost(sound, results, again):
    """The results if they are sound, or else those of ``again()``."""
    return jax.lax.cond(sound, lambda: hopper.row_major(results), lambda: hopper.row_major(again()))


def _sound(prepared, channels, z, state) -> jax.Array:
    """No key is lost within a chunk, nor what came before it, and no state waits for its first."""
    before = jnp.any((z[:, :, :-1] > -jnp.inf) & (channels[..., OLD, :] < SMALLEST))
    waits = jnp.any((state[1] == -jnp.inf) & jnp.any(state[0] != 0, axis=-1))
    return (jnp.max(prepared["lost"]) == 0) & ~before & ~waits


def _entering(through, channels, first, value: int, reverse: bool = False) -> jax.Array:
    """The states that segments begin with, [B, H, Z, V, K], from the first: [B, H, V, K]."""
    batch, heads, chunks, _, key = channels.shape
    segments = segments_of(batch * heads, value, 0, chunks, hopper.processors())
    if segments == 1:
        return first[:, :, None]
    nothing = jnp.zeros((batch, heads, segments, *first.shape[2:]), jnp.float32)
    added = through(nothing, keep=False)["final"]
    across = channels[..., ACROSS, :].reshape(batch, heads, segments, -1, key)
    decay = lambda state, factor: state * factor[..., None, :]
    return enter_segments(decay, first, jnp.prod(across, axis=3), added, reverse)


# Kernels.


def _forward(v, prepared, channels, states, stride: int, keep: bool = True):
    """The states leaving the segments, [B, H, Z, V, K], and, if they are kept, o [B, T, H, V] and
    the states before all chunks, [X, B, H, K, V]."""
    batch, heads, chunks, _, key = channels.shape
    count = chunks // states.shape[2]
    chunk = lambda place, n: place["segment"] * count + n

    def step(place, n, refs, state):
        row_, head, values = place["row"], place["head"], block(place)
        if keep:
            x = chunk(place, n)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store_transposed(refs["start"], state)
            o = product(state.astype(v.dtype), refs["queries"].T)
            o = product(refs["v"].T, refs["scores"].T, o)
            store_transposed(refs["o_tile"], o.astype(v.dtype))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs["start"], refs["starts"].at[x, row_, head, :, values])
            at = row_, pl.ds(x * stride, stride), head, values
            plgpu.copy_smem_to_gmem(refs["o_tile"].at[pl.ds(0, stride)], refs["o"].at[at])
        return product(refs["v"].T, refs["keys"], _across(refs, state))

    read = ("queries", "keys", "scores") if keep else ("keys",)
    outputs, scratch = {"final": float32(*states.shape)}, state_memory(key)
    if keep:
        outputs["o"] = jax.ShapeDtypeStruct(v.shape, v.dtype)
        outputs["starts"] = float32(chunks, batch, heads, key, v.shape[-1])
        scratch |= {"o_tile": tile(*SQUARE), "start": vectors(key, ROWS)}
    return hopper.through_tiles(
        "additive_scan_forward",
        {**grid_of(channels), "segment": states.shape[2], "block": v.shape[-1] // ROWS},
        count,
        {
            "v": of_tokens(v, stride, chunk, block),
            **{name: of_chunk(prepared[name], chunk) for name in read},
            "channels": of_chunk(channels, chunk),
        },
        *({"states": states}, outputs, scratch),
        *(read_state, step, write_state),
    )


def _backward(v, do, prepared, channels, dstates, stride: int, keep: bool = True):
    """The cotangents of the states entering the segments, [B, H, Z, V, K], and, if they are kept,
    dv [B, T, H, V] and the cotangents of the states after all chunks, [B, H, X, V, K]."""
    batch, heads, chunks, _, key = channels.shape
    count = chunks // dstates.shape[2]
    chunk = lambda place, n: place["segment"] * count + count - 1 - n

    def step(place, n, refs, dstate):
        row_, head, values = place["row"], place["head"], block(place)
        if keep:
            rounded = dstate.astype(v.dtype)
            dv = product(rounded, refs["keys"].T)
            dv = product(refs["do"].T, refs["scores"], dv)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs["dstate_tile"][...] = rounded
            store_transposed(refs["dv_tile"], dv.astype(v.dtype))
            plgpu.commit_smem()
            at = row_, head, chunk(place, n), values
            plgpu.copy_smem_to_gmem(refs["dstate_tile"], refs["dstates"].at[at])
            at = row_, pl.ds(chunk(place, n) * stride, stride), head, values
            plgpu.copy_smem_to_gmem(refs["dv_tile"].at[pl.ds(0, stride)], refs["dv"].at[at])
        return product(refs["do"].T, refs["queries"], _across(refs, dstate))

    read = ("queries", "keys", "scores") if keep else ("queries",)
    outputs, scratch = {"final": float32(*dstates.shape)}, state_memory(key)
    if keep:
        outputs["dv"] = jax.ShapeDtypeStruct(v.shape, v.dtype)
        shape = (batch, heads, chunks, v.shape[-1], key)
        outputs["dstates"] = jax.ShapeDtypeStruct(shape, v.dtype)
        scratch |= {"dv_tile": tile(*SQUARE), "dstate_tile": tile(ROWS, key)}
    return hopper.through_tiles(
        "additive_scan_backward",
        {**grid_of(channels), "segment": dstates.shape[2], "block": v.shape[-1] // ROWS},
        count,
        {
            "do": of_tokens(do, stride, chunk, block),
            **{name: of_chunk(prepared[name], chunk) for name in read},
            "channels": of_chunk(channels, chunk),
        },
        *({"states": dstates}, outputs, scratch),
        *(read_state, step, write_state),
    )


def _across(refs, state):
    return state * by_row(row(refs["channels"].at[ACROSS]), state.shape)
