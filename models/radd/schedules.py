"""How fast tokens are masked: schedules over time, by name.

Time t runs from 0, nothing masked, to 1, (nearly) everything masked. All methods are functions of
t of any shape, in its dtype. With the rate sigma of a token turning into the mask,

  sbar(t) = int_0^t sigma,   alpha = e^(-sbar),   lambda = 1 - alpha

(Ou et al. 2025, section 2). A schedule is written so that alpha and lambda have their digits in
float32 where they are small, and all else follows from them.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

EPS = 1e-3  # log_linear
SHIFT = 1e-4  # of linear, cosine and polynomial, at both ends
GEOMETRIC = (1e-4, 20.0)
USAGE = {
    "log_linear": "log_linear[:EPS] with 0 < EPS < 1",
    "geometric": "geometric[:MIN:MAX] with 0 < MIN < MAX",
    "linear": "linear",
    "cosine": "cosine",
    "polynomial": "polynomial:POWER with POWER > 0",
}


class Schedule(abc.ABC):
    """A schedule; ``schedule(text)`` makes one from its name."""

    @abc.abstractmethod
    def alpha(self, t: jax.Array) -> jax.Array:
        """The chance that a token is still there."""

    @abc.abstractmethod
    def masked(self, t: jax.Array) -> jax.Array:
        """lambda: the chance that it is masked."""

    @abc.abstractmethod
    def slope(self, t: jax.Array) -> jax.Array:
        """d lambda / dt = sigma alpha."""

    def total(self, t: jax.Array) -> jax.Array:
        """sbar = -log(alpha)."""
        masked = self.masked(t)
        small = masked < 0.5
        return jnp.where(small, -jnp.log1p(-jnp.where(small, masked, 0)), -jnp.log(self.alpha(t)))

    def rate(self, t: jax.Array) -> jax.Array:
        """sigma = d sbar / dt."""
        return self.slope(t) / self.alpha(t)

    def weight(self, t: jax.Array) -> jax.Array:
        """sigma / (e^sbar - 1), which multiplies the cross entropies of the masked tokens."""
        return self.slope(t) / self.masked(t)

    def odds(self, t: jax.Array) -> jax.Array:
        """s = alpha / lambda = 1 / (e^sbar - 1), the scale of the scores."""
        return self.alpha(t) / self.masked(t)

    def log_odds(self, t: jax.Array) -> jax.Array:
        """log s."""
        return jnp.log(self.alpha(t)) - jnp.log(self.masked(t))


@dataclasses.dataclass(frozen=True)
class LogLinear(Schedule):
    """lambda = (1 - eps) t; the weight is 1 / t, whatever eps."""

    eps: float = EPS

    def __post_init__(self):
        _require(0 < self.eps < 1, self, "log_linear")

    def alpha(self, t: jax.Array) -> jax.Array:
        return (1 - t) + self.eps * t

    def masked(self, t: jax.Array) -> jax.Array:
        return (1 - self.eps) * t

    def slope(self, t: jax.Array) -> jax.Array:
        return jnp.full_like(t, 1 - self.eps)

    def weight(self, t: jax.Array) -> jax.Array:
        return 1 / t


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """sbar = low^(1 - t) high^t, which is low and not 0 at t = 0."""

    low: float = GEOMETRIC[0]
    high: float = GEOMETRIC[1]

    def __post_init__(self):
        _require(0 < self.low < self.high < math.inf, self, "geometric")

    def alpha(self, t: jax.Array) -> jax.Array:
        return jnp.exp(-self.total(t))

    def masked(self, t: jax.Array) -> jax.Array:
        return -jnp.expm1(-self.total(t))

    def slope(self, t: jax.Array) -> jax.Array:
        return self.rate(t) * self.alpha(t)

    def total(self, t: jax.Array) -> jax.Array:
        return jnp.exp((1 - t) * math.log(self.low) + t * math.log(self.high))

    def rate(self, t: jax.Array) -> jax.Array:
        return self.total(t) * math.log(self.high / self.low)

    def log_odds(self, t: jax.Array) -> jax.Array:
        return -self.total(t) - jnp.log(self.masked(t))


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha = (1 - 2 e) (1 - t^power) + e with e = 1e-4 (Shi et al. 2024); "linear" is power 1."""

    power: float

    def __post_init__(self):
        _require(0 < self.power < math.inf, self, "polynomial")

    def alpha(self, t: jax.Array) -> jax.Array:
        return (1 - 2 * SHIFT) * -jnp.expm1(self.power * jnp.log(t)) + SHIFT

    def masked(self, t: jax.Array) -> jax.Array:
        return (1 - 2 * SHIFT) * t**self.power + SHIFT

    def slope(self, t: jax.Array) -> jax.Array:
        return (1 - 2 * SHIFT) * self.power * t ** (self.power - 1)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = (1 - 2 e) (1 - cos(pi (1 - t) / 2)) + e with e = 1e-4 (Shi et al. 2024)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        return (1 - 2 * SHIFT) * 2 * jnp.square(jnp.sin(math.pi / 4 * (1 - t))) + SHIFT

    def masked(self, t: jax.Array) -> jax.Array:
        return (1 - 2 * SHIFT) * jnp.sin(math.pi / 2 * t) + SHIFT

    def slope(self, t: jax.Array) -> jax.Array:
        return (1 - 2 * SHIFT) * math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t))


def schedule(text: str) -> Schedule:
    """The schedule that ``NAME`` or ``NAME:NUMBER:...`` stands for.

      log_linear[:EPS]      lambda = (1 - EPS) t; EPS = 1e-3 if not given
      geometric[:MIN:MAX]   sbar from MIN to MAX; 1e-4 and 20 if not given
      linear, cosine, polynomial:POWER   those of MD4 (Shi et al. 2024)

    Raises:
      ValueError: for an unknown name, or numbers that make no schedule.
    """
    name, *numbers = text.split(":")
    if name not in USAGE:
        raise ValueError(f"unknown schedule {text!r}; choose one of {', '.join(USAGE)}")
    makers = {
        "log_linear": (LogLinear, (0, 1)),
        "geometric": (Geometric, (0, 2)),
        "linear": (lambda: Polynomial(1.0), (0,)),
        "cosine": (Cosine, (0,)),
        "polynomial": (Polynomial, (1,)),
    }
    make, counts = makers[name]
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = None
    if values is None or len(values) not in counts:
        raise ValueError(f"schedule {text!r}: use {USAGE[name]}")
    return make(*values)


def _require(valid: bool, found: Schedule, name: str) -> None:
    if not valid:
        raise ValueError(f"schedule {found}: use {USAGE[name]}")
