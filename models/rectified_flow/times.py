"""At which times a flow is trained: densities over [0, 1], by name.

Dimensions: B examples.

Every density is a map from uniform numbers u in [0, 1) to times; t = 0 is noise, t = 1 is data.
Whoever wants the times of a batch stratified passes stratified numbers to ``from_uniform``.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

EPS = 1e-3  # the noise end is cut off here (Liu, Gong and Liu 2022, public code)
EPS_BOTH = 1e-5  # both ends are cut off here (Lee, Lin and Fanti 2024, public code)


@dataclasses.dataclass(frozen=True)
class TimeDensity:
    """A density of training times; ``time_density(text)`` makes one from its name.

    Attributes:
      name: a key of ``DENSITIES``.
      values: its numbers, as in the name: ("range", (0.2, 0.8)).
      eps: how far the times stay away from 0, and from 1 where the density says so.
    """

    name: str
    values: tuple[float, ...]
    eps: float

    def __post_init__(self):
        if self.name not in DENSITIES:
            raise ValueError(f"unknown times {self.name!r}; choose one of {_known()}")
        entry = DENSITIES[self.name]
        if len(self.values) != len(entry.defaults) or not entry.valid(*self.values):
            raise ValueError(f"times {self.name} with {self.values}: use {entry.usage}")
        if not 0 < self.eps < 0.5:
            raise ValueError(f"eps of the times must be between 0 and 0.5, got {self.eps}")

    def sample(self, keys_B: jax.Array) -> jax.Array:
        """One time per key: [B] float32."""
        return self.from_uniform(
            jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys_B)
        )

    def from_uniform(self, u_B: jax.Array) -> jax.Array:
        """Times of numbers u in [0, 1), in u's shape and dtype."""
        return DENSITIES[self.name].quantile(u_B, self.eps, *self.values)


def time_density(text: str, eps: float | None = None) -> TimeDensity:
    """The density that ``NAME`` or ``NAME:NUMBER:...`` stands for.

      uniform             u (1 - eps) + eps
      u_shaped[:a]        dense at both ends, as u_shaped_quantile says; a = 4 if not given
      logit_normal:m:s    sigmoid of a normal number with mean m and standard deviation s
      t0, t1, t0t1        eps, 1, or either: the flow's ends, for distillation
      fixed:a             a (1 - eps) + eps
      range:a:b           uniform in [a, b]
      k_step:k            j (1 - eps) / k + eps, j = 0, ..., k - 1 alike: distillation of k steps

    Args:
      text: as above.
      eps: the cut-off; by default 1e-5 for u_shaped and logit_normal, 1e-3 for the others.

    Raises:
      ValueError: for an unknown name, or numbers that make no density.
    """
    name, *numbers = text.split(":")
    if name not in DENSITIES:
        raise ValueError(f"unknown times {text!r}; choose one of {_known()}")
    entry = DENSITIES[name]
    try:
        values = tuple(float(number) for number in numbers) or entry.defaults
    except ValueError:
        raise ValueError(f"times {text!r}: use {entry.usage}") from None
    return TimeDensity(name, values, entry.eps if eps is None else eps)


def u_shaped_quantile(p: jax.Array, a: float) -> jax.Array:
    """F^-1(p) = 1/2 + asinh((2 p - 1) sinh(a / 2)) / a of the density e^(a u) + e^(a (1 - u)).

    (Lee, Lin and Fanti 2024, section 4.1; the formula printed there grows instead, the public code
    has this one.)
    """
    return 0.5 + jnp.arcsinh((2 * p - 1) * math.sinh(a / 2)) / a


def u_shaped_density(u: jax.Array, a: float) -> jax.Array:
    """p(u) = a cosh(a (u - 1/2)) / (2 sinh(a / 2)) on [0, 1]."""
    return a * jnp.cosh(a * (u - 0.5)) / (2 * math.sinh(a / 2))


def u_shaped_cdf(u: jax.Array, a: float) -> jax.Array:
    """F(u) = 1/2 + sinh(a (u - 1/2)) / (2 sinh(a / 2)) on [0, 1]."""
    return 0.5 + jnp.sinh(a * (u - 0.5)) / (2 * math.sinh(a / 2))


class _Density(NamedTuple):
    """usage for messages; quantile (u, eps, *values) -> t; valid (*values); default values; eps."""

    usage: str
    quantile: Callable[..., jax.Array]
    valid: Callable[..., bool] = lambda: True
    defaults: tuple[float, ...] = ()
    eps: float = EPS


def _uniform(u, eps):
    return u * (1 - eps) + eps


def _u_shaped(u, eps, a):
    return u_shaped_quantile(u, a) * (1 - 2 * eps) + eps


def _logit_normal(u, eps, mean, std):
    t = jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))  # u = 0 gives t = 0
    return jnp.clip(t, eps, 1 - eps)


def _fixed(u, eps, a):
    return jnp.full_like(u, a * (1 - eps) + eps)


def _ends(u, eps):
    return jnp.where(u < 0.5, jnp.full_like(u, eps), jnp.ones_like(u))


def _range(u, eps, a, b):
    return a + (b - a) * u


def _k_step(u, eps, k):
    return jnp.minimum(jnp.floor(u * k), k - 1) * (1 - eps) / k + eps


_NONE = math.nan  # numbers without a default: no density is valid with it

DENSITIES = {
    "uniform": _Density("uniform", _uniform),
    "u_shaped": _Density(
        "u_shaped[:a] with 0 < a <= 50", _u_shaped, lambda a: 0 < a <= 50, (4.0,), EPS_BOTH
    ),
    "logit_normal": _Density(
        "logit_normal:MEAN:STD with STD > 0",
        _logit_normal,
        lambda mean, std: math.isfinite(mean) and 0 < std < math.inf,
        (_NONE, _NONE),
        EPS_BOTH,
    ),
    "t0": _Density("t0", lambda u, eps: _fixed(u, eps, 0.0)),
    "t1": _Density("t1", lambda u, eps: _fixed(u, eps, 1.0)),
    "t0t1": _Density("t0t1", _ends),
    "fixed": _Density("fixed:a with 0 <= a <= 1", _fixed, lambda a: 0 <= a <= 1, (_NONE,)),
    "range": _Density(
        "range:a:b with 0 <= a < b <= 1", _range, lambda a, b: 0 <= a < b <= 1, (_NONE, _NONE)
    ),
    "k_step": _Density(
        "k_step:k with a whole number k >= 1",
        _k_step,
        lambda k: k >= 1 and k.is_integer(),
        (_NONE,),
    ),
}


def _known() -> str:
    return ", ".join(entry.usage.split(" ")[0] for entry in DENSITIES.values())
