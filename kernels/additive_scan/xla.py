"""The additive recurrence in plain JAX: a scan over strides of the row, with its own backward.

A step of ``lax.scan`` reads the chunks of a stride where they lie in the row and takes the state
through them; the backward goes through them once more and then back. Rows run with the cheap form
of a chunk (``quotients.py``); where that turns out to have lost keys, all is computed again with
the exact one (``chunk.py``), so that no key is too large or too small.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import rows
from . import chunk as chunk_lib, quotients

CHUNK = 32  # tokens; of the exact form, whose pairs cost more, 16


class _Form(NamedTuple):
    """How a chunk is computed."""

    prepare: Callable[..., Any]
    last: Callable[..., jax.Array]  # the normaliser after the chunk
    outputs: Callable[..., jax.Array]
    next_state: Callable[..., jax.Array]
    backward: Callable[..., Any]
    sound: Callable[..., Any]
    unroll: bool  # chunks of a stride one after the other in the program, instead of in a loop


def _exact(q, k, v, f, before, run, entering) -> chunk_lib.Chunk:
    z = chunk_lib.normalisers(k, before, run, entering)
    return chunk_lib.prepare(q, k, v, f, z, before, run, entering)


QUOTIENTS = _Form(
    quotients.prepare,
    lambda part: part.z_K,
    *(quotients.outputs, quotients.next_state, quotients.backward),
    lambda part: part.sound,
    unroll=True,
)
EXACT = _Form(
    _exact,
    lambda part: part.z_CK[..., -1, :],
    *(chunk_lib.outputs, chunk_lib.next_state, chunk_lib.backward),
    lambda part: jnp.asarray(True),
    unroll=False,
)


def forward(q, k, v, f, state, run, *, scale, chunk, stride):
    """Outputs, final state and the states at the start of all strides, as in ``backends.py``."""
    run_with = functools.partial(_forward, q, k, v, f, state, run, scale, stride)
    sound, results = run_with(QUOTIENTS, chunk or min(CHUNK, stride))
    waits = jnp.any((state[1] == -jnp.inf) & jnp.any(state[0] != 0, axis=-1))
    exact = lambda: run_with(EXACT, chunk or min(CHUNK // 2, stride))[1]
    return jax.lax.cond(sound & ~waits, lambda: results, exact)


def backward(q, k, v, f, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of the inputs and of the initial state, as in ``backends.py``."""
    arguments = (q, k, v, f, run, starts, final, do, dfinal, scale, stride)
    run_with = functools.partial(_backward, *arguments)
    sound, results = run_with(QUOTIENTS, chunk or min(CHUNK, stride))
    waits = jnp.any((starts[1][0] == -jnp.inf) & jnp.any(starts[0][0] != 0, axis=-1))
    exact = lambda: run_with(EXACT, chunk or min(CHUNK // 2, stride))[1]
    return jax.lax.cond(sound & ~waits, lambda: results, exact)


def _forward(q, k, v, f, state, run, scale, stride, form: _Form, chunk: int):
    row = _row(q, k, v, f, run, stride)

    def one_chunk(carry, t):
        (s_BHKV, z_BHK), o_BTHV, sound = carry
        part = form.prepare(*_read(row, t, chunk, scale, s_BHKV.dtype, z_BHK))
        o_BTHV = _write(o_BTHV, t, form.outputs(part, s_BHKV))
        state = form.next_state(part, s_BHKV), form.last(part)
        return (state, o_BTHV, sound & form.sound(part)), None

    def one_stride(carry, start):
        chunks = start + jnp.arange(0, stride, chunk, dtype=jnp.int32)
        return jax.lax.scan(one_chunk, carry, chunks, unroll=form.unroll)[0], carry[0]

    o_BTHV = jnp.zeros((*row[0].shape[:-1], v.shape[-1]), q.dtype)
    carry = (state, o_BTHV, jnp.asarray(True))
    (state, o_BTHV, sound), starts = jax.lax.scan(
        one_stride, carry, rows.stride_starts(row[0].shape[1], stride)
    )
    return sound, (o_BTHV[:, : q.shape[1]], state, starts)


def _backward(q, k, v, f, run, starts, final, do, dfinal, scale, stride, form: _Form, chunk: int):
    row, do_BTHV = _row(q, k, v, f, run, stride), rows.whole_strides(do, stride)
    dtype = starts[0].dtype
    read = lambda t, z_BHK: form.prepare(*_read(row, t, chunk, scale, dtype, z_BHK))

    def there(state, t):
        part = read(t, state[1])
        return (form.next_state(part, state[0]), form.last(part)), (state, form.sound(part))

    def back(carry, chunk_inputs):
        (ds_BHKV, r_BHK, gradients), (t, (s_BHKV, z_BHK)) = carry, chunk_inputs
        do_BHCV = _heads_first(do_BTHV, t, chunk).astype(dtype)
        *new, ds_BHKV, r_BHK = form.backward(read(t, z_BHK), s_BHKV, do_BHCV, ds_BHKV, r_BHK)
        new[0] = scale * new[0]
        gradients = [
            None if whole is None else _write(whole, t, x)
            for whole, x in zip(gradients, new, strict=True)
        ]
        return (ds_BHKV, r_BHK, gradients), None

    def one_stride(carry, stride_inputs):
        (*carry, sound), (start, state) = carry, stride_inputs
        chunks = start + jnp.arange(0, stride, chunk, dtype=jnp.int32)
        _, (states, sounds) = jax.lax.scan(there, state, chunks, unroll=form.unroll)
        inputs = (chunks, states)
        carry, _ = jax.lax.scan(back, tuple(carry), inputs, reverse=True, unroll=form.unroll)
        return (*carry, sound & jnp.all(sounds)), None

    ds_BHKV, dz_BHK = dfinal
    r_BHK = jnp.sum(ds_BHKV * final[0], axis=-1) - dz_BHK
    zeros = [None if x is None else jnp.zeros_like(x) for x in row[:4]]
    carry = (ds_BHKV, r_BHK, zeros, jnp.asarray(True))
    strides = (rows.stride_starts(row[0].shape[1], stride), starts)
    (ds, r, gradients, sound), _ = jax.lax.scan(one_stride, carry, strides, reverse=True)
    first_s, first_z = (x[0] for x in starts)
    dz = jnp.where(first_z == -jnp.inf, 0, jnp.sum(ds * first_s, axis=-1) - r)
    gradients = [None if x is None else x[:, : q.shape[1]] for x in gradients]
    return sound, (*gradients, (ds, dz))


def _row(q, k, v, f, run, stride: int) -> tuple[Any, ...]:
    """Whole strides; a key of -inf is a token that is not there."""
    q, v, f = (rows.whole_strides(x, stride) for x in (q, v, f))
    k = rows.whole_strides(k, stride, constant_values=-jnp.inf)
    return q, k, v, f, rows.whole_strides(run, stride, mode="edge")


def _read(row, t, chunk: int, scale: float, dtype, z_BHK):
    """Arguments of ``prepare`` for the chunk that begins at token t."""
    *inputs, run = row
    parts: Any = [None if x is None else _heads_first(x, t, chunk).astype(dtype) for x in inputs]
    q, k, v, f = parts
    entering = None
    if run is not None:
        run, entering = rows.resets_of_chunk(run, t, chunk)
        run, entering = run[:, None, :, None], entering[:, None, :, None]
    return scale * q, k, v, f, z_BHK, run, entering


def _heads_first(x_BTHD, t, chunk: int):
    """[B, H, chunk, D] from token t on."""
    return jax.lax.dynamic_slice_in_dim(x_BTHD, t, chunk, axis=1).swapaxes(1, 2)


def _write(x_BTHD, t, part_BHCD):
    part = part_BHCD.swapaxes(1, 2).astype(x_BTHD.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BTHD, part, t, axis=1)
