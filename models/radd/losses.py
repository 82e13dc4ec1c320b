"""Losses of masked diffusion, in nats per sequence, by name.

Dimensions: B examples, T tokens, V real tokens, S >= V columns of a network's output.

All of them mask some tokens, ask the network for c = p(token | what is not masked), and are

  weight sum_{l masked} CE_l + constant,   CE_l = -log c_l(x0_l)

which differ in the draw (Ou et al. 2025, section 3). u is a number in [0, 1), lambda and sigma are
the schedule's, s = (1 - lambda) / lambda:

  t_dse       t = cut + (1 - cut) u, each token masked with chance lambda(t); weight sigma s
  t_dce       the same, less sigma s log(s) per masked token: the same gradient
  lambda_dce  each token masked with chance u; weight 1 / u; infinite variance
  k_dce       a uniform set of k = 1 + floor(T u) tokens masked; weight T / k
  nelbo       as t_dse with cut = 0 by default, and what MD4 has besides: a number of steps instead
              of continuous time, and the reconstruction at t = 0 (Shi et al. 2024)

lambda_dce and k_dce estimate a bound of -log p(x0), and nelbo does but for what its schedule
leaves out at the ends. The t losses are averages, not integrals, over [cut, 1], as published: no
bounds.

A training step, with ``times.draw`` for u over the whole batch, and a key per row:

  noise = loss.draw(keys_B, u_B, T)
  corruption = loss.corrupt(noise)
  x_BT = jnp.where(corruption.mask_BT, mask_id, x0_BT)
  ce_BT = cross_entropy(network(x_BT), x0_BT, vocabulary)
  nats_B = value(corruption, ce_BT)
"""

from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from . import times
from .schedules import LogLinear, Schedule

CUT = 1e-3
DEFAULT = LogLinear()


class Noise(NamedTuple):
    """What a corruption is made of: u_B in [0, 1), which says how much is masked, and
    uniforms_BT in [0, 1), which say where: the smallest are masked first."""

    u_B: jax.Array
    uniforms_BT: jax.Array


class Corruption(NamedTuple):
    """mask_BT bool; weight_B of the masked cross entropies; constant_B, free of the network."""

    mask_BT: jax.Array
    weight_B: jax.Array
    constant_B: jax.Array


class Level(NamedTuple):
    """What u stands for: the chance of a mask, and weight and offset of a masked token."""

    chance_B: jax.Array
    weight_B: jax.Array
    offset_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss; its estimate is ``value(loss.corrupt(noise), ce_BT)``.

    Attributes:
      name: a key of ``LOSSES``.
      schedule: of t; lambda_dce and k_dce have none and ignore it.
      cut: the smallest t; 1e-3 for t_dse and t_dce if not given, else 0.
      steps: of nelbo: t on the grid 1/steps, ..., 1 and finite differences; 0 is continuous time.
      reconstruction: of nelbo: V to add T lambda(0) log(V), that of a uniform guess at t = 0; 0
        leaves it out.
    """

    name: str
    schedule: Schedule = DEFAULT
    cut: float | None = None
    steps: int = 0
    reconstruction: int = 0

    def __post_init__(self):
        if self.name not in LOSSES:
            raise ValueError(f"unknown loss {self.name!r}; choose one of {', '.join(LOSSES)}")
        if self.cut is not None and not 0 <= self.cut < 1:
            raise ValueError(f"the smallest time of a loss must be in [0, 1), got {self.cut}")
        if self.steps < 0 or self.reconstruction < 0:
            raise ValueError("steps and reconstruction must not be negative")
        if self.name != "nelbo" and (self.steps or self.reconstruction):
            raise ValueError(f"steps and reconstruction are of the loss nelbo, not {self.name}")

    @property
    def times(self) -> str:
        """The published way to draw u, a name for ``times.draw``."""
        return {"lambda_dce": "decoupled", "k_dce": "iid"}.get(self.name, "vdm")

    def draw(self, keys_B: jax.Array, u_B: jax.Array, length: int) -> Noise:
        """Noise with a key per row, so that a row's does not depend on the others."""
        row = lambda key: jax.random.uniform(key, (length,), u_B.dtype)
        return Noise(u_B, jax.vmap(row)(keys_B))

    def corrupt(self, noise: Noise) -> Corruption:
        """Which tokens to mask, and what they then weigh: [B, T] bool, [B], [B] in u's dtype."""
        length = noise.uniforms_BT.shape[1]
        level = self.level(noise.u_B, length)
        if self.name == "k_dce":
            k_B = times.size_of(noise.u_B, length)
            mask_BT = ranks(noise.uniforms_BT) < k_B[:, None]
        else:
            mask_BT = noise.uniforms_BT < level.chance_B[:, None]
        count_B = jnp.sum(mask_BT, axis=1).astype(level.offset_B.dtype)
        constant_B = level.offset_B * count_B
        if self.reconstruction:
            lost_B = self.schedule.masked(jnp.zeros_like(noise.u_B))
            constant_B = constant_B + length * math.log(self.reconstruction) * lost_B
        return Corruption(mask_BT, level.weight_B, constant_B)

    def level(self, u_B: jax.Array, length: int) -> Level:
        """Chance, weight and offset that go with u, in u's shape and dtype."""
        return LOSSES[self.name](self, u_B, length)

    def time(self, u_B: jax.Array) -> jax.Array:
        """t of the losses over time."""
        cut = self.cut if self.cut is not None else 0.0 if self.name == "nelbo" else CUT
        return _positive(cut + (1 - cut) * u_B)


def value(corruption: Corruption, ce_BT: jax.Array) -> jax.Array:
    """The estimate in nats per sequence: [B], float32 or better.

    Raises:
      ValueError: if the cross entropies are not [B, T].
    """
    mask_BT = corruption.mask_BT
    if ce_BT.shape != mask_BT.shape:
        raise ValueError(f"cross entropies must be {mask_BT.shape}, got {ce_BT.shape}")
    ce_BT = ce_BT.astype(accumulation_dtype(ce_BT.dtype))
    sum_B = jnp.sum(jnp.where(mask_BT, ce_BT, 0), axis=1)
    return corruption.weight_B.astype(sum_B.dtype) * sum_B + corruption.constant_B.astype(
        sum_B.dtype
    )


def ranks(uniforms_BT: jax.Array) -> jax.Array:
    """How many of its row come before each: a permutation per row, [B, T] int32, even with ties."""
    return jnp.argsort(jnp.argsort(uniforms_BT, axis=1), axis=1).astype(jnp.int32)


def _positive(x_B: jax.Array) -> jax.Array:
    """At least half a unit in the last place of 1: 1 / 0 would meet no masked tokens."""
    return jnp.maximum(x_B, float(jnp.finfo(x_B.dtype).epsneg))


def _t_dse(loss: Loss, u_B, length) -> Level:
    t_B = loss.time(u_B)
    weight_B = loss.schedule.weight(t_B)
    return Level(loss.schedule.masked(t_B), weight_B, jnp.zeros_like(t_B))


def _t_dce(loss: Loss, u_B, length) -> Level:
    level = _t_dse(loss, u_B, length)
    return level._replace(offset_B=-level.weight_B * loss.schedule.log_odds(loss.time(u_B)))


def _lambda_dce(loss: Loss, u_B, length) -> Level:
    chance_B = _positive(u_B)
    return Level(chance_B, 1 / chance_B, jnp.zeros_like(u_B))


def _k_dce(loss: Loss, u_B, length) -> Level:
    k_B = times.size_of(u_B, length).astype(u_B.dtype)
    return Level(k_B / length, length / k_B, jnp.zeros_like(u_B))


def _nelbo(loss: Loss, u_B, length) -> Level:
    if not loss.steps:
        return _t_dse(loss, u_B, length)
    end_B = jnp.floor(loss.time(u_B) * loss.steps) + 1
    t_B, s_B = (jnp.minimum(x_B, loss.steps) / loss.steps for x_B in (end_B, end_B - 1))
    chance_B, before_B = loss.schedule.masked(t_B), loss.schedule.masked(s_B)
    alpha_B, alpha_before_B = loss.schedule.alpha(t_B), loss.schedule.alpha(s_B)
    # steps (1 - e^(log odds(t) - log odds(s))) alpha(s), written with the smaller numbers.
    step_B = jnp.where(chance_B < 0.5, chance_B - before_B, alpha_before_B - alpha_B)
    return Level(chance_B, loss.steps * step_B / chance_B, jnp.zeros_like(t_B))


LOSSES: dict[str, Callable[[Loss, jax.Array, int], Level]] = {
    "t_dse": _t_dse,
    "t_dce": _t_dce,
    "lambda_dce": _lambda_dce,
    "k_dce": _k_dce,
    "nelbo": _nelbo,
}
