"""What the Hopper kernels of DeltaProduct do with all chunks side by side, before and after.

Symbols as in ``chunk.py``; see ``pallas_gpu.py``.
"""

import math

import jax
import jax.numpy as jnp

from .. import hopper
from ..hopper import (
    ROWS,
    Read,
    by_column,
    by_row,
    column,
    index,
    load,
    pl,
    plgpu,
    product,
    row,
    tile,
)
from ..hopper_scans import (
    SQUARE,
    block,
    float32,
    of_chunk,
    of_tokens,
)
from .gpu_layout import (
    ACROSS,
    BETA,
    ENTER,
    LEAVE,
    LOG,
    QUERY_ENTER,
    QUERY_LOG,
    QUERY_RUN,
    RUN,
    Sizes,
    chunks_like,
)


def prepare(sizes: Sizes, q, k, factors, keep_m: bool = False):
    """T [B, H, X, 64, 64], scores P [B, H, X, C, 64], and M [B, H, X, 64, 64] if it is kept."""

    def compute(place, refs):
        x, work = refs["x"], refs["work"]
        m = product(refs["k"], refs["k"].T) * _decay(sizes, refs)
        beta = by_column(column(refs["columns"].at[BETA]), SQUARE)
        inverse = _inverse(beta * m, x, work)
        decay = _decay(sizes, refs, queries=True)
        scores = product(refs["q"], refs["k"].T) * decay * sizes.scale
        x[...], work[...] = inverse.astype(x.dtype), scores.astype(x.dtype)
        if keep_m:
            refs["m_tile"][...] = m.astype(x.dtype)
        plgpu.commit_smem()
        at = place["row"], place["head"], place["chunk"]
        plgpu.copy_smem_to_gmem(x, refs["inverse"].at[at])
        plgpu.copy_smem_to_gmem(work.at[pl.ds(0, sizes.chunk)], refs["scores"].at[at])
        if keep_m:
            plgpu.copy_smem_to_gmem(refs["m_tile"], refs["m"].at[at])

    chunk = lambda place, n: place["chunk"]
    square = chunks_like(sizes, q, *SQUARE)
    outputs = {"inverse": square, "scores": chunks_like(sizes, q, sizes.chunk, ROWS)}
    scratch = {"x": tile(*SQUARE), "work": tile(*SQUARE)}
    if keep_m:
        outputs["m"], scratch["m_tile"] = square, tile(*SQUARE)
    return hopper.one_tile(
        "delta_product_prepare",
        {"row": sizes.batch, "head": sizes.heads, "chunk": sizes.chunks},
        {
            "q": of_tokens(q, sizes.chunk, chunk),
            "k": of_tokens(k, sizes.micro, chunk),
            "rows": of_chunk(factors, chunk, first=RUN + 1),
            "columns": of_chunk(factors, chunk),
        },
        *({}, outputs, scratch, compute),
    )


def _decay(sizes: Sizes, refs, queries: bool = False):
    """Decay from micro-step (column) to micro-step or to token (row): 0 where it is not before."""
    i, j = index(SQUARE, 0), index(SQUARE, 1)
    if queries:
        before, log, run = jax.lax.div(j, sizes.steps) <= i, QUERY_LOG, QUERY_RUN
    else:
        before, log, run = j < i, LOG, RUN
    rows = sizes.chunk if queries else sizes.micro
    before &= i < rows
    here, there = refs["columns"], refs["rows"]
    before &= by_column(column(here.at[run]), SQUARE) == by_row(row(there.at[RUN]), SQUARE)
    log = by_column(column(here.at[log]), SQUARE) - by_row(row(there.at[LOG]), SQUARE)
    return jnp.where(before, jnp.exp2(jnp.where(before, log, 0.0)), 0.0)


def _inverse(a, x_tile, a_tile):
    """(I + A)^{-1} by merging blocks, as in ``chunk.py``, then a Newton step.

    The merges' factors are bfloat16. The step, X + X (I - (I + A) X) with A as the sum of two
    bfloat16 matrices, removes what that cost.
    """
    differ = jax.lax.bitwise_xor(index(SQUARE, 0), index(SQUARE, 1))
    eye = jnp.where(differ == 0, 1.0, 0.0)
    high = a.astype(x_tile.dtype)
    low = (a - high.astype(jnp.float32)).astype(x_tile.dtype)
    a_tile[...] = high
    x = eye - jnp.where(differ == 1, a, 0.0)
    for level in range(1, ROWS.bit_length() - 1):
        rounded = x.astype(x_tile.dtype)
        x_tile[...] = rounded
        plgpu.commit_smem()
        meet = (differ >= 1 << level) & (differ < 2 << level)
        xa = jnp.where(meet, product(rounded, a_tile), 0.0)
        x = x - product(xa.astype(x_tile.dtype), x_tile)
    rounded = x.astype(x_tile.dtype)
    x_tile[...] = rounded
    plgpu.commit_smem()
    x = rounded.astype(jnp.float32)
    rest = eye - x - product(high, x_tile) - product(low, x_tile)
    a_tile[...] = rest.astype(a_tile.dtype)
    plgpu.commit_smem()
    return x + product(rounded, a_tile)


def gradients(sizes: Sizes, q, k, do, m, factors, u, states, e, dstates):
    """dq and dk, and sums per chunk and 64 keys, [B, H, X, K / 64, 3, 64]:

    dbeta, of which <e, v> is missing; <q, dq>; and parts of what the decay of the state that leaves
    the chunk would get.
    """
    chunk = lambda place, n: place["chunk"]

    def compute(place, refs):
        state, dstate, rows, columns = (refs[x] for x in ("state", "dstate", "rows", "columns"))
        factor = lambda i: column(columns.at[i])
        times = lambda x, vector: x * by_column(vector, SQUARE)
        once = (place["block"] == 0).astype(jnp.float32)  # what does not depend on the keys
        keys = load(refs["k"]).astype(jnp.float32)

        read = product(refs["e"], state)
        held = product(refs["e"], refs["u"].T)
        dbeta = jnp.sum(keys * read, axis=1) * factor(ENTER)
        dbeta += jnp.sum(load(refs["m"]).astype(jnp.float32) * held, axis=1) * once
        dm = (times(held, factor(BETA)) * _decay(sizes, refs) * -1.0).astype(k.dtype)
        dscores = product(refs["do"], refs["u"].T) * _decay(sizes, refs, queries=True)
        dscores = (dscores * sizes.scale).astype(k.dtype)
        dq = times(product(refs["do"], state), factor(QUERY_ENTER))
        dk = times(product(refs["u"], dstate), factor(LEAVE))
        dend = jnp.sum(keys * dk, axis=1)
        for i in range(0, sizes.value, ROWS):
            some = pl.ds(i, ROWS)
            both = (load(x.at[some]).astype(jnp.float32) for x in (state, dstate))
            dend += jnp.sum(math.prod(both), axis=1) * rows[ACROSS, 0]
        dk = dk - times(times(read, factor(ENTER)), factor(BETA))

        dm_tile, dscores_tile = (x.at[pl.ds(0, ROWS)] for x in (state, dstate))  # done with these
        dm_tile[...], dscores_tile[...] = dm, dscores
        plgpu.commit_smem()
        tokens, micro = pl.ds(0, sizes.chunk), pl.ds(0, sizes.micro)
        dq = product(dscores, refs["k"], dq)
        dk = product(dm, refs["k"], dk)
        dk = product(dm_tile.T, refs["k"], dk)
        dk = product(dscores_tile.T, refs["q"], dk)
        dread = jnp.sum(load(refs["q"]).astype(jnp.float32) * dq, axis=1)
        for i, x in enumerate((dbeta * -1.0, dread, dend)):
            columns.at[i][...] = x
        refs["q"][...], refs["k"][...] = dq.astype(q.dtype), dk.astype(k.dtype)
        plgpu.commit_smem()
        row_, head, x, keys = (place[axis] for axis in ("row", "head", "chunk", "block"))
        at = row_, pl.ds(x * sizes.chunk, sizes.chunk), head, block(place)
        plgpu.copy_smem_to_gmem(refs["q"].at[tokens], refs["dq"].at[at])
        at = row_, pl.ds(x * sizes.micro, sizes.micro), head, block(place)
        plgpu.copy_smem_to_gmem(refs["k"].at[micro], refs["dk"].at[at])
        plgpu.copy_smem_to_gmem(columns.at[pl.ds(0, 3)], refs["sums"].at[row_, head, x, keys])

    blocks = sizes.key // ROWS
    at = lambda place: (place["row"], place["head"], place["chunk"])
    whole = lambda place, n: (*at(place), slice(None), block(place))
    return hopper.one_tile(
        "delta_product_gradients",
        {"row": sizes.batch, "head": sizes.heads, "chunk": sizes.chunks, "block": blocks},
        {
            "q": of_tokens(q, sizes.chunk, chunk, block),
            "k": of_tokens(k, sizes.micro, chunk, block),
            "do": of_tokens(do, sizes.chunk, chunk),
            "u": of_tokens(u, sizes.micro, chunk),
            "e": of_tokens(e, sizes.micro, chunk),
            "m": of_chunk(m, chunk),
            "state": Read(states, tile, (sizes.value, ROWS), whole),
            "dstate": Read(dstates, tile, (sizes.value, ROWS), whole),
            "rows": of_chunk(factors, chunk, first=RUN + 1),
            "columns": of_chunk(factors, chunk),
        },
        {},
        {
            "dq": jax.ShapeDtypeStruct(q.shape, q.dtype),
            "dk": jax.ShapeDtypeStruct(k.shape, k.dtype),
            "sums": float32(sizes.batch, sizes.heads, sizes.chunks, blocks, 3, ROWS),
        },
        {},
        compute,
    )
