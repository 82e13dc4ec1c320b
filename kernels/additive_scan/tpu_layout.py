"""How the TPU kernels of the additive scan see their arrays: layouts and blocks.

Dimensions: N groups of G heads, of any rows of the batch; T tokens, C of a chunk, X chunks.
"""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from .tpu_tree import ROWS

PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=56 * 2**20
)


class Tokens(NamedTuple):
    """Arrays of all heads, N groups of G; or their blocks, or references to these."""

    q: Any  # [N, G, T, K]
    k: Any
    v: Any  # [N, G, T, V]
    f: Any
    run: Any  # [N, X, G, C], resets since the token before the chunk


def _group(rows: int) -> int:
    return next(n for n in range(ROWS, 0, -1) if rows % n == 0)


def tokens_of(q, k, v, f, run, chunk: int) -> Tokens:
    if run is not None:
        batch, heads = q.shape[0], q.shape[2]
        run = jnp.pad(run, ((0, 0), (0, -run.shape[1] % chunk)), mode="edge")
        run = run.reshape(batch, -1, chunk)
        run -= jnp.pad(run[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
        run = jnp.broadcast_to(run[:, None], (batch, heads, *run.shape[1:]))
        run = run.reshape(-1, _group(batch * heads), *run.shape[2:]).swapaxes(1, 2)
    return Tokens(
        q=heads_first(q, chunk),
        k=heads_first(k, chunk, constant_values=-jnp.inf),
        v=heads_first(v, chunk),
        f=None if f is None else heads_first(f, chunk),
        run=run,
    )


def heads_first(x_BTHD, chunk: int, **padding) -> jax.Array:
    """[B, T, H, D] -> [N, G, T, D] with whole chunks."""
    batch, tokens, heads, width = x_BTHD.shape
    x = jnp.pad(x_BTHD, ((0, 0), (0, -tokens % chunk), (0, 0), (0, 0)), **padding)
    return jnp.swapaxes(x, 1, 2).reshape(-1, _group(batch * heads), x.shape[1], width)


def tokens_first(x_NGTD, like) -> jax.Array:
    """Back to the batch, tokens and heads of ``like``."""
    batch, tokens, heads, _ = like.shape
    x = x_NGTD.reshape(batch, heads, *x_NGTD.shape[2:])
    return jnp.swapaxes(x, 1, 2)[:, :tokens]


def row_spec(*dims: int) -> pl.BlockSpec:
    """One block for all chunks of a row."""
    return pl.BlockSpec((1, *dims), lambda n, x: (n, *(0 for _ in dims)))


def start_spec(order, *dims: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, *dims), lambda n, x: (order(x), n, *(0 for _ in dims)))


def chunk_spec(x_NGTD, chunk: int, order) -> pl.BlockSpec:
    block = 1, x_NGTD.shape[1], chunk, x_NGTD.shape[3]
    return pl.BlockSpec(block, lambda n, x: (n, 0, order(x), 0))


def token_specs(tokens: Tokens, chunk: int, order) -> Tokens:
    q, k, v, f = (None if x is None else chunk_spec(x, chunk, order) for x in tokens[:4])
    run = None
    if tokens.run is not None:
        block = 1, 1, *tokens.run.shape[2:]
        run = pl.BlockSpec(block, lambda n, x: (n, order(x), 0, 0))
    return Tokens(q, k, v, f, run)
