"""The additive recurrence in plain JAX: a scan over chunks, with its own backward.

Layout: the row of T tokens is padded with tokens that are not there (k = -inf) and cut into X
chunks of C tokens. The normaliser comes first, for all tokens; then ``lax.scan`` takes the state
through the chunks. The residuals of the backward are the inputs, the normaliser and the state at
the start of each chunk; the rest is recomputed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import chunk as chunk_lib
from .reference import State

CHUNK = 16  # tokens; 32 and 64 measured slower on CPU


class _Inputs(NamedTuple):
    """Scan inputs."""

    q: jax.Array  # [X, B, H, C, K], scaled
    k: jax.Array  # [X, B, H, C, K]
    v: jax.Array  # [X, B, H, C, V]
    f: jax.Array | None  # [X, B, H, C, K]
    run: jax.Array | None  # [X, B, 1, C, 1], resets so far
    entering_run: jax.Array | None  # [X, B, 1, 1, 1]


def additive_scan_xla(q, k, v, k_factor, state: State, reset, *, scale, chunk_size=None):
    """Chunked additive scan; arguments and results as in ``reference.py``.

    ``chunk_size`` is rounded up to a power of two.
    """
    chunk_size = min(chunk_size or CHUNK, q.shape[1])
    chunk_size = 1 << (chunk_size - 1).bit_length()
    run = None if reset is None else jnp.cumsum(reset.astype(jnp.int32), axis=1)
    return _scan(q, k, v, k_factor, *state, run, float(scale), chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _scan(q, k, v, f, s, z, run, scale, chunk_size):
    return _scan_forward(q, k, v, f, s, z, run, scale, chunk_size)[0]


def _scan_forward(q, k, v, f, s, z, run, scale, chunk_size):
    inputs = _cut(q, k, v, f, run, scale, chunk_size, s.dtype)
    z_XBHCK, before_XBHK, last_BHK = _normaliser(inputs, z)

    def body(s_BHKV, chunk_inputs):
        chunk = _prepare(*chunk_inputs)
        o_BHCV = chunk_lib.outputs(chunk, s_BHKV).astype(q.dtype)
        return chunk_lib.next_state(chunk, s_BHKV), (s_BHKV, o_BHCV)

    s_end, (starts, o) = jax.lax.scan(body, s, (inputs, z_XBHCK, before_XBHK))
    residuals = (q, k, v, f, run, z_XBHCK, before_XBHK, starts, s_end)
    return (_join(o, q.shape[1]), (s_end, last_BHK)), residuals


def _scan_backward(scale, chunk_size, residuals, cotangents):
    q, k, v, f, run, z_XBHCK, before_XBHK, starts, s_end = residuals
    do, (ds_end, dz_end) = cotangents
    dtype = s_end.dtype
    inputs = _cut(q, k, v, f, run, scale, chunk_size, dtype)
    do_XBHCV = _cut_tokens(do.astype(dtype), chunk_size)

    def body(carry, chunk_inputs):
        *chunk_inputs, s_BHKV, do_BHCV = chunk_inputs
        chunk = _prepare(*chunk_inputs)
        *gradients, ds, r = chunk_lib.backward(chunk, s_BHKV, do_BHCV, *carry)
        return (ds, r), tuple(gradients)

    end = ds_end, jnp.sum(ds_end * s_end, axis=-1) - dz_end
    xs = (inputs, z_XBHCK, before_XBHK, starts, do_XBHCV)
    (ds, r), (dq, dk, dv, df) = jax.lax.scan(body, end, xs, reverse=True)
    dz = jnp.where(before_XBHK[0] == -jnp.inf, 0, jnp.sum(ds * starts[0], axis=-1) - r)
    dq, dk, dv = (_join(x, q.shape[1]) for x in (scale * dq, dk, dv))
    df = None if f is None else _join(df, q.shape[1]).astype(f.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), df, ds, dz, None


_scan.defvjp(_scan_forward, _scan_backward)


def _prepare(inputs: _Inputs, z_BHCK, before_BHK) -> chunk_lib.Chunk:
    q, k, v, f, run, entering_run = inputs
    return chunk_lib.prepare(q, k, v, f, z_BHCK, before_BHK, run, entering_run)


def _normaliser(inputs: _Inputs, z_BHK):
    """log sum exp of the keys so far: after each token, before each chunk, and at the end.

    Every chunk runs through its own tokens with a running maximum and a sum of exponentials
    relative to it, all chunks side by side; then the chunks are chained.
    """
    k_XBHCK, run, entering_run = inputs.k, inputs.run, inputs.entering_run
    tokens_first = lambda x: jnp.moveaxis(x, 3, 0)
    reset_CXBH1 = None
    if run is not None:
        before = jnp.concatenate([run[..., :1, :], run[..., :-1, :]], axis=-2)
        reset_CXBH1 = tokens_first(run != before)

    def token(carry, token_inputs):
        (top, total), (k, reset) = carry, token_inputs
        if reset is not None:
            top, total = jnp.where(reset, -jnp.inf, top), jnp.where(reset, 0, total)
        new = jnp.maximum(top, k)
        finite = jnp.where(new == -jnp.inf, 0, new)
        total = total * jnp.exp(top - finite) + jnp.exp(k - finite)
        return (new, total), (new, total)

    nothing = jnp.full_like(k_XBHCK[..., 0, :], -jnp.inf), jnp.zeros_like(k_XBHCK[..., 0, :])
    _, (top, total) = jax.lax.scan(token, nothing, (tokens_first(k_XBHCK), reset_CXBH1))
    own_XBHCK = jnp.moveaxis(top + jnp.log(total), 0, 3)

    def chunk(before_BHK, chunk_inputs):
        last_BHK, same_BH1 = chunk_inputs
        carried = before_BHK if same_BH1 is None else jnp.where(same_BH1, before_BHK, -jnp.inf)
        return jnp.logaddexp(carried, last_BHK), before_BHK

    same = None if run is None else run == entering_run  # [X, B, 1, C, 1]
    ends = (own_XBHCK[..., -1, :], None if same is None else same[..., -1, :])
    z_end, before_XBHK = jax.lax.scan(chunk, z_BHK, ends)
    carried = before_XBHK[..., None, :]
    if same is not None:
        carried = jnp.where(same, carried, -jnp.inf)
    return jnp.logaddexp(carried, own_XBHCK), before_XBHK, z_end


def _cut(q, k, v, f, run, scale, chunk_size, dtype) -> _Inputs:
    """Casts, pads and cuts rows into chunks."""
    entering_run = None
    if run is not None:
        run = _cut_tokens(run[:, :, None, None], chunk_size, mode="edge")
        first = jnp.zeros_like(run[:1, ..., -1:, :])
        entering_run = jnp.concatenate([first, run[:-1, ..., -1:, :]])
    return _Inputs(
        q=_cut_tokens(q.astype(dtype) * scale, chunk_size),
        k=_cut_tokens(k.astype(dtype), chunk_size, constant_values=-jnp.inf),
        v=_cut_tokens(v.astype(dtype), chunk_size),
        f=None if f is None else _cut_tokens(f.astype(dtype), chunk_size),
        run=run,
        entering_run=entering_run,
    )


def _cut_tokens(x_BTHD, chunk_size: int, **padding) -> jax.Array:
    """[B, T, H, D] -> [X, B, H, C, D]."""
    batch, tokens, heads, width = x_BTHD.shape
    x = jnp.pad(x_BTHD, ((0, 0), (0, -tokens % chunk_size), (0, 0), (0, 0)), **padding)
    return x.reshape(batch, -1, chunk_size, heads, width).transpose(1, 0, 3, 2, 4)


def _join(x_XBHCD, tokens: int) -> jax.Array:
    """[X, B, H, C, D] -> [B, T, H, D]."""
    x = x_XBHCD.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]
