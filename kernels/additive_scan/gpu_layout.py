"""How the Hopper kernels of the additive scan see their arrays, and what needs no matrices.

Dimensions: B rows of T tokens, H heads, X chunks of a stride each.
"""

import math

import jax
import jax.numpy as jnp

from ..hopper import ROWS, row_major
from ..rows import whole_strides

LOG2_E = math.log2(math.e)
# Factors of a chunk's channels: r, exp(z_b - r), exp(r - z_e) and exp(z_b - z_e).
REFERENCE, OLD, END, ACROSS = range(4)
# And of its tokens: the run, and whether it is the one that enters or leaves the chunk.
RUN, ENTERED, ENDING = range(3)


def whole(q, k, v, f, run, stride: int):
    """Whole strides; a key of -inf is a token that is not there."""
    q, v, f = (whole_strides(x, stride) for x in (q, v, f))
    k = whole_strides(k, stride, constant_values=-jnp.inf)
    return q, k, v, f, whole_strides(run, stride, mode="edge")


def _runs(run, q, stride: int):
    """[B, X, stride] int32: 0 is the run that enters the chunk."""
    if run is None:
        run = jnp.zeros(q.shape[:2], jnp.int32)
    before = jnp.pad(run[:, :-1], ((0, 0), (1, 0)))
    run, before = (x.reshape(x.shape[0], -1, stride) for x in (run, before))
    return run - before[..., :1]


def tokens_of(run, q, stride: int) -> jax.Array:
    """Factors of tokens: [B, X, 3, 64] float32."""
    run = _runs(run, q, stride)
    rows = [x.astype(jnp.float32) for x in (run, run == 0, run == run[..., -1:])]
    return jnp.pad(jnp.stack(rows, axis=2), ((0, 0), (0, 0), (0, 0), (0, ROWS - stride)))


def normalisers(k, z, run, stride: int) -> tuple[jax.Array, jax.Array]:
    """z before all chunks and after the last, [B, H, X + 1, K], and factors [B, H, X, 4, K]."""
    run = _runs(run, k, stride)[..., None, None]
    k = k.astype(jnp.float32).reshape(k.shape[0], -1, stride, *k.shape[2:])
    ending = run == run[:, :, -1:]
    there = jnp.where(ending, k, -jnp.inf)
    highest = row_major(jnp.max(there, axis=2))
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    sums = row_major(jnp.sum(jnp.exp(there - highest[:, :, None]), axis=2))
    local = highest + jnp.log(sums)
    kept = jnp.broadcast_to(run[:, :, -1] == 0, local.shape)

    def join(left, right):
        (kept, z), (kept_here, here) = left, right
        return kept & kept_here, jnp.logaddexp(jnp.where(kept_here, z, -jnp.inf), here)

    start = lambda x, value: jnp.concatenate([value[:, None], x], axis=1)
    elements = (start(kept, jnp.zeros_like(z, dtype=bool)), start(local, z))
    z = jnp.moveaxis(jax.lax.associative_scan(join, elements, axis=1)[1], 1, 2)
    before, after = z[:, :, :-1], z[:, :, 1:]
    top = jnp.maximum(jnp.moveaxis(row_major(jnp.max(k, axis=2)), 1, 2), before)
    r = jnp.where(top == -jnp.inf, 0, top)
    exp = lambda x: jnp.where(after > -jnp.inf, jnp.exp(x), 0)
    across = jnp.where(jnp.moveaxis(kept, 1, 2), exp(before - after), 0)
    return z, jnp.stack([r, jnp.exp(before - r), exp(r - after), across], axis=-2)


def linear_scan(across, added, last) -> jax.Array:
    """r_x = across_x r_{x+1} + added_x from the last one: [B, H, X + 1, K]."""

    def join(later, earlier):
        (factor, r), (factor_here, here) = later, earlier
        return factor * factor_here, factor_here * r + here

    end = lambda x, value: jnp.concatenate([x, value[:, :, None]], axis=2)
    elements = (end(across, jnp.zeros_like(last)), end(added, last))
    return jax.lax.associative_scan(join, elements, axis=2, reverse=True)[1]
