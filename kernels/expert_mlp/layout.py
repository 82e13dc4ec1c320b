"""Rows of a buffer in which the tokens of one expert lie together, and the way there and back.

Dimensions: T tokens, J choices of a token, N = T J assignments, R rows, E experts, D hidden.

A layout is two tables that undo each other: the row of every assignment, and the assignment of
every row. With both, moving tokens is a gather in the forward and in the backward: nothing is
scattered, and sums are in a fixed order.
"""

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from ..dtypes import accumulation_dtype


class Layout(NamedTuple):
    """Where tokens lie.

    Attributes:
      row_TJ: [T, J] int32 row of every assignment; R if it has none.
      token_R: [R] int32 token of every row; T if it is empty.
      choice_R: [R] int32 which of its token's choices a row is.
    """

    row_TJ: jax.Array
    token_R: jax.Array
    choice_R: jax.Array


def ragged(expert_TJ: jax.Array, experts: int) -> tuple[Layout, jax.Array]:
    """Rows sorted by expert, one for each assignment; and the rows of each expert [E].

    Args:
      expert_TJ: [T, J] int32; ``experts`` and above: no expert.
    """
    position_TJ, count_E = _positions(expert_TJ, experts)
    start_E = jnp.cumsum(count_E) - count_E
    rows = expert_TJ.size
    return _layout(_from(start_E, expert_TJ, rows) + position_TJ, rows), count_E


def blocks(expert_TJ: jax.Array, experts: int, size: int) -> tuple[Layout, jax.Array]:
    """Blocks of ``size`` rows, each of one expert; and the expert of each block [R / size].

    There are as many as the worst division of the assignments among experts needs.
    """
    position_TJ, count_E = _positions(expert_TJ, experts)
    assignments = expert_TJ.size
    number = min(assignments, (assignments + experts * (size - 1)) // size)
    end_E = jnp.cumsum(-(-count_E // size))
    start_E = size * jnp.concatenate([jnp.zeros(1, end_E.dtype), end_E[:-1]])
    layout = _layout(_from(start_E, expert_TJ, number * size) + position_TJ, number * size)
    expert_G = jnp.searchsorted(end_E, jnp.arange(number, dtype=end_E.dtype), side="right")
    return layout, jnp.minimum(expert_G, experts - 1)


def fixed(expert_TJ: jax.Array, experts: int, places: int, score_TJ: jax.Array | None) -> Layout:
    """``places`` rows for each expert; what finds no place is dropped.

    Args:
      expert_TJ: see :func:`ragged`.
      score_TJ: [T, J]; an expert keeps those with the highest scores, of equals the first. None:
        all first choices come before all second ones, each in the order of the tokens.
    """
    position_TJ, _ = _positions(expert_TJ, experts, score_TJ, by_choice=score_TJ is None)
    rows = experts * places
    row_TJ = expert_TJ * places + position_TJ
    row_TJ = jnp.where((position_TJ < places) & (expert_TJ < experts), row_TJ, rows)
    # A ``jax.checkpoint`` that saves this name does not sort scores again, with another rounding.
    return _layout(checkpoint_name(row_TJ, "expert_rows"), rows)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, layout: Layout) -> jax.Array:
    """Tokens in their rows: [R, D]; empty rows are 0."""
    return _take(x_TD, layout.token_R)


def _dispatch_forward(x_TD, layout):
    return dispatch(x_TD, layout), layout


def _dispatch_backward(layout, d_RD):
    wide = accumulation_dtype(d_RD.dtype)
    d_TD = jnp.sum(_take(d_RD, layout.row_TJ).astype(wide), axis=1)
    return d_TD.astype(d_RD.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y_RD: jax.Array, weight_TJ: jax.Array, layout: Layout) -> jax.Array:
    """Weighted sum of the rows of every token: [T, D] in y's dtype; dropped ones count as 0."""
    wide = accumulation_dtype(y_RD.dtype)
    y_TJD = _take(y_RD, layout.row_TJ).astype(wide)
    return jnp.sum(weight_TJ.astype(wide)[..., None] * y_TJD, axis=1).astype(y_RD.dtype)


def _combine_forward(y_RD, weight_TJ, layout):
    return combine(y_RD, weight_TJ, layout), (y_RD, weight_TJ, layout)


def _combine_backward(residuals, d_TD):
    y_RD, weight_TJ, layout = residuals
    wide = accumulation_dtype(y_RD.dtype)
    d_TD = d_TD.astype(wide)
    weight_R = _take(weight_TJ, layout.token_R)
    weight_R = jnp.take_along_axis(weight_R, layout.choice_R[:, None], axis=1).astype(wide)
    d_RD = (weight_R * _take(d_TD, layout.token_R)).astype(y_RD.dtype)
    y_TJD = _take(y_RD, layout.row_TJ).astype(wide)
    d_TJ = jnp.sum(y_TJD * d_TD[:, None], axis=-1).astype(weight_TJ.dtype)
    return d_RD, d_TJ, None


combine.defvjp(_combine_forward, _combine_backward)


def _positions(expert_TJ, experts: int, score_TJ=None, by_choice: bool = False):
    """[T, J] number of every assignment among those of its expert, and their counts [E]."""
    expert_TJ = jnp.minimum(expert_TJ, experts)
    expert_N = (expert_TJ.T if by_choice else expert_TJ).reshape(-1)
    if score_TJ is None:
        order_N = jnp.argsort(expert_N, stable=True)
    else:
        order_N = jnp.lexsort((-score_TJ.reshape(-1), expert_N))
    number = jnp.arange(expert_N.size, dtype=jnp.int32)
    place_N = jnp.zeros_like(number).at[order_N].set(number, unique_indices=True)
    count_E = jnp.zeros(experts + 1, jnp.int32).at[expert_N].add(1)
    position_N = place_N - (jnp.cumsum(count_E) - count_E)[expert_N]
    shape = expert_TJ.T.shape if by_choice else expert_TJ.shape
    position_TJ = position_N.reshape(shape)
    return (position_TJ.T if by_choice else position_TJ), count_E[:experts]


def _from(start_E, expert_TJ, nowhere: int):
    """The first row of every assignment's expert; ``nowhere`` if it has none."""
    return jnp.take(start_E, expert_TJ, mode="fill", fill_value=nowhere)


def _layout(row_TJ, rows: int) -> Layout:
    row_TJ = jnp.minimum(row_TJ, rows).astype(jnp.int32)
    tokens, choices = row_TJ.shape
    token_TJ, choice_TJ = jnp.indices((tokens, choices), jnp.int32)
    empty = jnp.zeros(rows, jnp.int32)
    token_R = (empty + tokens).at[row_TJ].set(token_TJ, mode="drop", unique_indices=False)
    return Layout(row_TJ, token_R, empty.at[row_TJ].set(choice_TJ, mode="drop"))


def _take(x, index):
    """Rows of x; 0 where the index is beyond."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)
