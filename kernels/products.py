"""Products of matrices in the precision of their operands, as the chunked scans need them."""

import jax
import jax.numpy as jnp

from .dispatch import target


def product(equation: str, *arrays: jax.Array) -> jax.Array:
    """``jnp.einsum`` without a loss of precision on matrix units."""
    return jnp.einsum(equation, *arrays, precision=jax.lax.Precision.HIGHEST)


def transposed_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b: [..., i, m], [..., i, n] -> [..., m, n].

    On CPU, XLA folds a transposition into the product, which then runs at half its speed or less;
    so there the transpose is made first.
    """
    if target()[0] != "cpu":
        return product("...im,...in->...mn", a, b)
    return product("...mi,...in->...mn", jax.lax.optimization_barrier(jnp.swapaxes(a, -1, -2)), b)
