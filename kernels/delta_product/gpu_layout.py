"""How the Hopper kernels of DeltaProduct see their arrays: sizes, chunks, factors, segments.

Dimensions: B rows of T tokens, H heads, N steps; X chunks of C tokens, which are L = C * N
micro-steps, of which a matrix has room for 64; Z segments of a row that run side by side.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import hopper
from ..hopper_scans import segments_of
from ..rows import whole_strides

# Rows of the factors of a chunk. The first one is the same everywhere, the next five have an entry
# per micro-step, the last three one per token.
ACROSS, LOG, RUN, BETA, ENTER, LEAVE, QUERY_LOG, QUERY_RUN, QUERY_ENTER = range(9)
LOG2_E = math.log2(math.e)


class Sizes(NamedTuple):
    """What is static about a call."""

    batch: int  # B
    tokens: int  # T, padded to whole strides
    steps: int  # N
    heads: int  # H
    key: int  # K
    value: int  # V
    chunk: int  # C
    stride: int  # tokens between two states that are kept
    segments: int  # Z
    scale: float

    @property
    def micro(self) -> int:  # L
        return self.chunk * self.steps

    @property
    def chunks(self) -> int:  # X
        return self.tokens // self.chunk

    @property
    def chunks_per_stride(self) -> int:
        return self.stride // self.chunk

    @property
    def chunks_per_segment(self) -> int:
        return self.chunks // self.segments


def default_chunk(steps: int, stride: int) -> int:
    """The most tokens, a power of two, whose micro-steps are rows of one matrix."""
    return min(stride, 1 << (hopper.ROWS // steps).bit_length() - 1)


def sizes_of(q, k, v, scale, chunk, stride) -> Sizes:
    batch, tokens, steps, heads = k.shape[:4]
    chunk = default_chunk(steps, stride) if chunk is None else chunk
    strides = -(-tokens // stride)
    widths = (v.shape[-1], q.shape[-1])
    segments = segments_of(batch * heads, *widths, strides, hopper.processors())
    return Sizes(
        *(batch, strides * stride, steps, heads, q.shape[-1], v.shape[-1]),
        *(chunk, stride, segments, scale),
    )


def micro_steps(sizes: Sizes, x):
    """[B, T, N or 1, H, D] or [B, T, H, D] -> [B, T * N, H, D], T padded to whole strides."""
    x = whole_strides(x, sizes.stride)
    return x if x.ndim == 4 else x.reshape(sizes.batch, -1, *x.shape[3:])


def factors_of(sizes: Sizes, beta, g, run):
    """[B, H, X, 9, 64] float32: logarithms (base 2) of decay, runs, beta and factors."""
    pad = lambda x, **options: whole_strides(x, sizes.stride, **options)
    shape = (sizes.batch, sizes.heads, sizes.chunks, sizes.chunk)
    log = jnp.zeros(shape, jnp.float32)
    if g is not None:  # 2^-150 is 0 in float32: more would only cost the sums their digits
        log = jnp.cumsum(jnp.maximum(per_chunk(sizes, pad(g)) * LOG2_E, -150), axis=-1)
    relative = entering = jnp.zeros((sizes.batch, 1, sizes.chunks, sizes.chunk), jnp.float32)
    if run is not None:
        run = pad(run, mode="edge")
        before = jnp.pad(run[:, :-1], ((0, 0), (1, 0)))
        run, before = (x.reshape(sizes.batch, 1, -1, sizes.chunk) for x in (run, before))
        relative = (run - before[..., :1]).astype(jnp.float32)  # 0: that of the entering state
    one = lambda mask, x: jnp.where(mask, x, 0)
    enter = one(relative == entering, jnp.exp2(log))
    leave = one(relative == relative[..., -1:], jnp.exp2(log[..., -1:] - log))
    across = one(relative[..., -1:] == 0, jnp.exp2(log[..., -1:]))
    relative = jnp.broadcast_to(relative, shape)
    steps = lambda x: jnp.repeat(x, sizes.steps, axis=-1)
    beta = per_chunk(sizes, pad(beta))
    rows = [steps(log), steps(relative), beta, steps(enter), steps(leave)]
    rows += [log, relative, sizes.scale * enter]
    width = lambda x: ((0, 0),) * 3 + ((0, hopper.ROWS - x.shape[-1]),)
    rows = [jnp.pad(x, width(x)) for x in rows]
    return jnp.stack([jnp.broadcast_to(across, rows[0].shape), *rows], axis=-2)


def per_chunk(sizes: Sizes, x):
    """[B, T, H] or [B, T, N, H] -> [B, H, X, C * N] float32."""
    x = x.astype(jnp.float32).reshape(sizes.batch, sizes.chunks, -1, sizes.heads)
    return x.transpose(0, 3, 1, 2)


def per_token(sizes: Sizes, x, steps: int):
    """The inverse: [B, H, X, C * steps] -> [B, T, steps, H]."""
    return x.transpose(0, 2, 3, 1).reshape(sizes.batch, -1, steps, sizes.heads)


def chunks_like(sizes: Sizes, like, *shape: int) -> jax.ShapeDtypeStruct:
    """[B, H, X, ...] in the dtype of an array."""
    return jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.chunks, *shape), like.dtype)
