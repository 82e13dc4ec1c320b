"""Rows longer than the network's context, block by block.

Dimensions: R requests, T tokens of the context, K new tokens of a block, G blocks.

Each window keeps the last T - K tokens and samples K after them, in any order within the block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..generation import Sampling
from . import draws, events
from .network import Network, check_ids
from .plans import Plan


def extend(
    network: Network,
    key: jax.Array,
    start_RT: jax.Array,
    make_plan: Callable[[jax.Array, jax.Array], Plan],
    sampling: Sampling | None = None,
    slots: int | None = None,
    *,
    block: int,
    blocks: int,
) -> events.Sampled:
    """Fills the masks of the first window, then appends ``blocks`` times ``block`` tokens.

    Args:
      network, key, sampling, slots: as in :func:`events.sample`.
      start_RT: [R, T] int32, where T is the context; V where a token is to be sampled.
      make_plan: (keys [R], free [R, T]) -> plan of one window; such as
        ``lambda keys, free: diffusion_plan(keys, free, cdf)``.
      block: K, in [1, T].
      blocks: G; 0 for the first window alone.

    Returns:
      tokens [R, T + G K], and the evaluations of all windows, which are turns of one loop.

    Raises:
      ValueError: as in :func:`events.sample`, and for block or blocks out of range.
    """
    rows, tokens = start_RT.shape
    if not 1 <= block <= tokens:
        raise ValueError(f"block must be in [1, {tokens}], the context; got {block}")
    if blocks < 0:
        raise ValueError(f"blocks must not be negative, got {blocks}")
    vocab = network.vocab_size
    keys_R = draws.row_keys(key, rows)

    def window(ids_RT, number):
        """The zeroth is the start, each other the one before moved on by a block."""
        moved_RT = jnp.pad(ids_RT[:, block:], ((0, 0), (0, block)), constant_values=vocab)
        ids_RT = jnp.where(number > 0, moved_RT, ids_RT)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_R, number)
        plan = make_plan(keys, ids_RT == vocab)
        found = events.sample(network, keys, ids_RT, plan, sampling, slots)
        return found.tokens, found

    check_ids(network, start_RT)
    numbers_G = jnp.arange(blocks + 1, dtype=jnp.uint32)
    _, found = jax.lax.scan(window, jnp.asarray(start_RT), numbers_G)
    new_RGK = found.tokens[1:, :, -block:].swapaxes(0, 1)
    return events.Sampled(
        jnp.concatenate([found.tokens[0], new_RGK.reshape(rows, blocks * block)], axis=1),
        jnp.sum(found.evaluations, axis=0, dtype=jnp.int32),
        jnp.sum(found.batch_evaluations, dtype=jnp.int32),
    )
