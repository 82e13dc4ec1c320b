"""What the Hopper kernels of the additive scan do with all chunks side by side, before and after.

Symbols as in ``quotients.py``; see ``pallas_gpu.py``.
"""

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
    vectors,
    zeros,
)
from ..hopper_scans import (
    SQUARE,
    block,
    of_chunk,
    of_tokens,
)
from .gpu_layout import (
    END,
    ENDING,
    ENTERED,
    LOG2_E,
    OLD,
    REFERENCE,
    RUN,
)
from .quotients import SMALLEST


def prepare(q, k, f, channels, tokens, scale: float, stride: int):
    """queries and keys [B, H, X, 64, K], scores [B, H, X, 64, 64], and lost [B, H, X, K]: how many
    tokens of a channel have lost keys."""
    key = q.shape[-1]

    def compute(place, refs):
        scores = zeros(*SQUARE)
        for start in range(0, key, ROWS):
            some = pl.ds(start, ROWS)
            part = lambda name, some=some: load(refs[name].at[:, some]).astype(jnp.float32)
            factor = lambda i, some=some: row(refs["channels"].at[i, some])
            k = part("k")
            e, old, sums, inverse = _weights(refs, k, factor, stride)
            lost = (sums < SMALLEST) & ((sums > 0) | (k > -jnp.inf))
            refs["lost_sums"].at[some][...] = jnp.sum(jnp.where(lost, 1.0, 0.0), axis=0)
            queries = part("q") * inverse * scale
            keys = e if f is None else e * part("f")
            refs["high"][...] = keys.astype(q.dtype)
            ending = by_column(column(refs["columns"].at[ENDING]), SQUARE)
            keys = keys * ending * by_row(factor(END), SQUARE)
            refs["q"].at[:, some][...] = (queries * old).astype(q.dtype)
            refs["keys_tile"].at[:, some][...] = keys.astype(q.dtype)
            plgpu.commit_smem()
            scores = product(queries.astype(q.dtype), refs["high"].T, scores)
        refs["low"][...] = jnp.where(_within(refs), scores, 0.0).astype(q.dtype)
        plgpu.commit_smem()
        at = place["row"], place["head"], place["chunk"]
        sources = {"queries": "q", "keys": "keys_tile", "scores": "low", "lost": "lost_sums"}
        for name, source in sources.items():
            plgpu.copy_smem_to_gmem(refs[source], refs[name].at[at])

    chunk = lambda place, n: place["chunk"]
    reads = {"q": of_tokens(q, stride, chunk), "k": of_tokens(k, stride, chunk)}
    if f is not None:
        reads["f"] = of_tokens(f, stride, chunk)
    grid = grid_of(channels, "chunk")
    shape = lambda *shape, dtype=q.dtype: jax.ShapeDtypeStruct((*grid.values(), *shape), dtype)
    return hopper.one_tile(
        "additive_scan_prepare",
        grid,
        {**reads, **_factors(channels, tokens, chunk)},
        {},
        {
            "queries": shape(ROWS, key),
            "keys": shape(ROWS, key),
            "scores": shape(*SQUARE),
            "lost": shape(key, dtype=jnp.float32),
        },
        {
            "high": tile(*SQUARE),
            "low": tile(*SQUARE),
            "keys_tile": tile(ROWS, key),
            "lost_sums": vectors(key),
        },
        compute,
    )


def gradients(q, k, v, f, do, starts, dstates, channels, tokens, scale: float, stride: int):
    """dq, df, dk without what comes through R, float32, and entered [B, H, X, K / 64, 1, 64]."""
    value = v.shape[-1]

    def compute(place, refs):
        part = lambda name: load(refs[name]).astype(jnp.float32)
        factor = lambda i: row(refs["channels"].at[i, block(place)])
        queries = load(refs["q"])
        scratch = {**refs, "low": refs["q"]}  # from here on, and of state once it is in registers

        # What queries read of the state, 64 values at a time: shared memory for two programs.
        dq = zeros(*SQUARE)
        for i in range(0, value, ROWS):
            if i > 0:
                plgpu.barrier_wait(refs["state_ready"])
            refs["state_tile"][...] = part("state").astype(q.dtype)
            plgpu.commit_smem()
            if i + ROWS < value:
                at = (*start(place), pl.ds(i + ROWS, ROWS))
                plgpu.copy_gmem_to_smem(refs["starts"].at[at], refs["state"], refs["state_ready"])
            dq = product(refs["do"].at[:, pl.ds(i, ROWS)], refs["state_tile"].T, dq)

        e, old, _, inverse = _weights(scratch, part("k"), factor, stride)
        enter = old * inverse
        p = jnp.where(_within(refs), product(refs["do"], refs["v"].T), 0.0)
        refs["p"][...] = p.astype(q.dtype)
        refs["high"][...] = (e if f is None else e * part("f")).astype(q.dtype)
        scratch["low"][...] = (queries.astype(jnp.float32) * scale * inverse).astype(q.dtype)
        plgpu.commit_smem()
        dq = enter * dq + inverse * product(refs["p"], refs["high"])
        x = queries.astype(jnp.float32) * scale * dq
        refs["state_tile"][...] = (dq * scale).astype(q.dtype)
        refs["entered_sums"].at[0][...] = jnp.sum(enter * x, axis=0)
        x = inverse * x
        left = by_column(column(refs["columns"].at[ENDING]), SQUARE) * by_row(factor(END), SQUARE)
        dk = e * product(refs["p"].T, scratch["low"])
        dk += e * left * product(refs["v"], refs["dstate"])
        if f is not None:
            df, dk = dk, dk * part("f")
            refs["f"][...] = df.astype(f.dtype)
        dk = dk - e * _sum_of_tokens(_within(refs, later=True), x, scratch)
        refs["state"][...] = dk
        plgpu.commit_smem()
        row_, head, x, channels_ = (place[axis] for axis in ("row", "head", "chunk", "block"))
        at = row_, pl.ds(x * stride, stride), head, block(place)
        sources = {"dq": "state_tile", "dk": "state"} | ({} if f is None else {"df": "f"})
        for name, source in sources.items():
            plgpu.copy_smem_to_gmem(refs[source].at[pl.ds(0, stride)], refs[name].at[at])
        plgpu.copy_smem_to_gmem(refs["entered_sums"], refs["entered"].at[row_, head, x, channels_])

    chunk = lambda place, n: place["chunk"]
    reads = {"q": of_tokens(q, stride, chunk, block), "k": of_tokens(k, stride, chunk, block)}
    outputs = {
        "dq": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "dk": jax.ShapeDtypeStruct(k.shape, jnp.float32),
    }
    if f is not None:
        reads["f"] = of_tokens(f, stride, chunk, block)
        outputs["df"] = jax.ShapeDtypeStruct(f.shape, f.dtype)
    grid = {**grid_of(channels, "chunk"), "block": q.shape[-1] // ROWS}
    outputs["entered"] = jax.ShapeDtypeStruct((*grid.values(), 1, ROWS), jnp.float32)
    start = lambda place: (place["chunk"], place["row"], place["head"], block(place))
    first = lambda place, n: (*start(place), pl.ds(0, ROWS))
    at = lambda place: (place["row"], place["head"], place["chunk"])
    after = lambda place, n: (*at(place), slice(None), block(place))
    return hopper.one_tile(
        "additive_scan_gradients",
        grid,
        {
            **reads,
            "v": of_tokens(v, stride, chunk),
            "do": of_tokens(do, stride, chunk),
            "state": Read(starts, vectors, SQUARE, first),
            "dstate": Read(dstates, tile, (value, ROWS), after),
            **_factors(channels, tokens, chunk),
        },
        {"starts": starts},
        outputs,
        {
            "p": tile(*SQUARE),
            "high": tile(*SQUARE),
            "state_tile": tile(*SQUARE),
            "state_ready": plgpu.Barrier(),
            "entered_sums": vectors(1, ROWS),
        },
        compute,
    )


def grid_of(channels, *axes: str) -> dict[str, int]:
    """The axes of rows and heads, and of chunks."""
    return dict(zip(("row", "head", *axes), channels.shape, strict=False))


def _factors(channels, tokens, chunk) -> dict[str, Read]:
    at = lambda place, n: (place["row"], chunk(place, n))
    read = Read(tokens, vectors, tokens.shape[2:], at)
    return {"channels": of_chunk(channels, chunk), "rows": read, "columns": read}


def _within(refs, later: bool = False) -> jax.Array:
    """Whether the token (row) sees the token (column), or with ``later`` is seen by it."""
    i, j = index(SQUARE, 0), index(SQUARE, 1)
    run = column(refs["columns"].at[RUN])
    same = by_column(run, SQUARE) == by_row(row(refs["rows"].at[RUN]), SQUARE)
    return same & (j >= i if later else j <= i)


def _sum_of_tokens(seen, x, refs) -> jax.Array:
    """Sums of [64, 64] over the tokens that are seen, to float32."""
    ones = jnp.where(seen, 1.0, 0.0).astype(jnp.bfloat16)
    high = x.astype(jnp.bfloat16)
    refs["high"][...] = high
    refs["low"][...] = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    return product(ones, refs["low"], product(ones, refs["high"]))


def _weights(refs, k, channels, stride: int):
    """e, E and its inverse for 64 channels, of which ``channels(i)`` are the factors."""
    by_channel = lambda i: by_row(channels(i), SQUARE)
    e = jnp.exp2((k - by_channel(REFERENCE)) * LOG2_E)
    e = jnp.where(index(SQUARE, 0) < stride, e, 0.0)
    old = by_channel(OLD) * by_column(column(refs["columns"].at[ENTERED]), SQUARE)
    sums = old + _sum_of_tokens(_within(refs), e, refs)
    inverse = jnp.where(sums > 0, 1 / jnp.where(sums > 0, sums, 1.0), 0.0)
    return e, old, sums, inverse
