"""What the tests of samplers share: reference values, schedules, and networks that are tables."""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np

from scanax.models.radd.network import Network

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "radd"


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


class LogLinear:
    def total(self, t):
        return -np.log1p(-0.999 * t)

    def rate(self, t):
        return 0.999 / (1 - 0.999 * t)


class Geometric:
    def total(self, t):
        return 1e-4 ** (1 - t) * 20.0**t

    def rate(self, t):
        return self.total(t) * np.log(20 / 1e-4)


SCHEDULES = {"loglinear": LogLinear(), "geometric": Geometric()}


def table(dtype=jnp.float64, conditionals: str = "cond_exact") -> Network:
    """The toy's conditionals, looked up by the whole row."""
    file = load("toy_exact")
    vocab, length = int(file["vocab"]), int(file["length"])
    place_T = (vocab + 1) ** jnp.arange(length - 1, -1, -1, dtype=jnp.int32)
    with np.errstate(divide="ignore"):
        log_c = jnp.asarray(np.log(file[conditionals]), dtype)
    return Network(lambda ids_BT: log_c[ids_BT @ place_T], lambda hidden: hidden, vocab)
