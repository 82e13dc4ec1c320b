"""DeltaProduct in plain JAX: a scan over strides of the row, each of a few chunks written out.

A step of ``lax.scan`` reads its chunks where they lie in the row, so that no second copy of the
row in another layout is made, takes the state through them, and keeps the state it began with.
The backward runs over the strides in reverse: the state passes through the chunks of a stride
once more, then its gradient comes back through them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .. import rows
from ..dispatch import target
from . import chunk as chunk_lib


def default_chunk(steps: int) -> int:
    """Tokens per chunk: 16 micro-steps on CPU, 64 where matrix units are larger.

    Longer chunks compute more within themselves than they save at the state.
    """
    micro_steps = 16 if target()[0] == "cpu" else 64
    return 1 << (max(1, micro_steps // steps).bit_length() - 1)


def forward(q, k, v, beta, g, state, run, *, scale, chunk, stride):
    """Outputs, final state and the states at the start of all strides, as in ``backends.py``."""
    row, run = _row(q, k, v, beta, g, stride), rows.whole_strides(run, stride, mode="edge")
    chunk = chunk or min(default_chunk(k.shape[2]), stride)

    def body(carry, start):
        state_BHKV, o_BT1HV = carry
        first_BHKV = state_BHKV
        for t in range(0, stride, chunk):
            part = _read(row, run, start + t, chunk, scale, state.dtype)
            read_BHCV, _, u_BHLV, state_BHKV = chunk_lib.pass_state(part, state_BHKV)
            o_BT1HV = _write(o_BT1HV, start + t, chunk_lib.outputs(part, read_BHCV, u_BHLV))
        return (state_BHKV, o_BT1HV), first_BHKV

    o_BT1HV = jnp.zeros((*row[0].shape[:-1], v.shape[-1]), q.dtype)
    (final, o_BT1HV), starts = jax.lax.scan(
        body, (state, o_BT1HV), rows.stride_starts(row[0].shape[1], stride)
    )
    return o_BT1HV[:, : q.shape[1], 0], final, starts


def backward(q, k, v, beta, g, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of the inputs and of the initial state, as in ``backends.py``."""
    del final
    row, run = _row(q, k, v, beta, g, stride), rows.whole_strides(run, stride, mode="edge")
    do_BT1HV = rows.whole_strides(do[:, :, None], stride)
    chunk = chunk or min(default_chunk(k.shape[2]), stride)
    dtype = starts.dtype

    def body(carry, stride_inputs):
        (dstate_BHKV, gradients), (start, state_BHKV) = carry, stride_inputs
        passed = []
        for t in range(0, stride, chunk):
            part = _read(row, run, start + t, chunk, scale, dtype)
            _, error_BHLV, u_BHLV, next_BHKV = chunk_lib.pass_state(part, state_BHKV)
            passed.append((start + t, part, state_BHKV, error_BHLV, u_BHLV))
            state_BHKV = next_BHKV
        dlater_BH = jnp.sum(dstate_BHKV * state_BHKV, axis=(-2, -1))
        for t, part, state_BHKV, error_BHLV, u_BHLV in reversed(passed):
            do_BHCV = _micro_steps(do_BT1HV, t, chunk).astype(dtype)
            dq, dk, dv, dbeta, dg, dstate_BHKV, dlater_BH = chunk_lib.backward(
                part, state_BHKV, error_BHLV, u_BHLV, do_BHCV, dstate_BHKV, dlater_BH
            )
            new = (scale * dq, dk, dv, dbeta[..., None], dg[..., None])
            gradients = [
                None if whole is None else _write(whole, t, x)
                for whole, x in zip(gradients, new, strict=True)
            ]
        return (dstate_BHKV, gradients), None

    zeros = [None if x is None else jnp.zeros_like(x) for x in row]
    (dstate, gradients), _ = jax.lax.scan(
        body,
        (dfinal.astype(dtype), zeros),
        (rows.stride_starts(row[0].shape[1], stride), starts),
        reverse=True,
    )
    gradients: Any = [None if x is None else x[:, : q.shape[1]] for x in gradients]
    dq, dk, dv, dbeta, dg = gradients
    dg = None if dg is None else dg[:, :, 0, :, 0]
    return dq[:, :, 0], dk, dv, dbeta[..., 0], dg, dstate


def _row(q, k, v, beta, g, stride: int) -> tuple[Any, ...]:
    """All inputs as [B, T, steps of the token, H, width], T a multiple of the stride."""
    g = None if g is None else g[:, :, None, :, None]
    arrays = (q[:, :, None], k, v, beta[..., None], g)
    return tuple(rows.whole_strides(x, stride) for x in arrays)


def _read(row, run, t, chunk: int, scale: float, dtype) -> chunk_lib.Chunk:
    """The chunk that begins at token t."""
    parts: Any = [None if x is None else _micro_steps(x, t, chunk).astype(dtype) for x in row]
    q, k, v, beta, g = parts
    entering = None
    if run is not None:
        run, entering = rows.resets_of_chunk(run, t, chunk)
        run = run[:, None]
    g = None if g is None else g[..., 0]
    decay = chunk_lib.decays(g, run, entering, q.shape[:-1], dtype)
    return chunk_lib.prepare(scale * q, k, v, beta[..., 0], decay)


def _micro_steps(x_BTNHD, t, chunk: int):
    """[B, H, chunk * N, D] from token t on; the steps of a token follow each other."""
    x = jax.lax.dynamic_slice_in_dim(x_BTNHD, t, chunk, axis=1)
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)


def _write(x_BTNHD, t, part_BHLD):
    """The reverse of ``_micro_steps``."""
    batch, _, steps, heads, width = x_BTNHD.shape
    part = part_BHLD.swapaxes(1, 2).reshape(batch, -1, steps, heads, width)
    return jax.lax.dynamic_update_slice_in_dim(x_BTNHD, part.astype(x_BTNHD.dtype), t, axis=1)
