"""Annealing reflow: from independent noise to a teacher's pairs, and pairs flipped as one.

Dimensions: B examples, H height, W width, C channels.

  Z_0^beta = sqrt(1 - beta^2) Z_0 + beta xi,   xi ~ N(0, I)    (Zhu, Liu and Liu 2024, section 4.1)

beta = 1 trains a first flow on the teacher's images, beta = 0 is reflow; Z_0^beta is N(0, I)
always. beta falls with the training step k.
"""

import dataclasses

import jax
import jax.numpy as jnp

from . import path

SCHEDULES = ("linear", "exp", "cos", "fixed")


@dataclasses.dataclass(frozen=True)
class Annealing:
    """beta as a function of the training step k.

    Attributes:
      schedule: "linear" 1 - min(1, k / W), "exp" e^(-k / W), "cos"
        (1 + cos(pi min(1, k / W))) / 2, or "fixed".
      value: W in steps (published: 300 000), or beta itself if it is fixed.
    """

    schedule: str
    value: float

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"unknown annealing {self.schedule!r}; choose one of {', '.join(SCHEDULES)}"
            )
        if self.schedule == "fixed" and not 0 <= self.value <= 1:
            raise ValueError(f"a fixed beta must be in [0, 1], got {self.value}")
        if self.schedule != "fixed" and not self.value > 0:
            raise ValueError(f"annealing takes a positive number of steps, got {self.value}")

    def beta(self, step: jax.Array) -> jax.Array:
        """beta in training step ``step``, from 0 on, as many as have been: [] float32 or wider."""
        k = path.wide(jnp.asarray(step))
        part = jnp.minimum(1, k / self.value)
        if self.schedule == "linear":
            return 1 - part
        if self.schedule == "exp":
            return jnp.exp(-k / self.value)
        if self.schedule == "cos":
            return (1 + jnp.cos(jnp.pi * part)) / 2
        return jnp.full_like(k, self.value)


def schedule(text: str) -> Annealing:
    """Of "linear:W", "exp:W", "cos:W" (W steps) or "fixed:beta".

    Raises:
      ValueError: for an unknown name or an impossible number.
    """
    name, _, number = text.partition(":")
    try:
        return Annealing(name, float(number))
    except ValueError as error:
        known = "linear:W, exp:W, cos:W (W steps) or fixed:beta"
        raise ValueError(f"annealing {text!r}: use {known} ({error})") from None


def anneal(z0: jax.Array, xi: jax.Array, beta: jax.Array) -> jax.Array:
    """Z_0^beta of paired noise z0 and fresh noise xi [B, ...], beta []; exactly z0 if beta = 0."""
    path.check_pair(z0, xi)
    z0, xi = path.wide(z0), path.wide(xi)
    beta = beta.astype(z0.dtype)
    return jnp.sqrt(1 - beta * beta) * z0 + beta * xi


def flip_pair(
    key: jax.Array, x0_BHWC: jax.Array, x1_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Noise and image both mirrored along the width, or neither, with probability 1/2.

    Valid because a flow of natural images commutes with mirroring, nearly.

    Args:
      key: [B] keys, a coin for each example; or one key, one coin for the batch, as published.
      x0_BHWC, x1_BHWC: noise, annealed already, and images.
    """
    path.check_pair(x0_BHWC, x1_BHWC)
    if key.ndim == 0:
        flip_B = jnp.broadcast_to(jax.random.bernoulli(key), x0_BHWC.shape[:1])
    else:
        flip_B = jax.vmap(jax.random.bernoulli)(key)
    return mirror(x0_BHWC, flip_B), mirror(x1_BHWC, flip_B)


def mirror(x_BHWC: jax.Array, flip_B: jax.Array) -> jax.Array:
    """Images mirrored along the width where flip is True."""
    return jnp.where(flip_B[:, None, None, None], x_BHWC[:, :, ::-1], x_BHWC)
