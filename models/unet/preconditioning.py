"""The velocity of EDM's denoiser (Karras et al. 2022), as in 2-RF++ (Lee, Lin and Fanti 2024).

Dimensions: B batch, H height, W width, C channels.

At time t (0 noise, 1 data) an image X_t = t X_1 + (1 - t) X_0 is t times one with noise of standard
deviation sigma = (1 - t) / t, of which EDM's denoiser is D = c_skip X_t/t + c_out F(c_in X_t/t,
ln(sigma)/4), and the velocity is v = (D - X_t) / (1 - t). With r^2 = (1 - t)^2 + (sigma_data t)^2
the terms in 1/t and 1/(1 - t) cancel:

  v = (sigma_data^2 t - (1 - t)) / r^2 X_t + sigma_data / r F(X_t / r, ln((1 - t) / t) / 4).

This is finite for all t. Exactly at t = 0 it is -X_0 + sigma_data F(X_0), and at t = 1 it is
X_1 + F(X_1 / sigma_data); only the noise label has no value there, and is that of 1e-5 and of
1 - 1e-5, the ends of the published training.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype

NEAREST_TO_THE_ENDS = 1e-5


def velocity(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    x_BHWC: jax.Array,
    t_B: jax.Array,
    sigma_data: float,
) -> jax.Array:
    """v at [B] times in [0, 1], of F = network(x, noise label [B]).

    [B, H, W, C], float32 or better. Equation 7 of Karras et al. 2022 in the variables of the
    module's docstring.
    """
    wide = accumulation_dtype(x_BHWC.dtype)
    x, t = x_BHWC.astype(wide), t_B.astype(wide)[:, None, None, None]
    r2 = (1 - t) ** 2 + (sigma_data * t) ** 2
    r = jnp.sqrt(r2)
    y = network(x / r, noise_label(t_B)).astype(wide)
    return (sigma_data**2 * t - (1 - t)) / r2 * x + sigma_data / r * y


def noise_label(t_B: jax.Array) -> jax.Array:
    """ln(sigma) / 4 of the time, sigma = (1 - t) / t: [B]; t is held within [1e-5, 1 - 1e-5]."""
    t_B = jnp.clip(t_B, NEAREST_TO_THE_ENDS, 1 - NEAREST_TO_THE_ENDS)
    return (jnp.log1p(-t_B) - jnp.log(t_B)) / 4
