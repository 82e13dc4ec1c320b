"""DeltaProduct in plain JAX: a scan over groups of chunks, with its own backward.

Layout: the row of T tokens is padded with no-op tokens and cut into groups of GROUP chunks
of C tokens; ``lax.scan`` runs over the groups. Inside a group, everything that does not
depend on the state is computed for all chunks at once, then the state passes through them
one after another. The residuals of the backward are the inputs and the state at the start
of each group; the rest is recomputed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import chunk as chunk_lib

GROUP = 1  # chunks per scan step; 2, 4 and 8 measured no faster on CPU


class _Inputs(NamedTuple):
    """Scan inputs, grouped: X groups, M chunks per group, C tokens per chunk, L = C * N."""

    q: jax.Array  # [X, M, B, H, C, K], scaled
    k: jax.Array  # [X, M, B, H, L, K]
    v: jax.Array  # [X, M, B, H, L, V]
    beta: jax.Array  # [X, M, B, H, L]
    g: jax.Array | None  # [X, M, B, H, C]
    run: jax.Array | None  # [X, M, B, 1, C], resets so far
    entering_run: jax.Array | None  # [X, M, B, 1]


def delta_product_xla(q, k, v, beta, g, state, reset, *, scale, chunk_size=None):
    """Chunked DeltaProduct; arguments and results as in ``reference.py``."""
    tokens, steps = k.shape[1:3]
    if chunk_size is None:
        chunk_size = default_chunk_size(steps, q.shape[-1])
    chunk_size = min(chunk_size, tokens)
    run = None if reset is None else jnp.cumsum(reset.astype(jnp.int32), axis=1)
    return _scan(q, k, v, beta, g, state, run, float(scale), chunk_size)


def default_chunk_size(steps: int, key_dim: int) -> int:
    """Tokens per chunk, so that the work inside a chunk stays below that on the state.

    That is 16 micro-steps for small keys on CPU, 32 for larger ones, and 64 where matrix
    units are larger.
    """
    micro_steps = 64
    if jax.default_backend() == "cpu":
        micro_steps = 16 if key_dim <= 32 else 32
    return max(1, micro_steps // steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _scan(q, k, v, beta, g, state, run, scale, chunk_size):
    (o, state), _ = _scan_forward(q, k, v, beta, g, state, run, scale, chunk_size)
    return o, state


def _scan_forward(q, k, v, beta, g, state, run, scale, chunk_size):
    inputs = _group(q, k, v, beta, g, run, scale, chunk_size, state.dtype)

    def group(state_BHKV, group_inputs: _Inputs):
        chunks = _prepare(group_inputs)
        start_BHKV, o = state_BHKV, []
        for chunk in chunks:
            u = chunk_lib.pseudo_values(chunk, state_BHKV)
            o.append(chunk_lib.outputs(chunk, u, state_BHKV).astype(q.dtype))
            state_BHKV = chunk_lib.next_state(chunk, u, state_BHKV)
        return state_BHKV, (start_BHKV, jnp.stack(o))

    final, (starts, o) = jax.lax.scan(group, state, inputs)
    o = _ungroup_tokens(o, q.shape[1])
    return (o, final), (q, k, v, beta, g, run, starts)


def _scan_backward(scale, chunk_size, residuals, cotangents):
    q, k, v, beta, g, run, starts = residuals
    do, dfinal = cotangents
    inputs = _group(q, k, v, beta, g, run, scale, chunk_size, starts.dtype)
    do = _group_tokens(do.astype(starts.dtype), chunk_size)

    def group(dstate, group_inputs):
        inputs, start, do_M = group_inputs
        chunks = _prepare(inputs)
        states, pseudo = [start], []
        for chunk in chunks:
            pseudo.append(chunk_lib.pseudo_values(chunk, states[-1]))
            states.append(chunk_lib.next_state(chunk, pseudo[-1], states[-1]))
        gradients = []
        for m in reversed(range(len(chunks))):
            *gradient, dstate = chunk_lib.backward(chunks[m], pseudo[m], states[m], do_M[m], dstate)
            gradients.append(gradient)
        return dstate, jax.tree.map(lambda *x: jnp.stack(x), *reversed(gradients))

    dstate, (dq, dk, dv, dbeta, dg) = jax.lax.scan(
        group, dfinal.astype(starts.dtype), (inputs, starts, do), reverse=True
    )
    tokens, steps = k.shape[1:3]
    dq = (scale * _ungroup_tokens(dq, tokens)).astype(q.dtype)
    dk = _ungroup_steps(dk, tokens, steps).astype(k.dtype)
    dv = _ungroup_steps(dv, tokens, steps).astype(v.dtype)
    dbeta = _ungroup_steps(dbeta[..., None], tokens, steps)[..., 0].astype(beta.dtype)
    dg = None if g is None else _ungroup_tokens(dg[..., None], tokens)[..., 0].astype(g.dtype)
    return dq, dk, dv, dbeta, dg, dstate, None


_scan.defvjp(_scan_forward, _scan_backward)


def _prepare(inputs: _Inputs) -> list[chunk_lib.Chunk]:
    """The state-independent part of a group, computed at once, as a list of its chunks."""
    decay = chunk_lib.decays(
        inputs.g, inputs.run, inputs.entering_run, inputs.q.shape[:-1], inputs.q.dtype
    )
    group = chunk_lib.prepare(inputs.q, inputs.k, inputs.v, inputs.beta, decay)
    return [jax.tree.map(lambda x, m=m: x[m], group) for m in range(inputs.q.shape[0])]


def _group(q, k, v, beta, g, run, scale, chunk_size, dtype) -> _Inputs:
    """Pads with no-op tokens (k = v = beta = g = 0), casts, and cuts rows into groups."""
    entering_run = None
    if run is not None:
        run = _pad_tokens(run, chunk_size, mode="edge")
        entering_run = jnp.pad(run[:, :-1], ((0, 0), (1, 0)))[:, ::chunk_size]
        groups = _groups(run.shape[1], chunk_size)
        entering_run = entering_run.T.reshape(groups, -1, run.shape[0], 1)
        run = run.reshape(run.shape[0], groups, -1, 1, chunk_size).transpose(1, 2, 0, 3, 4)
    cast = lambda x: x.astype(dtype)
    return _Inputs(
        q=_group_tokens(cast(q) * scale, chunk_size),
        k=_group_steps(cast(k), chunk_size),
        v=_group_steps(cast(v), chunk_size),
        beta=_group_steps(cast(beta)[..., None], chunk_size)[..., 0],
        g=None if g is None else _group_tokens(cast(g)[..., None], chunk_size)[..., 0],
        run=run,
        entering_run=entering_run,
    )


def _groups(tokens: int, chunk_size: int) -> int:
    """Number of groups of at most GROUP chunks for an already padded row."""
    chunks = tokens // chunk_size
    return chunks // GROUP if chunks > GROUP else 1


def _pad_tokens(x, chunk_size: int, mode="constant"):
    """Pads axis 1 to whole chunks, and to whole groups if there is more than one."""
    chunks = -(-x.shape[1] // chunk_size)
    if chunks > GROUP:
        chunks = -(-chunks // GROUP) * GROUP
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, chunks * chunk_size - x.shape[1])
    return jnp.pad(x, padding, mode=mode)


def _group_tokens(x_BTHD, chunk_size: int):
    """[B, T, H, D] -> [X, M, B, H, C, D]."""
    return _group_steps(x_BTHD[:, :, None], chunk_size)


def _group_steps(x_BTNHD, chunk_size: int):
    """[B, T, N, H, D] -> [X, M, B, H, C * N, D]; micro-steps are token-major."""
    x = _pad_tokens(x_BTNHD, chunk_size)
    batch, tokens, steps, heads, width = x.shape
    x = x.reshape(batch, _groups(tokens, chunk_size), -1, chunk_size * steps, heads, width)
    return x.transpose(1, 2, 0, 4, 3, 5)


def _ungroup_tokens(x, tokens: int):
    """[X, M, B, H, C, D] -> [B, T, H, D]."""
    return _ungroup_steps(x, tokens, 1)[:, :, 0]


def _ungroup_steps(x, tokens: int, steps: int):
    """[X, M, B, H, C * N, D] -> [B, T, N, H, D]."""
    *_, batch, heads, _, width = x.shape
    x = x.transpose(2, 0, 1, 4, 3, 5).reshape(batch, -1, steps, heads, width)
    return x[:, :tokens]
