"""Flows whose velocity is known in closed form: to test with, and to look at.

Dimensions: B examples, D numbers in each, K and L components of two mixtures, P pairs of them
(K times L), M images of a data set.

For independent X_0 and X_1, the velocity is v(x, t) = E[X_1 - X_0 | X_t = x] (Liu, Gong and Liu
2022, equation 2), which is finite sums where both are mixtures of normal distributions, or one
is and the other a set of points.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import path

_HIGHEST = jax.lax.Precision.HIGHEST


class Mixture(NamedTuple):
    """A mixture of normal distributions.

    Attributes:
      weight: [K], sum 1.
      mean: [K, D].
      covariance: [K, D, D].
    """

    weight: jax.Array
    mean: jax.Array
    covariance: jax.Array


def mixture_velocity(source: Mixture, target: Mixture, x_BD: jax.Array, t_B: jax.Array):
    """The velocity between independent mixtures: [B, D], at all times from 0 to 1.

    Of the pair (a, b), with m_t and C_t its mean and covariance at time t,

      E[X_1 - X_0 | x] = m_b - m_a + (t S_b - (1 - t) S_a) C_t^-1 (x - m_t),

    and the pairs are weighed by their density at x.
    """
    log_BP, v_BPD = _pairs(source, target, x_BD, t_B)
    share_BP = jax.nn.softmax(log_BP, axis=1)
    return jnp.einsum("bp,bpi->bi", share_BP, v_BPD, precision=_HIGHEST)


def mixture_log_density(source: Mixture, target: Mixture, x_BD: jax.Array, t_B: jax.Array):
    """log p_t(x) of X_t = t X_1 + (1 - t) X_0: [B]."""
    return jax.nn.logsumexp(_pairs(source, target, x_BD, t_B)[0], axis=1)


def sample_mixture(mixture: Mixture, key: jax.Array, count: int) -> jax.Array:
    """``count`` points: [count, D] in the mixture's dtype."""
    which, where = jax.random.split(key)
    index_B = jax.random.categorical(which, jnp.log(mixture.weight), shape=(count,))
    xi_BD = jax.random.normal(where, (count, mixture.mean.shape[1]), mixture.mean.dtype)
    root_BDD = jnp.linalg.cholesky(mixture.covariance)[index_B]
    step_BD = jnp.einsum("bij,bj->bi", root_BDD, xi_BD, precision=_HIGHEST)
    return mixture.mean[index_B] + step_BD


def toy_mixtures(distance: float = 10.0, variance: float = 0.3) -> tuple[Mixture, Mixture]:
    """Noise and data of the two-dimensional example of the authors' notebook: float32.

    Three components each, at the corners of two triangles that look at each other.
    """
    mixture = lambda mean_KD: Mixture(
        jnp.full(3, 1 / 3, jnp.float32),
        jnp.asarray(mean_KD, jnp.float32),
        jnp.asarray(np.tile(variance * np.eye(2), (3, 1, 1)), jnp.float32),
    )
    start_KD, end_KD = toy_means(distance)
    return mixture(start_KD), mixture(end_KD)


def toy_means(distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the components of both mixtures of :func:`toy_mixtures` lie: [3, 2] float64 each."""
    side = distance * 3**0.5 / 2
    start_KD = np.asarray([[side, distance / 2], [-side, distance / 2], [0.0, -side]])
    return start_KD, start_KD * np.asarray([[1.0, -1.0]])


def empirical_velocity(images: jax.Array, x: jax.Array, t_B: jax.Array) -> jax.Array:
    """The velocity from N(0, I) to a set of images: [B, ...], like x, for t < 1.

      v = (sum_i p_i y_i - x) / (1 - t),   p = softmax(-||x - t y_i||^2 / (2 (1 - t)^2))

    At t = 1 it is singular: end a solver before.

    Args:
      images: [M, ...] y.
      x: [B, ...].
      t_B: [B] in [0, 1).

    Raises:
      ValueError: if images are not shaped as x is.
    """
    if images.shape[1:] != x.shape[1:]:
        raise ValueError(f"images {images.shape[1:]} and x {x.shape[1:]} must be shaped alike")
    x = path.wide(x)
    y_MD = images.astype(x.dtype).reshape(len(images), -1)
    x_BD = x.reshape(len(x), -1)
    t_B1 = path.along(t_B, x_BD)
    # ||x - t y||^2 without ||x||^2, which all images share: no array [B, M, D].
    dot_BM = jnp.matmul(x_BD, y_MD.T, precision=_HIGHEST)
    square_1M = jnp.sum(jnp.square(y_MD), axis=1)[None]
    logit_BM = (t_B1 * dot_BM - 0.5 * jnp.square(t_B1) * square_1M) / jnp.square(1 - t_B1)
    mean_BD = jnp.matmul(jax.nn.softmax(logit_BM, axis=1), y_MD, precision=_HIGHEST)
    return ((mean_BD - x_BD) / (1 - t_B1)).reshape(x.shape)


def _pairs(source: Mixture, target: Mixture, x_BD, t_B):
    """Of all pairs of components: log of weight times density at x [B, P], velocity [B, P, D].

    With S_a = L L^T and L^-1 S_b L^-T = U diag(l) U^T, the covariance is diagonal in the
    coordinates y = (L U)^-1 (x - m_t) at all times: C_t = L U diag((1 - t)^2 + t^2 l) (L U)^T.
    """
    first = lambda a_K: jnp.repeat(a_K, len(target.weight), axis=0)
    second = lambda b_L: jnp.tile(b_L, (len(source.weight),) + (1,) * (b_L.ndim - 1))
    m0_PD, m1_PD = first(source.mean), second(target.mean)
    root_PDD = first(jnp.linalg.cholesky(source.covariance))
    half_PDD = _solve_lower(root_PDD, second(target.covariance))
    l_PD, u_PDD = jnp.linalg.eigh(_solve_lower(root_PDD, jnp.swapaxes(half_PDD, 1, 2)))
    basis_PDD = jnp.matmul(root_PDD, u_PDD, precision=_HIGHEST)
    inverse_PDD = jnp.matmul(  # U^T L^-1
        jnp.swapaxes(u_PDD, 1, 2), _solve_lower(root_PDD, _identity(root_PDD)), precision=_HIGHEST
    )
    t_B11 = t_B.astype(x_BD.dtype)[:, None, None]
    away_BPD = x_BD[:, None] - (1 - t_B11) * m0_PD[None] - t_B11 * m1_PD[None]
    y_BPD = jnp.einsum("pij,bpj->bpi", inverse_PDD, away_BPD, precision=_HIGHEST)
    variance_BPD = jnp.square(1 - t_B11) + jnp.square(t_B11) * l_PD[None]
    gain_BPD = (t_B11 * l_PD[None] - (1 - t_B11)) / variance_BPD
    v_BPD = jnp.einsum("pij,bpj->bpi", basis_PDD, gain_BPD * y_BPD, precision=_HIGHEST)
    log_root_P = jnp.sum(jnp.log(jnp.diagonal(root_PDD, axis1=1, axis2=2)), axis=1)
    log_weight_P = jnp.log(first(source.weight)) + jnp.log(second(target.weight))
    log_BP = -0.5 * jnp.sum(jnp.square(y_BPD) / variance_BPD + jnp.log(variance_BPD), axis=2)
    constant = 0.5 * x_BD.shape[1] * math.log(2 * math.pi)
    return log_BP + (log_weight_P - log_root_P)[None] - constant, v_BPD + (m1_PD - m0_PD)[None]


def _solve_lower(root_PDD, y_PDD):
    """L^-1 y."""
    return jax.lax.linalg.triangular_solve(root_PDD, y_PDD, left_side=True, lower=True)


def _identity(like_PDD):
    return jnp.broadcast_to(jnp.eye(like_PDD.shape[1], dtype=like_PDD.dtype), like_PDD.shape)
