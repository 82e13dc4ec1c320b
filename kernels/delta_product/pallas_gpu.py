"""DeltaProduct on Hopper GPUs: the chunks of ``chunk.py`` on tensor cores, forward and backward.

Symbols as there; u are the pseudo-values, T the inverse, X chunks in a row. Five kernels:

  prepare      all chunks side by side: T, the scores P, and for the backward M
  forward      a program per row and 64 values goes through the chunks, the state in registers
  replay       backward, strides side by side: u and the states once more, from those that were kept
  backward     as forward, from the end, with the cotangent of the state in registers
  gradients    all chunks side by side: what is left, products of the above

The state is kept transposed, [V, K]: 64 values are the rows of a matrix, so that every product
that the next one waits for has its left factor in registers, tokens and micro-steps are columns,
of which there may be any multiple of 8, and N steps need no queries but those of their token.

Rows that are too few for the processors are divided into segments (``gpu_layout.segments_of``).
The state leaving a segment is linear in the one entering it, so that a first pass finds the
transition of every segment, [K, K], by sending the identity through it, beside the zero state.

Factors of products are bfloat16, sums and the state float32. Widths are 64 and 128.
"""

import functools

import jax
import jax.numpy as jnp

from .. import hopper
from ..hopper import (
    ROWS,
    by_row,
    index,
    load_transposed,
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
    state_memory,
    write_state,
)
from .gpu_chunks import (
    gradients,
    prepare,
)
from .gpu_layout import (
    ACROSS,
    BETA,
    ENTER,
    LEAVE,
    QUERY_ENTER,
    Sizes,
    chunks_like,
    default_chunk,
    factors_of,
    micro_steps,
    per_chunk,
    per_token,
    sizes_of,
)


def supports(q, k, v, beta, g, state, run, *, scale, chunk, stride) -> str | None:
    """Why these arguments of ``forward`` do not fit the kernels, or None."""
    del beta, g, state, run, scale
    steps, widths = k.shape[2], (q.shape[-1], v.shape[-1])
    dtypes = {jnp.dtype(x.dtype).name for x in (q, k, v)}
    if dtypes != {"bfloat16"}:
        return f"q, k, v must be bfloat16, the factors of tensor cores, not {sorted(dtypes)}"
    if steps > 4:
        return f"N must be 1 to 4, not {steps}"
    if not set(widths) <= set(WIDTHS):
        return f"K and V must be among {WIDTHS}, not {widths}"
    if chunk is not None and (chunk < 16 or stride % chunk or chunk * steps > ROWS):
        return f"a chunk holds 16 or more tokens and at most {ROWS} micro-steps, not {chunk} tokens"
    chunks = q.shape[1] // (chunk or default_chunk(steps, stride))
    return hopper.unavailable(q.shape[0] * q.shape[2], chunks)


def forward(q, k, v, beta, g, state, run, *, scale, chunk, stride):
    """Outputs, final state and the states at the start of all strides, as in ``backends.py``."""
    sizes, length = sizes_of(q, k, v, scale, chunk, stride), q.shape[1]
    q, k, v = (micro_steps(sizes, x) for x in (q, k, v))
    factors = factors_of(sizes, beta, g, run)
    prepared = prepare(sizes, q, k, factors)
    states = jnp.swapaxes(state, -1, -2)[:, :, None]
    if sizes.segments > 1:
        added, transitions = _transitions(sizes, k, v, prepared["inverse"], factors)
        states = enter_segments(_apply, states[:, :, 0], transitions, added)
    results = _forward(sizes, q, k, v, prepared, factors, states)
    final = jnp.swapaxes(results["final"][:, :, -1], -1, -2)
    return results["o"][:, :length], final, results["starts"]


def backward(q, k, v, beta, g, run, starts, final, do, dfinal, *, scale, chunk, stride):
    """Gradients of the inputs and of the initial state, as in ``backends.py``."""
    del final
    sizes, length = sizes_of(q, k, v, scale, chunk, stride), q.shape[1]
    q, k, v, do = (micro_steps(sizes, x) for x in (q, k, v, do.astype(q.dtype)))
    factors = factors_of(sizes, beta, g, run)
    prepared = prepare(sizes, q, k, factors, keep_m=True)
    replayed = _replay(sizes, k, v, prepared["inverse"], factors, starts)
    dstates = jnp.swapaxes(dfinal.astype(jnp.float32), -1, -2)[:, :, None]
    if sizes.segments > 1:
        transitions = _transitions(sizes, k, v, prepared["inverse"], factors, values=False)[1]
        nothing = jnp.zeros(_states(sizes, sizes.value).shape, jnp.float32)
        added = _backward(sizes, q, k, do, prepared, factors, nothing, keep=False)["final"]
        transitions = jnp.swapaxes(transitions, -1, -2)
        dstates = enter_segments(_apply, dstates[:, :, 0], transitions, added, reverse=True)
    results = _backward(sizes, q, k, do, prepared, factors, dstates)
    e = results["e"].reshape(sizes.batch, sizes.tokens, sizes.steps, sizes.heads, sizes.value)
    passed = replayed["u"], replayed["states"], results["e"], results["dstates"]
    new = gradients(sizes, q, k, do, prepared["m"], factors, *passed)

    # What is left is small or elementwise.
    pad = ((0, 0), (0, sizes.tokens - length), (0, 0), (0, 0))
    steps = jnp.pad(beta.astype(jnp.float32), pad)
    e = e.astype(jnp.float32)
    dbeta = jnp.sum(e * v.reshape(e.shape).astype(jnp.float32), axis=-1)
    dvalue = per_chunk(sizes, steps * dbeta)
    rest, dread, dend = jnp.moveaxis(jnp.sum(new["sums"], axis=3), 3, 0)
    dbeta += per_token(sizes, rest[..., : sizes.micro], sizes.steps)
    dsum = dread[..., : sizes.chunk]
    dsum = dsum - jnp.sum(dvalue.reshape(*dsum.shape, sizes.steps), axis=-1)
    dlog = jax.lax.cumsum(dsum, axis=3, reverse=True) + jnp.sum(dend, axis=3, keepdims=True)
    darrays = (
        new["dq"],
        new["dk"].reshape(sizes.batch, sizes.tokens, sizes.steps, sizes.heads, sizes.key),
        (steps[..., None] * e).astype(v.dtype),
        dbeta.astype(beta.dtype),
        None if g is None else per_token(sizes, dlog, 1)[:, :, 0].astype(g.dtype),
    )
    dstate = jnp.swapaxes(results["final"][:, :, 0], -1, -2)
    return *(None if x is None else x[:, :length] for x in darrays), dstate


_apply = functools.partial(jnp.matmul, precision="highest")  # a transition on transposed states


def _forward(sizes: Sizes, q, k, v, prepared, factors, states):
    """o [B, T, H, V], the states at the start of all strides, and those leaving the segments."""
    chunk = lambda place, n: place["segment"] * sizes.chunks_per_segment + n

    def step(place, n, refs, state):
        row_, head, values = place["row"], place["head"], block(place)

        @pl.when(jax.lax.rem(n, sizes.chunks_per_stride) == 0)
        def _():
            stride = jax.lax.div(chunk(place, n), sizes.chunks_per_stride)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store_transposed(refs["start"], state)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs["start"], refs["starts"].at[stride, row_, head, :, values])

        rounded = state.astype(q.dtype)
        u = _pseudo_values(refs, rounded, load_transposed(refs["v"]).astype(jnp.float32))
        o = _times(product(rounded, refs["q"].T), refs, QUERY_ENTER)
        o = product(u.astype(q.dtype), refs["scores"].T, o)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store_transposed(refs["o_tile"], o.astype(q.dtype))
        plgpu.commit_smem()
        tokens = pl.ds(chunk(place, n) * sizes.chunk, sizes.chunk)
        plgpu.copy_smem_to_gmem(refs["o_tile"], refs["o"].at[row_, tokens, head, values])
        return _next_state(refs, u, state)

    strides = sizes.tokens // sizes.stride
    o = (sizes.batch, sizes.tokens, sizes.heads, sizes.value)
    return hopper.through_tiles(
        "delta_product_forward",
        _segments(sizes, sizes.value),
        sizes.chunks_per_segment,
        {
            "q": of_tokens(q, sizes.chunk, chunk, rows=sizes.chunk),
            "k": of_tokens(k, sizes.micro, chunk),
            "v": of_tokens(v, sizes.micro, chunk, block),
            "inverse": of_chunk(prepared["inverse"], chunk),
            "scores": of_chunk(prepared["scores"], chunk),
            "rows": of_chunk(factors, chunk),
        },
        {"states": states},
        {
            "o": jax.ShapeDtypeStruct(o, q.dtype),
            "starts": float32(strides, sizes.batch, sizes.heads, sizes.key, sizes.value),
            "final": _states(sizes, sizes.value),
        },
        {
            "o_tile": tile(sizes.chunk, ROWS),
            "start": vectors(sizes.key, ROWS),
            **state_memory(sizes.key),
        },
        *(read_state, step, write_state),
    )


def _transitions(sizes: Sizes, k, v, inverse, factors, values: bool = True):
    """What segments make of no state, [B, H, Z, V, K], and of the identity, [B, H, Z, K, K].

    They are V + K rows of one transposed state; without ``values``, only the last K.
    """
    chunk = lambda place, n: place["segment"] * sizes.chunks_per_segment + n
    blocks = sizes.value // ROWS
    skipped = 0 if values else blocks
    number = lambda place: place["block"] + skipped
    some = lambda place: pl.ds(jax.lax.min(number(place), blocks - 1) * ROWS, ROWS)

    def first(place, refs):
        del refs
        shape = (ROWS, sizes.key)
        diagonal = index(shape, 0) + (number(place) - blocks) * ROWS
        return jnp.where(index(shape, 1) == diagonal, 1.0, 0.0)

    def step(place, n, refs, state):
        del n
        with_values = (number(place) < blocks).astype(jnp.float32)
        v = load_transposed(refs["v"]).astype(jnp.float32) * with_values
        return _next_state(refs, _pseudo_values(refs, state.astype(k.dtype), v), state)

    rows = sizes.value + sizes.key - skipped * ROWS
    final = hopper.through_tiles(
        "delta_product_transitions",
        _segments(sizes, rows),
        sizes.chunks_per_segment,
        {
            "k": of_tokens(k, sizes.micro, chunk),
            "v": of_tokens(v, sizes.micro, chunk, some),
            "inverse": of_chunk(inverse, chunk),
            "rows": of_chunk(factors, chunk),
        },
        {},
        {"final": _states(sizes, rows)},
        state_memory(sizes.key),
        *(first, step, write_state),
    )["final"]
    return final[..., : -sizes.key, :], final[..., -sizes.key :, :]


def _replay(sizes: Sizes, k, v, inverse, factors, starts):
    """u [B, T * N, H, V], and the states entering the chunks, [B, H, X, V, K], rounded."""
    chunk = lambda place, n: place["stride"] * sizes.chunks_per_stride + n

    def first(place, refs):
        at = place["stride"], place["row"], place["head"], slice(None), block(place)
        plgpu.copy_gmem_to_smem(refs["starts"].at[at], refs["start"], refs["state_ready"])
        plgpu.barrier_wait(refs["state_ready"])
        return load_transposed(refs["start"])

    def step(place, n, refs, state):
        row_, head, values = place["row"], place["head"], block(place)
        rounded = state.astype(k.dtype)
        u = _pseudo_values(refs, rounded, load_transposed(refs["v"]).astype(jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs["state_tile"][...] = rounded
        store_transposed(refs["u_tile"], u.astype(k.dtype))
        plgpu.commit_smem()
        to = refs["states"].at[row_, head, chunk(place, n), values]
        plgpu.copy_smem_to_gmem(refs["state_tile"], to)
        micro = pl.ds(chunk(place, n) * sizes.micro, sizes.micro)
        written = refs["u_tile"].at[pl.ds(0, sizes.micro)]
        plgpu.copy_smem_to_gmem(written, refs["u"].at[row_, micro, head, values])
        return _next_state(refs, u, state)

    grid = {"row": sizes.batch, "head": sizes.heads, "stride": starts.shape[0]}
    return hopper.through_tiles(
        "delta_product_replay",
        {**grid, "block": sizes.value // ROWS},
        sizes.chunks_per_stride,
        {
            "k": of_tokens(k, sizes.micro, chunk),
            "v": of_tokens(v, sizes.micro, chunk, block),
            "inverse": of_chunk(inverse, chunk),
            "rows": of_chunk(factors, chunk),
        },
        {"starts": starts},
        {
            "u": jax.ShapeDtypeStruct(v.shape, v.dtype),
            "states": chunks_like(sizes, v, sizes.value, sizes.key),
        },
        {
            "u_tile": tile(*SQUARE),
            "state_tile": tile(ROWS, sizes.key),
            "start": vectors(sizes.key, ROWS),
            "state_ready": plgpu.Barrier(),
        },
        *(first, step, lambda place, refs, state: None),
    )


def _backward(sizes: Sizes, q, k, do, prepared, factors, dstates, keep: bool = True):
    """The cotangents of the states entering the segments, [B, H, Z, V, K], and, if they are kept,
    e [B, T * N, H, V] and the cotangents of the states leaving the chunks, [B, H, X, V, K]."""
    last = sizes.chunks_per_segment - 1
    chunk = lambda place, n: place["segment"] * sizes.chunks_per_segment + last - n

    def step(place, n, refs, dstate):
        row_, head, values = place["row"], place["head"], block(place)
        rounded = dstate.astype(q.dtype)
        du = _times(product(rounded, refs["k"].T), refs, LEAVE)
        du = product(refs["do"].T, refs["scores"], du)
        e = product(du.astype(q.dtype), refs["inverse"])
        if keep:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs["dstate_tile"][...] = rounded
            store_transposed(refs["e_tile"], e.astype(q.dtype))
            plgpu.commit_smem()
            to = refs["dstates"].at[row_, head, chunk(place, n), values]
            plgpu.copy_smem_to_gmem(refs["dstate_tile"], to)
            micro = pl.ds(chunk(place, n) * sizes.micro, sizes.micro)
            written = refs["e_tile"].at[pl.ds(0, sizes.micro)]
            plgpu.copy_smem_to_gmem(written, refs["e"].at[row_, micro, head, values])
        read = _times(load_transposed(refs["do"]).astype(jnp.float32), refs, QUERY_ENTER)
        held = _times(_times(e, refs, BETA), refs, ENTER) * -1.0
        dstate = product(read.astype(q.dtype), refs["q"], dstate * refs["rows"][ACROSS, 0])
        return product(held.astype(q.dtype), refs["k"], dstate)

    outputs = {"final": _states(sizes, sizes.value)}
    scratch = state_memory(sizes.key)
    if keep:
        outputs["e"] = jax.ShapeDtypeStruct((*k.shape[:3], sizes.value), k.dtype)
        outputs["dstates"] = chunks_like(sizes, k, sizes.value, sizes.key)
        scratch |= {"e_tile": tile(*SQUARE), "dstate_tile": tile(ROWS, sizes.key)}
    return hopper.through_tiles(
        "delta_product_backward",
        _segments(sizes, sizes.value),
        sizes.chunks_per_segment,
        {
            "q": of_tokens(q, sizes.chunk, chunk),
            "k": of_tokens(k, sizes.micro, chunk),
            "do": of_tokens(do, sizes.chunk, chunk, block),
            "inverse": of_chunk(prepared["inverse"], chunk),
            "scores": of_chunk(prepared["scores"], chunk, rows=ROWS),
            "rows": of_chunk(factors, chunk),
        },
        *({"states": dstates}, outputs, scratch),
        *(read_state, step, write_state),
    )


# Parts of kernels.


def _pseudo_values(refs, rounded, v):
    """u = T (beta (v - e^G k H)), transposed: [64 values, 64 micro-steps]."""
    error = v - _times(product(rounded, refs["k"].T), refs, ENTER)
    return product(_times(error, refs, BETA).astype(rounded.dtype), refs["inverse"].T)


def _next_state(refs, u, state):
    left = _times(u, refs, LEAVE).astype(refs["k"].dtype)
    return product(left, refs["k"], state * refs["rows"][ACROSS, 0])


def _times(x, refs, factor: int):
    """Micro-steps or tokens (columns) times their factors."""
    return x * by_row(row(refs["rows"].at[factor, pl.ds(0, x.shape[1])]), x.shape)


def _states(sizes: Sizes, rows: int) -> jax.ShapeDtypeStruct:
    """The transposed states of the segments."""
    return float32(sizes.batch, sizes.heads, sizes.segments, rows, sizes.key)


def _segments(sizes: Sizes, rows: int) -> dict[str, int]:
    """The axes of a kernel whose programs go through a segment with 64 rows of its state."""
    grid = {"row": sizes.batch, "head": sizes.heads, "segment": sizes.segments}
    return {**grid, "block": rows // ROWS}
