"""The one rule for accumulation dtypes."""

import jax.numpy as jnp


def accumulation_dtype(dtype) -> jnp.dtype:
    """float64 for float64, float32 for everything else: states, sums, norms, losses."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)
