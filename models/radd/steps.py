"""The loop over all steps, as published samplers run: for comparison, and for given random numbers.

Dimensions: N steps, B rows, T tokens, C rows that are evaluated, V real tokens, S = V + 1.

A network without time need not be called again until a row changes. ``caching`` says what is done
with that: "none" calls in every step; "batch" calls for all rows if any has changed; "rows" for the
rows that have changed, rounded up to a power of two, and keeps a row's logits otherwise. events.py
has the same law and needs neither the steps between nor a cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..generation import Sampling
from . import draws
from .network import Network, check_ids, real_logits

CACHING = ("none", "batch", "rows")


class Steps(NamedTuple):
    """What :func:`sample` returns.

    Attributes:
      tokens: [B, T] int32.
      needs: [N, B] bool, rows whose logits are not those of the step before: all in the first step,
        then those that the step before has changed.
      evaluations: [B] int32, calls of the network that were made for a row on purpose.
      batch_evaluations: [] int32, steps in which the network was called.
      trajectory: [N + 1, B, T] int32 from the start on, or None.
    """

    tokens: jax.Array
    needs: jax.Array
    evaluations: jax.Array
    batch_evaluations: jax.Array
    trajectory: jax.Array | None


def sample(
    network: Network,
    key: jax.Array | None,
    start_BT: jax.Array,
    psi_N: np.ndarray,
    sampling: Sampling | None = None,
    *,
    caching: str = "rows",
    uniforms_NBTS: jax.Array | None = None,
    unmask_NBT: jax.Array | None = None,
    trajectory: bool = False,
) -> Steps:
    """Fills the masks step by step.

    Args:
      network: what predicts.
      key: one key, row b then draws from ``fold_in(key, b)``; or one per row. None with uniforms.
      start_BT: [B, T] int32, V where a token is to be sampled.
      psi_N: [N] rates of unmasking (``rates.unmask_rates``).
      sampling: None for the published draw in one stage, among V tokens and staying masked. Else
        in two: whether a mask goes, then its token from the filtered distribution.
      caching: one of CACHING; see the module. The result is the same.
      uniforms_NBTS: [N, B, T, V + 1] numbers for the published draw, instead of the key's. In two
        stages the last column is not used; with top_k, the first is the likeliest token's.
      unmask_NBT: [N, B, T] numbers for the first of two stages; a mask goes if below psi.
      trajectory: also return all states.

    Raises:
      ValueError: for tokens outside [0, V], no step, rates that do not end with 1, an unknown
        caching, or neither a key nor uniforms.
    """
    check_ids(network, start_BT)
    psi_N = np.asarray(psi_N, np.float64)
    if psi_N.ndim != 1 or not len(psi_N) or psi_N[-1] != 1:
        raise ValueError("psi must have at least one step, and end with 1")
    if caching not in CACHING:
        raise ValueError(f"caching must be one of {', '.join(CACHING)}; got {caching!r}")
    if sampling is not None:
        draws.check_sampling(sampling)
    given = uniforms_NBTS is not None and (sampling is None or unmask_NBT is not None)
    if not given and key is None:
        raise ValueError("pass key=jax.random.key(seed), or uniforms for all stages")
    rows, tokens = start_BT.shape
    vocab = network.vocab_size
    keys_B = None if given or key is None else draws.row_keys(key, rows)
    evaluate = lambda ids_BT: real_logits(network, network.body(ids_BT))
    update = _updates(evaluate, rows, caching)
    position_BT = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], (rows, tokens))

    def step(carry, at):
        ids_BT, logits_BTV, need_B = carry
        number, psi, uniforms_BTS, unmask_BT = at
        logits_BTV = update(ids_BT, logits_BTV, need_B)
        psi = psi.astype(logits_BTV.dtype)
        if given:
            drawn_BT = _given(logits_BTV, psi, sampling, uniforms_BTS, unmask_BT)
        else:
            number_B = jnp.full(rows, number, jnp.uint32)
            keys_BT = draws.position_keys(keys_B, number_B, position_BT)
            drawn_BT = _drawn(keys_BT, logits_BTV, psi, sampling)
        masked_BT = ids_BT == vocab
        next_BT = jnp.where(masked_BT, drawn_BT, ids_BT)
        changed_B = jnp.any(next_BT != ids_BT, axis=1)
        return (next_BT, logits_BTV, changed_B), (need_B, next_BT if trajectory else None)

    shape = jax.eval_shape(evaluate, jax.ShapeDtypeStruct(start_BT.shape, jnp.int32))
    carry = jnp.asarray(start_BT), jnp.zeros(shape.shape, shape.dtype), jnp.ones(rows, bool)
    at = (jnp.arange(len(psi_N), dtype=jnp.uint32), jnp.asarray(psi_N), uniforms_NBTS, unmask_NBT)
    (ids_BT, _, _), (needs_NB, states) = jax.lax.scan(step, carry, at)
    if states is not None:
        states = jnp.concatenate([start_BT[None], states])
    called_NB = jnp.broadcast_to(jnp.any(needs_NB, axis=1, keepdims=True), needs_NB.shape)
    called_NB = {"none": jnp.ones_like(needs_NB), "batch": called_NB, "rows": needs_NB}[caching]
    calls = jnp.sum(jnp.any(called_NB, axis=1), dtype=jnp.int32)
    return Steps(ids_BT, needs_NB, jnp.sum(called_NB, axis=0, dtype=jnp.int32), calls, states)


def _given(logits_BTV, psi, sampling: Sampling | None, uniforms_BTS, unmask_BT) -> jax.Array:
    """[B, T] a token, or V to stay masked, from given numbers."""
    vocab = logits_BTV.shape[-1]
    if sampling is None:
        c_BTV = jax.nn.softmax(logits_BTV, axis=-1)
        stay_BT1 = jnp.full((*c_BTV.shape[:2], 1), jnp.where(psi < 1, 1 - psi, -1))
        return draws.race(jnp.concatenate([psi * c_BTV, stay_BT1], axis=-1), uniforms_BTS)
    drawn_BT = draws.filtered_race(logits_BTV, uniforms_BTS[..., :vocab], sampling)
    return jnp.where((unmask_BT < psi) | (psi >= 1), drawn_BT, vocab)


def _drawn(keys_BT, logits_BTV, psi, sampling: Sampling | None) -> jax.Array:
    """[B, T] a token, or V to stay masked."""
    vocab = logits_BTV.shape[-1]
    if sampling is None:
        log_c_BTV = jax.nn.log_softmax(logits_BTV, axis=-1) + jnp.log(psi)
        stay_BT1 = jnp.full((*log_c_BTV.shape[:2], 1), jnp.log1p(-psi))
        return draws.draw(keys_BT, jnp.concatenate([log_c_BTV, stay_BT1], axis=-1), Sampling())
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    uniform = lambda key: jax.random.uniform(key, (), psi.dtype)
    unmask_BT = jax.vmap(jax.vmap(uniform))(fold(keys_BT, jnp.uint32(0)))
    drawn_BT = draws.draw(fold(keys_BT, jnp.uint32(1)), logits_BTV, sampling)
    return jnp.where((unmask_BT < psi) | (psi >= 1), drawn_BT, vocab)


def _updates(evaluate: Callable, rows: int, caching: str) -> Callable:
    """(ids [B, T], logits [B, T, V], need [B]) -> logits, with those of rows in need anew."""
    if caching == "none":
        return lambda ids_BT, logits_BTV, need_B: evaluate(ids_BT)
    if caching == "batch":
        keep = lambda ids_BT, logits_BTV: logits_BTV
        anew = lambda ids_BT, logits_BTV: evaluate(ids_BT)
        return lambda ids_BT, logits_BTV, need_B: jax.lax.cond(
            jnp.any(need_B), anew, keep, ids_BT, logits_BTV
        )
    sizes = [0, 1]
    while sizes[-1] < rows:
        sizes.append(min(2 * sizes[-1], rows))

    def partly(size: int):
        def run(ids_BT, logits_BTV, order_B, count):
            if not size:
                return logits_BTV
            row_C = order_B[:size]
            to_C = jnp.where(jnp.arange(size, dtype=jnp.int32) < count, row_C, rows)
            return logits_BTV.at[to_C].set(evaluate(ids_BT[row_C]), mode="drop")

        return run

    def update(ids_BT, logits_BTV, need_B):
        order_B = jnp.argsort(~need_B).astype(jnp.int32)  # those in need first
        count = jnp.sum(need_B, dtype=jnp.int32)
        bucket = jnp.sum(count > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)
        branches = [partly(size) for size in sizes]
        return jax.lax.switch(bucket, branches, ids_BT, logits_BTV, order_B, count)

    return update
