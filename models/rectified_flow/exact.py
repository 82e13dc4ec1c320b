"""Flows whose velocity is known in closed form: to test with, and to look at.

Dimensions: B examples, D numbers in each, K and L components of two mixtures, P pairs of them
(K times L), M images of a data set.

For independent X_0 and X_1, the velocity is v(x, t) = E[X_1 - X_0 | X_t = x] (Liu, Gong and Liu
2022, equation 2), which is finite sums where both are mixtures of normal distributions, or one
is and the other a set of points.
"""

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
    log_BP, solved_BPD, gain_BPDD, step_PD = _pairs(source, target, x_BD, t_B)
    v_BPD = step_PD[None] + jnp.einsum("bpij,bpj->bpi", gain_BPDD, solved_BPD, precision=_HIGHEST)
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
    side = distance * np.sqrt(3) / 2
    corners = np.array([[side, distance / 2], [-side, distance / 2], [0, -side]])
    mixture = lambda mean_KD: Mixture(
        jnp.full(3, 1 / 3, jnp.float32),
        jnp.asarray(mean_KD, jnp.float32),
        jnp.asarray(np.tile(variance * np.eye(2), (3, 1, 1)), jnp.float32),
    )
    return mixture(corners), mixture(corners * [1, -1])


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
    """Of all pairs of components at x and t: log of weight times density [B, P], C^-1 (x - m)
    [B, P, D], t S_b - (1 - t) S_a [B, P, D, D], and m_b - m_a [P, D]."""
    pair = lambda f, a_K, b_L: f(a_K[:, None], b_L[None]).reshape(-1, *a_K.shape[1:])
    t = t_B.astype(x_BD.dtype)
    t_B11, t_B111 = t[:, None, None], t[:, None, None, None]
    first, second = (lambda a, b: a + 0 * b), (lambda a, b: b + 0 * a)
    m0_PD, m1_PD = (pair(f, source.mean, target.mean) for f in (first, second))
    s0_PDD, s1_PDD = (pair(f, source.covariance, target.covariance) for f in (first, second))
    mean_BPD = (1 - t_B11) * m0_PD[None] + t_B11 * m1_PD[None]
    covariance_BPDD = jnp.square(1 - t_B111) * s0_PDD[None] + jnp.square(t_B111) * s1_PDD[None]
    gain_BPDD = t_B111 * s1_PDD[None] - (1 - t_B111) * s0_PDD[None]
    root_BPDD = jnp.linalg.cholesky(covariance_BPDD)
    solve = lambda transpose, y: jax.lax.linalg.triangular_solve(
        root_BPDD, y, left_side=True, lower=True, transpose_a=transpose
    )
    white = solve(False, (x_BD[:, None] - mean_BPD)[..., None])
    log_weight_P = pair(lambda a, b: jnp.log(a) + jnp.log(b), source.weight, target.weight)
    log_det_BP = jnp.sum(jnp.log(jnp.diagonal(root_BPDD, axis1=-2, axis2=-1)), axis=-1)
    constant = 0.5 * x_BD.shape[1] * np.log(2 * np.pi).item()
    square_BP = jnp.sum(jnp.square(white[..., 0]), axis=-1)
    log_BP = log_weight_P[None] - log_det_BP - constant - 0.5 * square_BP
    return log_BP, solve(True, white)[..., 0], gain_BPDD, m1_PD - m0_PD
