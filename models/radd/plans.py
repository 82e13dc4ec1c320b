"""Which positions of a row are unmasked together, drawn before the network is asked.

Dimensions: R requests, T tokens, E events of a row, N steps.

When a position is unmasked does not depend on the network, so it can be drawn first. What is left
of a sampler's many steps is the events of each row: the steps in which something of it changes.
"""

from typing import NamedTuple

import jax
from jax import core
import jax.numpy as jnp
import numpy as np

from . import draws

PLAN = 0xFFFFFFFF  # folded into a row's key for its plan; its events fold in 0, 1, ...
ORDERS = ("forward", "backward", "random")


class Plan(NamedTuple):
    """Events of all requests.

    Attributes:
      rank: [R, T] int32, the event of its row that unmasks a position, from 0; -1 if it is given.
      events: [R] int32, how many there are.
    """

    rank: jax.Array
    events: jax.Array


def diffusion_plan(key: jax.Array, free_RT: jax.Array, cdf_N: np.ndarray) -> Plan:
    """The events of a sampler of N steps.

    Args:
      key: one key, or one per request; the same may serve for drawing the tokens.
      free_RT: [R, T] bool, what is to be sampled.
      cdf_N: [N] on the host, the probability that a position is unmasked up to each step
        (``rates.step_probabilities``). Steps are drawn to 2^-32, in integers.

    Raises:
      ValueError: if cdf_N does not rise to 1, or for a key of another shape.
    """
    cdf_N = np.asarray(cdf_N, np.float64)
    if cdf_N.ndim != 1 or not len(cdf_N) or cdf_N[-1] != 1 or np.any(np.diff(cdf_N) < 0):
        raise ValueError("the cumulative probabilities of steps must rise to 1")
    if cdf_N[0] < 0:
        raise ValueError("the cumulative probabilities of steps must not be negative")
    limits = np.minimum(np.floor(cdf_N[:-1] * 2.0**32), 2**32 - 1).astype(np.uint32)
    return plan_of_steps(
        jnp.searchsorted(jnp.asarray(limits), _bits(key, free_RT), "right"), free_RT
    )


def plan_of_steps(step_RT: jax.Array, free_RT: jax.Array) -> Plan:
    """The events of given steps: [R, T] integers, whatever they are where a position is given."""
    free_RT, step_RT = jnp.asarray(free_RT), jnp.asarray(step_RT).astype(jnp.int32)
    step_RT = jnp.where(free_RT, step_RT, jnp.iinfo(jnp.int32).max)
    order_RT = jnp.argsort(step_RT, axis=1)
    sorted_RT = jnp.take_along_axis(step_RT, order_RT, axis=1)
    new_RT = jnp.diff(sorted_RT, axis=1) != 0
    later_RT = jnp.cumsum(new_RT, axis=1, dtype=jnp.int32)
    rank_RT = jnp.concatenate(
        [jnp.zeros_like(later_RT, shape=(len(later_RT), 1)), later_RT], axis=1
    )
    return _plan(_scatter(order_RT, rank_RT), free_RT)


def order_plan(order, free_RT: jax.Array, key: jax.Array | None = None) -> Plan:
    """One position for each event, in an order that skips what is given.

    Args:
      order: "forward", "backward", "random" (for each row its own), or [T] or [R, T] positions in
        the order they are visited.
      free_RT: [R, T] bool.
      key: for "random", as in :func:`diffusion_plan`.

    Raises:
      ValueError: for an unknown order, one that does not visit each position once, or no key.
    """
    rows, tokens = free_RT.shape
    if isinstance(order, str):
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        if order == "random":
            if key is None:
                raise ValueError("a random order needs a key")
            order = jnp.argsort(_bits(key, free_RT), axis=1)
        else:
            order = np.arange(tokens)[:: 1 if order == "forward" else -1]
    if order.shape not in ((tokens,), (rows, tokens)):
        raise ValueError(f"order must be {(tokens,)} or {(rows, tokens)}, got {order.shape}")
    if not isinstance(order, core.Tracer):
        if np.any(np.sort(order, axis=-1) != np.broadcast_to(np.arange(tokens), order.shape)):
            raise ValueError("an order must visit each position once")
    order_RT = jnp.broadcast_to(jnp.asarray(order).astype(jnp.int32), (rows, tokens))
    visited_RT = jnp.take_along_axis(jnp.asarray(free_RT), order_RT, axis=1)
    rank_RT = jnp.cumsum(visited_RT, axis=1, dtype=jnp.int32) - 1
    return _plan(_scatter(order_RT, rank_RT), free_RT)


def first_hitting_plan(key: jax.Array, free_RT: jax.Array) -> tuple[Plan, jax.Array]:
    """A random order, and the times of its events (Zheng et al. 2025): the limit of many steps.

    With j masks left, the next is unmasked at t u^(1 / j), beginning with t = 1; masks so last
    until a time that is uniform. Times do not matter to a network that does not see them.

    Returns:
      the plan, and [R, T] float32 times, falling; 0 from a row's last event on.
    """
    plan = order_plan("random", free_RT, key)
    keys_R = draws.row_keys(key, len(free_RT))
    keys_R = jax.vmap(jax.random.fold_in, (0, None))(keys_R, jnp.uint32(PLAN - 1))
    tokens = free_RT.shape[1]
    exponential = lambda key: draws.exponential(key, (tokens,), jnp.float32)
    left_RT = plan.events[:, None] - jnp.arange(tokens, dtype=jnp.int32)[None]
    each_RT = jax.vmap(exponential)(keys_R) / jnp.maximum(left_RT, 1).astype(jnp.float32)
    times_RT = jnp.exp(-jnp.cumsum(each_RT, axis=1))
    return plan, jnp.where(left_RT > 0, times_RT, 0)


def _bits(key, free_RT: jax.Array) -> jax.Array:
    """[R, T] uint32 of the rows' keys."""
    rows, tokens = free_RT.shape
    keys_R = jax.vmap(jax.random.fold_in, (0, None))(draws.row_keys(key, rows), jnp.uint32(PLAN))
    return jax.vmap(lambda key: jax.random.bits(key, (tokens,), jnp.uint32))(keys_R)


def _plan(rank_RT: jax.Array, free_RT: jax.Array) -> Plan:
    rank_RT = jnp.where(free_RT, rank_RT, -1)
    return Plan(rank_RT, jnp.max(rank_RT, axis=1) + 1)


def _scatter(order_RT: jax.Array, values_RT: jax.Array) -> jax.Array:
    """out[r, order[r, i]] = values[r, i]."""
    rows_R1 = jnp.arange(len(order_RT))[:, None]
    return jnp.zeros_like(values_RT).at[rows_R1, order_RT].set(values_RT)
