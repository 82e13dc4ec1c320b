"""The (gated) DeltaProduct token mixer: projections, convolutions, gates, scan, norm.

Dimensions: B batch, T tokens, D hidden, N Householder steps, H query/key heads, G value
heads (a multiple of H), K key width of a head, V value width of a head.

Follows Siems et al. 2025 and the layer of flash-linear-attention: q, k, v through a short
convolution and SiLU, q and k normalised to length 1, beta = sigmoid (times 2 if negative
eigenvalues are allowed), decay as in Mamba-2, RMSNorm per head, optional output gate.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels import delta_product, delta_product_step
from ...kernels.dtypes import accumulation_dtype
from ..layers import Dense, RMSNorm, ShortConv, parameter, segment_runs, tokens_up_to_last
from .config import DeltaProductConfig

L2_EPS = 1e-6  # inside the square root, as in the published layer


class LayerCache(NamedTuple):
    """What decoding carries from token to token. Convolution entries are None without them."""

    state: jax.Array  # [B, G, K, V] float32, or float64 for a float64 model
    conv_q: jax.Array | None  # [B, W-1, H*K], last inputs of the convolution, newest last
    conv_k: jax.Array | None  # [B, W-1, N*H*K]
    conv_v: jax.Array | None  # [B, W-1, N*G*V]


class DeltaProduct(nn.Module):
    """DeltaProduct token mixer; see ``DeltaProductConfig`` for the switches."""

    config: DeltaProductConfig

    @nn.compact
    def __call__(self, x_BTD, *, mask=None, segment_ids=None, cache: LayerCache | None = None):
        """Mixes tokens.

        Args:
          x_BTD: [B, T, D].
          mask: [B, T] bool, True for real tokens. Padding leaves the cache unchanged and its
            outputs are 0. It may stand left of a row's first token or right of the last one
            of a call; between two tokens it counts as zeros for the convolution.
          segment_ids: [B, T] integers; state and convolution restart where the id changes
            from one real token to the next.
          cache: continue after earlier tokens, in the first token's segment; None starts
            from zeros.

        Returns:
          y [B, T, D], and the cache after the last token.
        """
        c = self.config
        steps, heads, v_heads = c.num_householder, c.num_heads, c.value_heads
        value_dim = c.value_dim
        if mask is not None:
            x_BTD = jnp.where(mask[..., None], x_BTD, 0)
        runs_BT = segment_runs(segment_ids, mask)
        place = (runs_BT, cache, tokens_up_to_last(mask))
        q_BTGK, conv_q = self._project(x_BTD, "q", (heads, c.head_dim), *place)
        k_BTNGK, conv_k = self._project(x_BTD, "k", (steps, heads, c.head_dim), *place)
        v_BTNGV, conv_v = self._project(x_BTD, "v", (steps, v_heads, value_dim), *place)
        q_BTGK, k_BTNGK = l2_normalise(q_BTGK), l2_normalise(k_BTNGK)
        if v_heads != heads:  # grouped values: a key head serves consecutive value heads
            q_BTGK = jnp.repeat(q_BTGK, v_heads // heads, axis=-2)
            k_BTNGK = jnp.repeat(k_BTNGK, v_heads // heads, axis=-2)

        b_BTNG = self._dense("b_proj", (steps, v_heads, 1), "heads")(x_BTD)[..., 0]
        beta_BTNG = nn.sigmoid(_at_least_float32(b_BTNG))
        if c.allow_neg_eigval:
            beta_BTNG = 2 * beta_BTNG
        g_BTG = self._log_decay(x_BTD) if c.use_forget_gate else None
        if mask is not None:
            beta_BTNG = jnp.where(mask[..., None, None], beta_BTNG, 0)
            g_BTG = None if g_BTG is None else jnp.where(mask[..., None], g_BTG, 0)

        state = None if cache is None else cache.state
        arrays = (q_BTGK, k_BTNGK, v_BTNGV, beta_BTNG, g_BTG)
        if state is not None and x_BTD.shape[1] == 1 and segment_ids is None:
            q, k, v, beta, g = jax.tree.map(lambda x: x[:, 0], arrays)
            o_BGV, state = delta_product_step(q, k, v, beta, g, state)
            o_BTGV = o_BGV[:, None]
        else:
            o_BTGV, state = delta_product(
                *arrays,
                initial_state=state,
                segment_ids=runs_BT,
                implementation=None if c.implementation == "auto" else c.implementation,
            )

        o_BTGV = RMSNorm(c.norm_eps, "head_dim", c.dtype, c.param_dtype, name="o_norm")(o_BTGV)
        if c.use_output_gate:
            gate_BTGV = self._dense("g_proj", (v_heads, value_dim), "heads")(x_BTD)
            o_BTGV = o_BTGV * nn.silu(gate_BTGV)
        o = o_BTGV.reshape(*o_BTGV.shape[:2], v_heads * value_dim)
        y_BTD = self._dense("o_proj", x_BTD.shape[-1], axes=("heads", "embed"))(o)
        if mask is not None:
            y_BTD = jnp.where(mask[..., None], y_BTD, 0)
        return y_BTD, LayerCache(state, conv_q, conv_k, conv_v)

    def _project(self, x_BTD, name: str, features: tuple[int, ...], runs_BT, cache, end_B):
        """Projection, short convolution and activation; with the convolution's history."""
        c = self.config
        x = self._dense(f"{name}_proj", features, "heads")(x_BTD)
        activation = "silu" if c.activation == "silu" else None
        if not c.use_short_conv:
            return (nn.silu(x) if activation else x), None
        history = None if cache is None else getattr(cache, f"conv_{name}")
        conv = ShortConv(
            c.conv_size,
            "heads",
            nn.initializers.normal(c.initializer_range),
            c.dtype,
            c.param_dtype,
            activation,
            "xla" if c.implementation in ("xla", "reference") else None,
            name=f"{name}_conv1d",
        )
        return conv(x, runs_BT, history, end_B)

    def _log_decay(self, x_BTD):
        """g = -exp(A_log) softplus(a + dt_bias): [B, T, G], float32 or better."""
        c = self.config
        axes, shape = ("heads",), (c.value_heads,)
        dtype = accumulation_dtype(jnp.dtype(c.param_dtype))
        a_log_G = parameter(self, "A_log", _a_log_init, axes, shape, dtype)
        dt_bias_G = parameter(self, "dt_bias", _dt_bias_init, axes, shape, dtype)
        a_BTG = _at_least_float32(self._dense("a_proj", c.value_heads, "heads")(x_BTD))
        dt_BTG = nn.softplus(a_BTG + _at_least_float32(dt_bias_G)[None, None])
        return -jnp.exp(_at_least_float32(a_log_G))[None, None] * dt_BTG

    def _dense(self, name: str, features: int | tuple[int, ...], axis: str = "", axes: Any = None):
        c = self.config
        axes = axes or ("embed", axis)
        init = nn.initializers.normal(c.initializer_range)
        return Dense(features, axes, init, c.dtype, c.param_dtype, name=name)


def l2_normalise(x: jax.Array) -> jax.Array:
    """x / sqrt(sum x^2 + 1e-6) over the last axis, in float32 or better, back in x's dtype."""
    wide = _at_least_float32(x)
    wide = wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + L2_EPS)
    return wide.astype(x.dtype)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(accumulation_dtype(x.dtype))


def _a_log_init(key, shape, dtype):
    """log of a decay rate drawn uniformly from (0, 16)."""
    rate = jax.random.uniform(key, shape, jnp.float32, minval=1e-6, maxval=16.0)
    return jnp.log(rate).astype(dtype)


def _dt_bias_init(key, shape, dtype):
    """Inverse softplus of a step size drawn log-uniformly from [1e-3, 1e-1]."""
    log_dt = jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1))
    dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)
