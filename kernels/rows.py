"""What the chunked scans share: how rows of tokens are cut, and where states are cleared."""

from typing import Any

import jax
import jax.numpy as jnp


def power_of_two(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << (number - 1).bit_length()


def resets_so_far(reset_BT: jax.Array | None) -> jax.Array | None:
    """[B, T] int32: how often the state was cleared up to and with the token."""
    return None if reset_BT is None else jnp.cumsum(reset_BT.astype(jnp.int32), axis=1)


def whole_strides(x: Any, stride: int, **options) -> Any:
    """Pads axis 1 to a multiple of the stride, with zeros or as ``jnp.pad`` is told; or None."""
    if x is None:
        return None
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % stride)
    return jnp.pad(x, padding, **options)


def stride_starts(tokens: int, stride: int) -> jax.Array:
    """[X] int32: the first token of every stride."""
    return jnp.arange(0, tokens, stride, dtype=jnp.int32)


def resets_of_chunk(run_BT: jax.Array, t, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The resets so far of the tokens from t on, [B, chunk], and of the token before, [B, 1]."""
    before = jax.lax.dynamic_slice_in_dim(run_BT, jnp.maximum(t - 1, 0), 1, axis=1)
    here = jax.lax.dynamic_slice_in_dim(run_BT, t, chunk, axis=1)
    return here, jnp.where(t > 0, before, 0)
