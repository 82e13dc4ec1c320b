"""How the TPU kernels of DeltaProduct see their arrays: sizes, layouts, and the call.

Dimensions as in ``pallas_tpu.py``: X windows of M chunks of C tokens, Y groups of h heads. A group
is r rows of the batch times h / r heads; the groups of the same rows follow one another.

The kernels read q, k, v as [B, N, H, T, D]: the tokens of a head in one place. So the compiler
lets a projection write its [B, T, N, H, D], as products of matrices fill tiles of tokens and
channels, and where a tile goes is up to it; the elementwise operations between keep the order.
Rows stay outermost because it computes and exchanges the projections of some rows at a time.
"""

import functools
import math
from typing import NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..per_device import varying

MICRO_STEPS = 128  # of a chunk at most: rows of the matrix unit
GROUP = 8  # heads per grid step at most, if N = 1 and widths are at most 128
VMEM = 56 << 20  # bytes: below the 64 MiB of a TPU v5p core


class Sizes(NamedTuple):
    """What is static about a call."""

    batch: int  # B
    tokens: int  # T
    steps: int  # N
    heads: int  # H
    chunk: int  # C
    chunks: int  # M
    windows: int  # X
    group: int  # h
    operand: jnp.dtype  # of the factors of matrix products
    scale: float
    has_decay: bool
    has_run: bool

    @property
    def micro(self) -> int:  # L
        return self.chunk * self.steps

    @property
    def rows(self) -> int:  # r
        return self.group // self.heads_of_row

    @property
    def heads_of_row(self) -> int:  # of a group: h / r
        return math.gcd(self.group, self.heads)  # what is left divides the rows


def default_chunk(steps: int, stride: int) -> int:
    return min(stride, 1 << (MICRO_STEPS // steps).bit_length() - 1)


def sizes_of(q, k, v, g, run, scale, chunk, stride) -> Sizes:
    batch, tokens, steps, heads = k.shape[:4]
    chunk = default_chunk(steps, stride) if chunk is None else chunk
    rounded = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    # More than one step means fewer tokens per chunk, and room for twice as many heads.
    limit = GROUP * min(steps, 2) * 128 // max(128, q.shape[-1], v.shape[-1])
    return Sizes(
        batch=batch,
        tokens=tokens,
        steps=steps,
        heads=heads,
        chunk=chunk,
        chunks=stride // chunk,
        windows=pl.cdiv(tokens, stride),
        group=max(h for h in range(1, limit + 1) if batch * heads % h == 0),
        operand=jnp.dtype(jnp.bfloat16 if rounded else jnp.float32),
        scale=scale,
        has_decay=g is not None,
        has_run=run is not None,
    )


def _pad(sizes: Sizes, x, mode="constant"):
    """Pads axis 1 to whole windows, with tokens that do nothing."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, sizes.windows * sizes.chunks * sizes.chunk - sizes.tokens)
    return jnp.pad(x, padding, mode=mode)


def heads_first(sizes: Sizes, x):
    """[B, T, (N,) H, D] -> [B, N or 1, H, X * M * C, D] in the dtype of factors."""
    x = x[:, :, None] if x.ndim == 4 else x
    return _pad(sizes, x.astype(sizes.operand)).transpose(0, 2, 3, 1, 4)


def tokens_first(sizes: Sizes, x):
    """[B, N, H, X * M * C, D] -> [B, T, N, H, D]."""
    return x.transpose(0, 3, 1, 2, 4)[:, : sizes.tokens]


def factors_of(sizes: Sizes, beta, g, run):
    """beta, G, run and entering run (those in use) as rows: [Y, X * M, rows * h, L]."""
    rows = [_chunk_rows(sizes, _pad(sizes, beta))]
    if g is not None:  # e^-104 is 0 in float32: more would only cost G its digits
        g = _chunk_rows(sizes, _pad(sizes, g[:, :, None]))
        rows.append(jnp.cumsum(jnp.maximum(g, -104), axis=-1))
    if run is not None:
        run = jnp.broadcast_to(run[..., None, None], (*run.shape, 1, sizes.heads))
        run = _pad(sizes, run, mode="edge")
        entering_run = jnp.pad(run[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        run, entering_run = (_chunk_rows(sizes, x) for x in (run, entering_run))
        rows += [run, jnp.broadcast_to(entering_run[..., :1], run.shape)]
    rows = [jnp.tile(x, sizes.micro // x.shape[-1]) for x in rows]
    return jnp.concatenate(rows, axis=-2)


def _chunk_rows(sizes: Sizes, x):
    """[B, T, N or 1, H] -> [Y, X * M, h, C * N] in float32."""
    batch, tokens, steps, heads = x.shape
    chunks, r, across = tokens // sizes.chunk, sizes.rows, sizes.heads_of_row
    x = x.astype(jnp.float32)
    x = x.reshape(batch // r, r, chunks, sizes.chunk, steps, heads // across, across)
    x = x.transpose(0, 5, 2, 1, 6, 4, 3)
    return x.reshape(-1, chunks, sizes.group, steps * sizes.chunk)


def steps_last(sizes: Sizes, x, steps: int):
    """The inverse: [Y, X * M, h, C * N] -> [B, T, N, H]."""
    chunks, r, across = x.shape[1], sizes.rows, sizes.heads_of_row
    x = x.reshape(sizes.batch // r, -1, chunks, r, across, steps, sizes.chunk)
    x = x.transpose(0, 3, 2, 6, 5, 1, 4)
    x = x.reshape(sizes.batch, chunks * sizes.chunk, steps, sizes.heads)
    return x[:, : sizes.tokens]


def call(kernel, sizes: Sizes, window, inputs: dict, outputs: dict):
    """Runs a kernel on the grid (group of heads, window).

    ``inputs`` and ``outputs`` list arrays (or their shapes) by kind, in the kernel's order;
    ``window`` maps the second index of the grid to the window it works on.
    """
    r, across = sizes.rows, sizes.heads_of_row
    place = lambda y: divmod(y, sizes.heads // across)  # of a group among rows and heads

    index = {
        "tokens": lambda y, x: (place(y)[0], 0, place(y)[1], window(x), 0),
        "chunks": lambda y, x: (y, window(x), 0, 0),
        "states": lambda y, x: (*place(y), 0, 0),
        "starts": lambda y, x: (window(x), *place(y), 0, 0),
    }
    block = {
        "tokens": lambda s: (r, s[1], across, sizes.chunks * sizes.chunk, s[4]),
        "chunks": lambda s: (None, sizes.chunks, *s[2:]),
        "states": lambda s: (r, across, *s[2:]),
        "starts": lambda s: (None, r, across, *s[3:]),
    }
    flat = lambda arrays: [(kind, x) for kind in arrays for x in arrays[kind]]
    specs = lambda arrays: [
        pl.BlockSpec(block[kind](x.shape), index[kind]) for kind, x in flat(arrays)
    ]
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        grid=(sizes.batch * sizes.heads // sizes.group, sizes.windows),
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        out_shape=varying([x for _, x in flat(outputs)], [x for _, x in flat(inputs)]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        name="delta_product" + kernel.__name__.removesuffix("_kernel"),
    )(*(x for _, x in flat(inputs)))
