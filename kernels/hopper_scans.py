"""What the Hopper kernels of both scans share: their arrays, the state, and segments of rows.

Kernels run on the axes "row", "head" and "chunk" (all chunks side by side) or "segment" (one chunk
after the other), and "block", 64 of the values or keys. A state is kept transposed, [V, K].
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from . import hopper
from .hopper import ROWS, Read, load, pl, plgpu, tile, vectors

WIDTHS = (64, 128)  # of keys and values
SQUARE = (ROWS, ROWS)


def segments_of(rows: int, value: int, more: int, strides: int, processors: int) -> int:
    """Into how many segments rows are divided, so that they keep the processors busy.

    Every row and 64 of its values are a program that goes through the row's strides one after the
    other. Divided, there are more and shorter ones; but first there must be known what segments
    make of the state, which takes as many programs again, and some for ``more`` rows of a state;
    and to pass the state on from segment to segment takes about as long as two strides each.
    """

    def time(segments: int) -> int:
        passes = lambda width: -(-rows * segments * width // ROWS // processors)
        if segments == 1:
            return strides * passes(value)
        return strides // segments * (passes(value) + passes(value + more)) + 2 * segments

    return min((z for z in range(1, strides + 1) if strides % z == 0), key=time)


def enter_segments(apply, first, transitions, added, reverse: bool = False) -> jax.Array:
    """The states that segments begin with, from the first one's (or the last one's).

    Args:
      apply: (state, transition) -> state.
      first: [B, H, V, K]; transitions: [B, H, Z, ...]; added: [B, H, Z, V, K], what a segment
        leaves when it begins with nothing.

    Returns:
      [B, H, Z, V, K].
    """

    def body(state, segment):
        transition, new = segment
        return apply(state, transition) + new, state

    segments = tuple(jnp.moveaxis(x, 2, 0) for x in (transitions, added))
    return jnp.moveaxis(jax.lax.scan(body, first, segments, reverse=reverse)[1], 0, 2)


def of_tokens(array, count: int, chunk: Callable, columns=None, rows: int = ROWS) -> Read:
    """Chunks of [B, T, H, D]: so many rows, then rows of 0; all columns, or 64.

    Args:
      array: with tokens, or micro-steps.
      count: of them in a chunk.
      chunk: (place, n) -> its number.
      columns: place -> which 64; None for all.
      rows: of a tile.
    """
    some = columns or (lambda place: slice(None))
    at = lambda place, n: hopper.pl.ds(chunk(place, n) * count, count)
    index = lambda place, n: (place["row"], at(place, n), place["head"], some(place))
    memory = functools.partial(tile, dtype=array.dtype)
    return Read(array, memory, (rows, ROWS if columns else array.shape[-1]), index, count)


def of_chunk(array, chunk: Callable, first: int | None = None, rows: int | None = None) -> Read:
    """What [B, H, X, ., .] holds of a chunk: all or the first rows, then rows of 0."""
    memory = vectors if array.dtype == jnp.float32 else tile
    count, width = first or array.shape[3], array.shape[4]
    index = lambda place, n: (place["row"], place["head"], chunk(place, n), pl.ds(0, count))
    return Read(array, memory, (rows or count, width), index, count)


def block(place):
    """The 64 values or keys of a program."""
    return pl.ds(place["block"] * ROWS, ROWS)


def state_memory(key: int):
    """Shared memory for :func:`read_state` and :func:`write_state`."""
    return {"state_tile": vectors(ROWS, key), "state_ready": plgpu.Barrier()}


def read_state(place, refs) -> jax.Array:
    """64 rows of the state that enters a segment, from ``states`` [B, H, Z, V, K]."""
    at = place["row"], place["head"], place["segment"], block(place)
    plgpu.copy_gmem_to_smem(refs["states"].at[at], refs["state_tile"], refs["state_ready"])
    plgpu.barrier_wait(refs["state_ready"])
    return load(refs["state_tile"])


def write_state(place, refs, state) -> None:
    """And of the one that leaves it, to ``final``."""
    refs["state_tile"][...] = state
    plgpu.commit_smem()
    at = place["row"], place["head"], place["segment"], block(place)
    plgpu.copy_smem_to_gmem(refs["state_tile"], refs["final"].at[at])


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
