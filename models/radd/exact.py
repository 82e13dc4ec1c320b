"""What the losses estimate, by enumeration: for toys and tiny networks, in float64.

Dimensions: B examples, L tokens, V real tokens, A = 2^L masked sets, P orders, N rows of ids.

A network is ``conditionals``: ids [N, L] with masks -> log probabilities [N, L, >= V], compiled or
not. ``set_nats`` asks it about every masked set of every example, in parts of one shape; all else
here is sums over the result. With S_A the sum over a masked set A of the cross entropies,

  sum_A (|A| - 1)! (L - |A|)! / L! S_A = sum_k mean_{|A| = k} S_A / k = mean over orders of -log q

is what lambda_dce, k_dce and, at cut = 0 on a schedule from 0 to 1, t_dse and t_dce estimate (Ou et
al. 2025, section 3); by Jensen it is at least -log of the mean over orders of q, and for the
conditionals of a distribution p all these are -log p(x0).
"""

from collections.abc import Callable
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .losses import Loss

MAX_SETS = 2**16
MAX_ORDERS = math.factorial(8)
ROWS = 4096
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


class Moments(NamedTuple):
    """E[estimate] and E[estimate^2] of one draw: [B] each."""

    mean_B: np.ndarray
    square_B: np.ndarray

    @property
    def deviation_B(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.square_B - self.mean_B**2, 0))


def bound(conditionals: Callable, x0_BL, mask_id: int, rows: int = ROWS) -> np.ndarray:
    """The bound of -log p(x0) that the losses estimate, 2^L calls per example: [B]."""
    return np.sum(size_means(set_nats(conditionals, x0_BL, mask_id, rows)), axis=0)


def masked_sets(length: int) -> np.ndarray:
    """All sets of positions: [A, L] bool, in the order of binary numbers.

    Raises:
      ValueError: if there are more than 65536.
    """
    if 2**length > MAX_SETS:
        raise ValueError(f"2^{length} masked sets are too many to enumerate: at most {MAX_SETS}")
    return (np.arange(2**length)[:, None] >> np.arange(length)[::-1]) % 2 == 1


def set_nats(conditionals: Callable, x0_BL, mask_id: int, rows: int = ROWS) -> np.ndarray:
    """Cross entropies of the masked positions, for every masked set: [A, B, L] float64, else 0.

    Args:
      conditionals: as above; it is called with about ``rows`` rows at a time.
      x0_BL: whole numbers below V.
      mask_id: what stands for a masked token.

    Raises:
      ValueError: if there are more than 65536 sets.
    """
    x0_BL = np.asarray(x0_BL)
    sets_AL = masked_sets(x0_BL.shape[1])
    at_once = min(len(sets_AL), 2 ** int(math.log2(max(1, rows // len(x0_BL)))))
    parts = []
    for mask_CL in sets_AL.reshape(-1, at_once, sets_AL.shape[1]):
        mask_CBL = np.broadcast_to(mask_CL[:, None], (at_once, *x0_BL.shape))
        x_CBL = np.where(mask_CBL, np.asarray(mask_id, x0_BL.dtype), x0_BL)
        log_NLV = conditionals(jnp.asarray(x_CBL.reshape(-1, x0_BL.shape[1])))
        index_NL = jnp.asarray(np.tile(x0_BL, (at_once, 1)))
        log_NL = jnp.take_along_axis(log_NLV, index_NL[..., None], axis=-1)[..., 0]
        log_CBL = np.asarray(log_NL).astype(np.float64).reshape(x_CBL.shape)
        parts.append(np.where(mask_CBL, -log_CBL, 0.0))
    return np.concatenate(parts)


def size_means(nats_ABL: np.ndarray, power: int = 1) -> np.ndarray:
    """mean_{|A| = k} (S_A / k)^power for k = 1, ..., L: [L, B]."""
    sets_AL = masked_sets(nats_ABL.shape[2])
    size_A = sets_AL.sum(1)
    sum_AB = nats_ABL.sum(2)
    sizes = range(1, nats_ABL.shape[2] + 1)
    return np.stack([np.mean((sum_AB[size_A == k] / k) ** power, axis=0) for k in sizes])


def all_orders(length: int) -> np.ndarray:
    """[P, L], in lexical order.

    Raises:
      ValueError: if there are more than 8!.
    """
    if math.factorial(length) > MAX_ORDERS:
        raise ValueError(f"{length}! orders are too many to enumerate: at most {MAX_ORDERS}")
    return np.array(list(itertools.permutations(range(length))))


def order_nats(nats_ABL: np.ndarray, orders_PL: np.ndarray) -> np.ndarray:
    """-log q(x0) of filling in each order: [P, B]."""
    length = nats_ABL.shape[2]
    bit_PL = 2 ** (length - 1 - orders_PL)
    # At step i all of the positions from the i-th on are masked.
    set_PL = np.cumsum(bit_PL[:, ::-1], axis=1)[:, ::-1]
    return np.sum([nats_ABL[set_PL[:, i], :, orders_PL[:, i]] for i in range(length)], axis=0)


def mixture_nats(nats_PB: np.ndarray) -> np.ndarray:
    """-log of the mean over orders of q(x0): [B]."""
    low_B = nats_PB.min(0)
    return low_B - np.log(np.mean(np.exp(low_B[None] - nats_PB), axis=0))


def moments(loss: Loss, nats_ABL: np.ndarray) -> Moments:
    """Mean and second moment of one draw of a loss, as it is coded, with u uniform.

    lambda_dce's second moment is infinite. So is the t losses' at cut = 0 where lambda(0) = 0, and
    the number here is then one of the quadrature's own making. Without nelbo's reconstruction.
    """
    length = nats_ABL.shape[2]
    sizes_K = np.arange(1, length + 1)
    mean_KB, square_KB = size_means(nats_ABL), size_means(nats_ABL, 2)  # of S_A / k
    if loss.name == "k_dce":
        scale = float(length)
        return Moments(np.mean(scale * mean_KB, 0), np.mean(scale**2 * square_KB, 0))
    u_Q, weight_Q = _quadrature(loss.steps)
    with jax.enable_x64(True):
        level = [np.asarray(x) for x in loss.level(jnp.asarray(u_Q), length)]
    chance_Q, scale_Q, offset_Q = level
    ways_K = np.array([math.comb(length, k) for k in sizes_K])
    power = lambda x_Q, n_K: x_Q[:, None] ** n_K
    share_QK = ways_K * power(chance_Q, sizes_K) * power(1 - chance_Q, length - sizes_K)
    share_QK = share_QK * weight_Q[:, None]
    by_K = lambda f_Q, n: (share_QK * f_Q[:, None]).sum(0) * sizes_K**n
    first_B = by_K(scale_Q, 1) @ mean_KB + by_K(offset_Q, 1).sum()
    second_B = by_K(scale_Q**2, 2) @ square_KB + by_K(offset_Q**2, 2).sum()
    second_B = second_B + 2 * by_K(scale_Q * offset_Q, 2) @ mean_KB
    if loss.name == "lambda_dce":
        second_B = np.full_like(second_B, np.inf)
    return Moments(first_B, second_B)


def table_nats(p: np.ndarray, x0_BL) -> np.ndarray:
    """-log p(x0) from a table p [V, ..., V] of L axes: [B]."""
    return -np.log(p[tuple(np.asarray(x0_BL).T)])


def conditionals_of(p: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """The conditionals of a table p [V, ..., V], for ids with masks (id V).

    At positions that are not masked, the token there has probability 1. Where p gives what is
    not masked no chance, tokens are alike.
    """
    length, vocabulary = p.ndim, p.shape[0]
    for axis in range(length):  # index V sums over an axis: the marginals
        p = np.concatenate([p, p.sum(axis, keepdims=True)], axis)
    cond = np.empty((*p.shape, length, vocabulary))
    for axis in range(length):
        joint = np.moveaxis(p, axis, -1)[..., :vocabulary]
        out = np.moveaxis(cond[..., axis, :], axis, -2)  # a view: [..., V + 1, V]
        out[..., :vocabulary, :] = np.eye(vocabulary)
        total = joint.sum(-1, keepdims=True)
        out[..., vocabulary, :] = np.where(
            total > 0, joint / np.where(total > 0, total, 1), 1 / vocabulary
        )
    return look_up(cond.reshape(-1, length, vocabulary))


def look_up(cond_SLV: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """ids [N, L] -> log probabilities [N, L, V] from a table over all S = (V + 1)^L states.

    States are numbers in base V + 1, the first position their first digit, the digit V a mask.
    """
    _, length, vocabulary = cond_SLV.shape
    place_L = (vocabulary + 1) ** np.arange(length)[::-1]
    with np.errstate(divide="ignore"):
        log_SLV = np.log(cond_SLV)

    def conditionals(x_NL: jax.Array) -> jax.Array:
        state_N = jnp.sum(x_NL * jnp.asarray(place_L, x_NL.dtype)[None], axis=1)
        return jnp.asarray(log_SLV, jax.dtypes.canonicalize_dtype(np.float64))[state_N]

    return conditionals


def _quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1): Gauss-Legendre between points that crowd at both ends, or the
    middles of ``steps`` equal parts, which a loss on a grid is constant on."""
    if steps:
        return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    near = 0.5 ** np.arange(1, 40)
    edges = np.concatenate([[0], near[::-1], 1 - near[1:], [1]])
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half + half * _NODES).ravel(), (half * _WEIGHTS).ravel()
