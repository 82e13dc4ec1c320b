"""Diffusion models as flows: EDM and VP networks made into velocities, and EDM's sampler.

Dimensions: B examples, N steps; the axes behind B are of any number.

A flow from noise X_0 ~ N(0, I) at time t is a variance-exploding diffusion X_t / t at the noise
level sigma = (1 - t) / t (Lee, Lin and Fanti 2024, section 3, whose time runs the other way). With
a denoiser D, its velocity is v = (D(X_t / t, sigma) - X_t) / (1 - t).
"""

from collections.abc import Callable
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import path
from .times import EPS_BOTH

SIGMA_DATA = 0.5
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # Karras et al. 2022, table 1
BETA_MIN, BETA_D = 0.1, 19.9  # of VP, Song et al. 2021
EDM_METHODS = ("euler", "heun")

Network = Callable[[jax.Array, jax.Array], jax.Array]


class Coefficients(NamedTuple):
    """EDM's preconditioning D(x) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022)."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array


def noise_level(t: jax.Array) -> jax.Array:
    """sigma = (1 - t) / t, in t's dtype."""
    return (1 - t) / t


def time_of(sigma: jax.Array) -> jax.Array:
    """t = 1 / (1 + sigma), in sigma's dtype."""
    return 1 / (1 + sigma)


def edm_coefficients(sigma: jax.Array, sigma_data: float = SIGMA_DATA) -> Coefficients:
    """Of noise levels of any shape (Karras et al. 2022, table 1)."""
    variance = jnp.square(sigma) + sigma_data**2
    return Coefficients(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data * jax.lax.rsqrt(variance),
        c_in=jax.lax.rsqrt(variance),
        c_noise=jnp.log(sigma) / 4,
    )


def edm_velocity(
    network: Network, x: jax.Array, t_B: jax.Array, sigma_data: float = SIGMA_DATA
) -> jax.Array:
    """The velocity of an EDM network F: [B, ...], float32 or better.

    With q = (1 - t)^2 + sigma_data^2 t^2, the denoiser put into v and reduced by 1 - t and t is

      v = (sigma_data^2 t - (1 - t)) / q  x + sigma_data / sqrt(q)  F(x / sqrt(q), c_noise),

    which neither divides by zero nor subtracts nearly equal numbers at either end. Exactly at t = 0
    it is -X_0 + sigma_data F(X_0), at t = 1 it is X_1 + F(X_1 / sigma_data).

    Args:
      network: F, of its scaled input and :func:`edm_label` [B].
      x: [B, ...].
      t_B: [B] in [0, 1].
    """
    x = path.wide(x)
    label_B = edm_label(t_B)
    t_B = t_B.astype(x.dtype)
    q_B = jnp.square(1 - t_B) + jnp.square(sigma_data * t_B)
    scale = path.along(jax.lax.rsqrt(q_B), x)
    skip = path.along((sigma_data**2 * t_B - (1 - t_B)) / q_B, x)
    return skip * x + sigma_data * scale * network(scale * x, label_B).astype(x.dtype)


def edm_label(t_B: jax.Array) -> jax.Array:
    """c_noise = ln(sigma) / 4: [B], in t's dtype.

    It is infinite at both ends: t is held within [1e-5, 1 - 1e-5], the published training's.
    """
    eps = float(np.float32(EPS_BOTH))  # which is a little less
    t_B = jnp.clip(t_B, eps, 1 - eps)
    return (jnp.log1p(-t_B) - jnp.log(t_B)) / 4


def velocity_of_denoised(denoised: jax.Array, x: jax.Array, t_B: jax.Array) -> jax.Array:
    """v = (D - X_t) / (1 - t) of what a denoiser returned at X_t, for t < 1.

    Near t = 1 it loses digits, whatever the denoiser; ``edm_velocity`` does not.
    """
    x = path.wide(x)
    return (denoised.astype(x.dtype) - x) / (1 - path.along(t_B, x))


def denoised_of_velocity(v: jax.Array, x: jax.Array, t_B: jax.Array) -> jax.Array:
    """D = X_t + (1 - t) v, the predicted data."""
    return path.predicted_data(x, v, t_B)


def velocity_weight(t: jax.Array) -> jax.Array:
    """1 / (1 - t)^2: a squared error of the denoiser times this is one of the velocity."""
    return 1 / jnp.square(1 - t)


class VP(NamedTuple):
    """Where a flow's time lies on a variance-preserving diffusion.

    Attributes:
      tau: its time; above 1, where it was not trained, for sigma above 152.
      alpha: its signal's factor, t / sqrt((1 - t)^2 + t^2).
      scale: x_vp = scale x_t.
    """

    tau: jax.Array
    alpha: jax.Array
    scale: jax.Array


def vp(t: jax.Array) -> VP:
    """Of flow times in (0, 1], any shape (linear beta; Song et al. 2021, appendix C)."""
    scale = jax.lax.rsqrt(jnp.square(1 - t) + jnp.square(t))
    return VP(_vp_time(jnp.square(noise_level(t))), t * scale, scale)


def vp_noise_level(tau: jax.Array) -> jax.Array:
    """sigma(tau) = sqrt(exp(beta_d tau^2 / 2 + beta_min tau) - 1)."""
    return jnp.sqrt(jnp.expm1(0.5 * BETA_D * jnp.square(tau) + BETA_MIN * tau))


def vp_velocity(network: Network, x: jax.Array, t_B: jax.Array) -> jax.Array:
    """The velocity of a VP network that predicts noise: (x - eps(x_vp, 999 tau)) / t, for t > 0.

    That is (D - x) / (1 - t) with D = x / t - sigma eps, reduced by 1 - t. tau is cut off at 1.

    Args:
      network: eps, of its scaled input and 999 tau [B].
      x: [B, ...].
      t_B: [B] in (0, 1].
    """
    x = path.wide(x)
    at = vp(t_B.astype(x.dtype))
    noise = network(path.along(at.scale, x) * x, 999 * jnp.minimum(at.tau, 1))
    return (x - noise.astype(x.dtype)) / path.along(t_B, x)


class EDMSolution(NamedTuple):
    """x [B, ...] at sigma = 0; evaluations [] int32; states [N + 1, B, ...], first sigma_0 z."""

    x: jax.Array
    nfe: jax.Array
    trajectory: jax.Array


def edm_sigmas(
    steps: int, low: float = SIGMA_MIN, high: float = SIGMA_MAX, rho: float = RHO
) -> tuple[float, ...]:
    """N levels from high to low, and 0 (Karras et al. 2022, equation 5).

    Raises:
      ValueError: if steps is below 1 or the levels do not fall.
    """
    if steps < 1 or not 0 < low < high or not rho > 0:
        raise ValueError(
            f"EDM's levels need steps >= 1, 0 < low < high and rho > 0; got {steps}, {low}, {high},"
            f" {rho}"
        )
    first, last = high ** (1 / rho), low ** (1 / rho)
    inner = ((first + i / (steps - 1) * (last - first)) ** rho for i in range(1, steps - 1))
    return (high, 0.0) if steps == 1 else (high, *inner, low, 0.0)


def edm_sample(
    denoiser: Network, z: jax.Array, sigmas: tuple[float, ...], method: str = "heun"
) -> EDMSolution:
    """EDM's deterministic sampler (Karras et al. 2022, algorithm 1), in jit.

    Args:
      denoiser: D, (x [B, ...], sigma [B]) -> [B, ...].
      z: [B, ...] noise of variance 1.
      sigmas: falling levels, the last is 0: ``edm_sigmas(N)``.
      method: "heun" (2 N - 1 evaluations, none at sigma = 0) or "euler" (N).

    Raises:
      ValueError: for an unknown method or levels that do not fall to 0.
    """
    if method not in EDM_METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(EDM_METHODS)}")
    if len(sigmas) < 2 or sigmas[-1] != 0 or any(a <= b for a, b in itertools.pairwise(sigmas)):
        raise ValueError(f"sigmas must fall, and end in 0; got {sigmas}")
    z = path.wide(z)
    level_N = jnp.asarray(sigmas, z.dtype)
    last = len(sigmas) - 2

    def slope(x, sigma):
        sigma_B = jnp.full(x.shape[:1], sigma, x.dtype)
        return (x - denoiser(x, sigma_B).astype(x.dtype)) / sigma

    def step(carry, at):
        x, nfe = carry
        index, sigma, sigma_next = at
        d, nfe = slope(x, sigma), nfe + 1
        if method == "heun":
            correct = lambda: (
                (d + slope(x + (sigma_next - sigma) * d, sigma_next)) / 2,
                nfe + 1,
            )
            d, nfe = jax.lax.cond(index < last, correct, lambda: (d, nfe))
        x = x + (sigma_next - sigma) * d
        return (x, nfe), x

    start = level_N[0] * z
    at = (jnp.arange(last + 1, dtype=jnp.int32), level_N[:-1], level_N[1:])
    (x, nfe), states = jax.lax.scan(step, (start, jnp.int32(0)), at)
    return EDMSolution(x, nfe, jnp.concatenate([start[None], states]))


def _vp_time(variance):
    """tau of sigma^2: (sqrt(beta_min^2 + 2 beta_d L) - beta_min) / beta_d, L = ln(1 + sigma^2),

    written as 2 L / (sqrt(...) + beta_min), which keeps its digits for small sigma.
    """
    log = jnp.log1p(variance)
    return 2 * log / (jnp.sqrt(BETA_MIN**2 + 2 * BETA_D * log) + BETA_MIN)
