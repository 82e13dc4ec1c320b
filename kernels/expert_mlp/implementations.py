"""The experts on their tokens, in five ways that agree.

Dimensions: T tokens, J choices of a token, R rows, G groups of C rows, E experts, D hidden, F
expert width.

  y_t = sum_j w_tj  down_e(act(up_e(x_t))),  e = index_tj

dense     every expert on every token, the others weighted 0: for tests, and few experts
capacity  a fixed number of rows for each expert; what does not fit is dropped
block     rows in blocks of one expert, its matrices gathered for each block
ragged    rows sorted by expert, ``jax.lax.ragged_dot``
gmm       the same on TPU, with the grouped matrix product that comes with JAX
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..dtypes import accumulation_dtype
from . import layout as layout_lib

TILE = 128  # rows, of the grouped matrix product on TPU

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Experts(NamedTuple):
    """Parameters of all experts.

    With a gate the activation is silu(x gate) * (x up), else relu(x up + up_bias).

    Attributes:
      up: [E, D, F].
      down: [E, F, D].
      gate: [E, D, F] or None.
      up_bias, down_bias: [E, F] and [E, D], or None.
    """

    up: jax.Array
    down: jax.Array
    gate: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


def mlp(
    x: jax.Array,
    experts: Experts,
    matmul: Callable[[jax.Array, jax.Array], jax.Array],
    spread: Callable[[jax.Array], jax.Array],
    keep: jax.Array | None = None,
) -> jax.Array:
    """The experts' function on rows.

    Args:
      x: [..., D] rows.
      experts: of as many experts as ``matmul`` knows.
      matmul: (rows, [E, in, out]) -> rows; multiplies every row by its expert's matrix.
      spread: [E, width] -> what broadcasts to rows; the entry of every row's expert.
      keep: factors on the hidden activations (dropout), or None.
    """
    hidden = matmul(x, experts.up)
    if experts.up_bias is not None:
        hidden = hidden + spread(experts.up_bias)
    if experts.gate is None:
        hidden = jax.nn.relu(hidden)
    else:
        hidden = jax.nn.silu(matmul(x, experts.gate)) * hidden
    if keep is not None:
        hidden = hidden * keep.astype(hidden.dtype)
    y = matmul(hidden, experts.down)
    return y if experts.down_bias is None else y + spread(experts.down_bias)


def grouped(x_GCD: jax.Array, experts: Experts, keep: jax.Array | None = None) -> jax.Array:
    """:func:`mlp` on G groups of rows, with the parameters of one expert for each group."""
    matmul = lambda x, w: _einsum("gcd,gdf->gcf", x, w)
    return mlp(x_GCD, experts, matmul, lambda b: b[:, None], keep)


def dense(x_TD, index_TJ, weight_TJ, experts: Experts, keep_TJF=None, **options):
    """[T, D]; every expert computes every token."""
    del options
    number, wide = experts.up.shape[0], accumulation_dtype(x_TD.dtype)
    chosen_TJE = jax.nn.one_hot(index_TJ, number, dtype=wide)
    keep_ETF = None
    if keep_TJF is not None:
        keep_ETF = _einsum("tje,tjf->etf", chosen_TJE, keep_TJF.astype(wide))
    matmul = lambda x, w: _einsum("td,edf->etf" if x.ndim == 2 else "etd,edf->etf", x, w)
    y_ETD = mlp(x_TD, experts, matmul, lambda b: b[:, None], keep_ETF)
    weight_TE = jnp.sum(weight_TJ.astype(wide)[..., None] * chosen_TJE, axis=1)
    return _einsum("te,etd->td", weight_TE, y_ETD.astype(wide)).astype(x_TD.dtype)


def block(x_TD, index_TJ, weight_TJ, experts: Experts, keep_TJF=None, *, block_size, **options):
    """[T, D]; dropless, in blocks of ``block_size`` rows."""
    del options
    where, expert_G = layout_lib.blocks(index_TJ, experts.up.shape[0], block_size)
    x_GCD = layout_lib.dispatch(x_TD, where).reshape(-1, block_size, x_TD.shape[1])
    own = jax.tree.map(lambda w: jnp.take(w, expert_G, axis=0), experts)
    keep_GCF = rows_of(keep_TJF, where, (-1, block_size))
    y_GCD = grouped(x_GCD, own, keep_GCF)
    return layout_lib.combine(y_GCD.reshape(-1, x_TD.shape[1]), weight_TJ, where)


def capacity(
    x_TD, index_TJ, weight_TJ, experts: Experts, keep_TJF=None, *, places, score_TJ, **options
):
    """[T, D]; ``places`` rows for each expert, see ``layout.fixed``."""
    del options
    number = experts.up.shape[0]
    where = layout_lib.fixed(index_TJ, number, places, score_TJ)
    x_ECD = layout_lib.dispatch(x_TD, where).reshape(number, places, x_TD.shape[1])
    y_ECD = grouped(x_ECD, experts, rows_of(keep_TJF, where, (number, places)))
    return layout_lib.combine(y_ECD.reshape(-1, x_TD.shape[1]), weight_TJ, where)


def ragged(x_TD, index_TJ, weight_TJ, experts: Experts, keep_TJF=None, **options):
    """[T, D]; dropless, rows sorted by expert."""
    del options
    highest = jax.lax.Precision.HIGHEST
    product = functools.partial(jax.lax.ragged_dot, precision=highest)
    return _sorted(x_TD, index_TJ, weight_TJ, experts, keep_TJF, product)


def gmm(x_TD, index_TJ, weight_TJ, experts: Experts, keep_TJF=None, *, interpret=False, **options):
    """[T, D]; dropless, rows sorted by expert, on TPU."""
    del options
    from jax.experimental.pallas.ops.tpu import megablox

    def product(x_RD, w, count_E):
        extra = -x_RD.shape[0] % TILE
        x_RD = jnp.pad(x_RD, ((0, extra), (0, 0)))
        # The last group takes the rows without an expert: what comes of them is not read.
        count_E = count_E.at[-1].add(x_RD.shape[0] - jnp.sum(count_E))
        tiling = (TILE, min(TILE, w.shape[1]), min(TILE, w.shape[2]))
        y: Any = megablox.gmm(x_RD, w, count_E, x_RD.dtype, tiling, interpret=interpret)
        return y[: y.shape[0] - extra]

    return _sorted(x_TD, index_TJ, weight_TJ, experts, keep_TJF, product)


def _sorted(x_TD, index_TJ, weight_TJ, experts, keep_TJF, product):
    number = experts.up.shape[0]
    where, count_E = layout_lib.ragged(index_TJ, number)
    x_RD = layout_lib.dispatch(x_TD, where)
    end_E = jnp.cumsum(count_E)
    expert_R = jnp.searchsorted(end_E, jnp.arange(len(x_RD), dtype=end_E.dtype), side="right")
    spread = lambda b: jnp.take(b, expert_R, axis=0, mode="clip")
    matmul = lambda x, w: product(x, w, count_E)
    y_RD = mlp(x_RD, experts, matmul, spread, rows_of(keep_TJF, where, (-1,)))
    return layout_lib.combine(y_RD, weight_TJ, where)


def rows_of(keep_TJF, where: layout_lib.Layout, shape: tuple[int, ...]):
    """Factors [T, J, F] of the assignments in their rows [*shape, F], or None; 0 in empty rows."""
    if keep_TJF is None:
        return None
    flat_NF = keep_TJF.reshape(-1, keep_TJF.shape[-1])
    number_R = where.token_R * keep_TJF.shape[1] + where.choice_R
    keep_RF = jnp.take(flat_NF, number_R, axis=0, mode="fill", fill_value=0)
    return keep_RF.reshape(*shape, keep_RF.shape[-1])
