"""The default sampler: one network call for each change of a row, and none between.

Dimensions: R requests, B slots, T tokens, C positions of an event, D hidden, V real tokens.

A loop over N steps calls the network although nothing has changed, or keeps its result; in a batch,
something has nearly always changed. Here a plan (plans.py) says beforehand which positions of a row
are unmasked together, and each turn of one loop makes the next event of every row in its batch,
whichever step that is. The law is that of the loop over steps. A row that is done gives its slot to
the next request. The head, the filters and the noise are computed for the positions of the event
alone, rounded up to a power of two.

A request's noise is a function of its key, the event and the position: it does not depend on other
requests, slots, or the rounding. Its tokens do not either, as far as a row's logits do not depend
on the shape of the batch; in float32 a product's last bit may, which matters in near ties alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..generation import Sampling
from . import draws
from .network import Network, check_ids, real_logits
from .plans import Plan, diffusion_plan, first_hitting_plan, order_plan, plan_of_steps

__all__ = [
    "Plan",
    "Sampled",
    "diffusion_plan",
    "first_hitting_plan",
    "order_plan",
    "plan_of_steps",
    "sample",
]

PIECE = 64  # most positions of a row that the head sees at once

# (hidden [B, T, D], ids [B, T], order [B, T], first [B]) -> order, first: the positions of a row's
# event are order[first], order[first + 1], ...
Choice = Callable[..., tuple[jax.Array, jax.Array]]


class Sampled(NamedTuple):
    """What :func:`sample` returns.

    Attributes:
      tokens: [R, T] int32.
      evaluations: [R] int32, calls of the network that a request took part in: its events.
      batch_evaluations: [] int32, calls for the batch.
    """

    tokens: jax.Array
    evaluations: jax.Array
    batch_evaluations: jax.Array


def sample(
    network: Network,
    key: jax.Array,
    start_RT: jax.Array,
    plan: Plan,
    sampling: Sampling | None = None,
    slots: int | None = None,
    *,
    uniforms_RTV: jax.Array | None = None,
    choose: Choice | None = None,
) -> Sampled:
    """Fills the masks of all requests.

    Args:
      network: what predicts; only ever called on ``slots`` rows.
      key: one key, request r then draws from ``fold_in(key, r)``; or one per request.
      start_RT: [R, T] int32: V where a token is to be sampled, other tokens stay. A row without
        masks costs nothing.
      plan: events of the free positions; masks outside the plan remain.
      sampling: how tokens are drawn; by default from the network's distribution.
      slots: rows of the batch, at most R, which is the default.
      uniforms_RTV: for tests, the published draw with these numbers instead of the key's.
      choose: which positions an event unmasks, if the network has a say (adaptive.py); their number
        is the plan's.

    Raises:
      ValueError: for tokens outside [0, V], slots < 1, or shapes that do not fit.
    """
    check_ids(network, start_RT)
    sampling = sampling or Sampling()
    draws.check_sampling(sampling)
    rows, tokens = start_RT.shape
    if plan.rank.shape != start_RT.shape or plan.events.shape != (rows,):
        raise ValueError(f"the plan is for {plan.rank.shape}, the start is {start_RT.shape}")
    slots = rows if slots is None else min(slots, rows)
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    keys_R = draws.row_keys(key, rows)
    order_RT, first_RE = _by_event(plan)
    # Longest first: short ones fill the gaps at the end. Those without events come last.
    queue_R = jnp.argsort(-plan.events).astype(jnp.int32)
    queued = jnp.sum(plan.events > 0, dtype=jnp.int32)
    sizes = _sizes(tokens)

    def event(tokens_RT, request_B, event_B, active_B):
        """All slots' next event."""
        ids_BT = tokens_RT[request_B]
        hidden_BTD = network.body(ids_BT)
        first_B, end_B = first_RE[request_B, event_B], first_RE[request_B, event_B + 1]
        count_B = jnp.where(active_B, end_B - first_B, 0)
        order_BT = order_RT[request_B]
        if choose is not None:
            order_BT, first_B = choose(hidden_BTD, ids_BT, order_BT, first_B)
        most = jnp.max(count_B)

        def piece(size: int, number, tokens_RT):
            offset_C = number * size + jnp.arange(size, dtype=jnp.int32)
            place_BC = jnp.minimum(first_B[:, None] + offset_C[None], tokens - 1)
            position_BC = jnp.take_along_axis(order_BT, place_BC, axis=1)
            hidden_BCD = jnp.take_along_axis(hidden_BTD, position_BC[..., None], axis=1)
            logits_BCV = real_logits(network, hidden_BCD)
            if uniforms_RTV is not None:
                noise_BCV = uniforms_RTV[request_B[:, None], position_BC]
                drawn_BC = draws.filtered_race(logits_BCV, noise_BCV, sampling)
            else:
                keys_BC = draws.position_keys(keys_R[request_B], event_B, position_BC)
                drawn_BC = draws.draw(keys_BC, logits_BCV, sampling)
            wanted_BC = offset_C[None] < count_B[:, None]
            to_BC = jnp.where(wanted_BC, position_BC, tokens)  # others fall out of the array
            return tokens_RT.at[request_B[:, None], to_BC].set(drawn_BC, mode="drop")

        def pieces(size: int):
            def run(tokens_RT):
                if size < PIECE:
                    return piece(size, jnp.int32(0), tokens_RT)
                step = lambda number, tokens_RT: piece(size, number, tokens_RT)
                return jax.lax.fori_loop(jnp.int32(0), -(-most // size), step, tokens_RT)

            return run

        bucket = jnp.sum(most > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)
        return jax.lax.switch(bucket, [pieces(size) for size in sizes], tokens_RT)

    def turn(carry):
        tokens_RT, place_B, event_B, waiting, turns = carry
        active_B = place_B < queued
        request_B = queue_R[jnp.minimum(place_B, rows - 1)]
        tokens_RT = event(tokens_RT, request_B, jnp.where(active_B, event_B, 0), active_B)
        event_B = event_B + 1
        done_B = active_B & (event_B >= plan.events[request_B])
        taken_B = jnp.cumsum(done_B, dtype=jnp.int32)
        place_B = jnp.where(done_B, waiting + taken_B - 1, place_B)
        event_B = jnp.where(done_B, 0, event_B)
        return tokens_RT, place_B, event_B, waiting + taken_B[-1], turns + 1

    carry = (
        start_RT,
        jnp.arange(slots, dtype=jnp.int32),
        jnp.zeros(slots, jnp.int32),
        jnp.int32(slots),
        jnp.int32(0),
    )
    end = jax.lax.while_loop(lambda carry: jnp.any(carry[1] < queued), turn, carry)
    return Sampled(end[0], plan.events, end[-1])


def _by_event(plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Positions sorted by event [R, T], and where each event begins among them [R, T + 1]."""
    tokens = plan.rank.shape[1]
    rank_RT = jnp.where(plan.rank < 0, tokens, plan.rank)
    order_RT = jnp.argsort(rank_RT, axis=1).astype(jnp.int32)
    events_E = jnp.arange(tokens + 1, dtype=jnp.int32)
    first_RE = jax.vmap(lambda ranks_T: jnp.searchsorted(jnp.sort(ranks_T), events_E))(rank_RT)
    return order_RT, first_RE.astype(jnp.int32)


def _sizes(tokens: int) -> list[int]:
    """Powers of two up to PIECE or, if that is less, to one that holds all tokens."""
    sizes = [1]
    while sizes[-1] < min(tokens, PIECE):
        sizes.append(2 * sizes[-1])
    return sizes
