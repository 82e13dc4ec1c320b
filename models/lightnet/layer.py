"""LightNet's token mixer, causal or over a whole grid, and the baselines that can stand in for it.

Dimensions: B batch, T tokens, D hidden, H heads, K key width of a head, V = D / H, M grid axes.

  q = silu(x W_q),  k = x W_k (logits),  v = x W_v,  gate u = x W_u1 W_u2
  o = additive recurrence of q, k, v (causal), or the summary of all tokens (else)
  y = (RMSNorm(o) * silu(u)) W_o

with the norm over all heads together (Qin et al. 2024; published layer: flash-linear-attention).
Keys are normalised over the tokens first and turned by MD-LRPE second.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels import additive_attention, additive_scan, additive_step
from ...kernels.dtypes import accumulation_dtype
from ...kernels.per_device import tokens_of_heads_together
from ..layers import Dense, RMSNorm, ShortConv, parameter, segment_runs, tokens_up_to_last
from . import baselines, lrpe
from .config import LightNetConfig

OUTPUT_EPS = 1e-6  # of the output norm, whatever norm_eps is, as in the published layer
GLA_RANK = 16  # of the decay's projection in gated linear attention
GLA_TEMPERATURE = 16.0  # divides its log decays


class LayerCache(NamedTuple):
    """What decoding carries from token to token.

    Attributes:
      s: [B, H, K', V], float32 or better; K' = 2 K in the cosine form.
      z: [B, H, K'] log normaliser of the keys; of linear attention: [B, H, K] sum of its keys; of
        gated linear attention: None.
      conv_q, conv_k, conv_v: [B, W-1, H K or D] last inputs of the convolutions, or None.
    """

    s: jax.Array
    z: jax.Array | None
    conv_q: jax.Array | None
    conv_k: jax.Array | None
    conv_v: jax.Array | None


class Mixer(nn.Module):
    """Token mixer; see ``LightNetConfig`` for the switches.

    Attributes:
      causal: tokens see those before them; else all of the row.
    """

    config: LightNetConfig
    causal: bool

    @nn.compact
    def __call__(
        self, x_BTD, place_BTM=None, *, mask=None, segment_ids=None, cache: LayerCache | None = None
    ):
        """Mixes tokens.

        Args:
          x_BTD: [B, T, D].
          place_BTM: [B or 1, T, M] whole numbers, places for MD-LRPE; needed where it is on.
          mask: [B, T] bool, True = a token. The others are not seen, and their y is 0. For the
            convolution they may stand before a row's first token or after its last one.
          segment_ids: [B, T] integers; tokens see their segment alone (causal "lightnet" and
            "softmax").
          cache: continue after earlier tokens (causal, not "softmax").

        Returns:
          y [B, T, D], and the cache after the last token; None where there is none.
        """
        c, width = self.config, x_BTD.shape[-1]
        if mask is not None:
            x_BTD = jnp.where(mask[..., None], x_BTD, 0)
        runs_BT = segment_runs(segment_ids, mask)
        place = (runs_BT, cache, tokens_up_to_last(mask))
        q_BTHK, conv_q = self._project(x_BTD, "q", c.key_dim, *place)
        k_BTHK, conv_k = self._project(x_BTD, "k", c.key_dim, *place)
        v_BTHV, conv_v = self._project(x_BTD, "v", width // c.num_heads, *place)
        angle = None
        if c.use_lrpe:
            lrpe.check_places(place_BTM, *x_BTD.shape[:2])
            angle = self._angles(place_BTM)
        o_BTHV, s, z = self._mix(x_BTD, q_BTHK, k_BTHK, v_BTHV, angle, mask, runs_BT, cache)
        o_BTHV = self._gated(x_BTD, o_BTHV)
        o_BTD = o_BTHV.reshape(*o_BTHV.shape[:2], width)
        y_BTD = self._dense("o_proj", width, ("heads", "embed"))(o_BTD)
        if mask is not None:
            y_BTD = jnp.where(mask[..., None], y_BTD, 0)
        return y_BTD, None if s is None else LayerCache(s, z, conv_q, conv_k, conv_v)

    def _mix(self, x, q, k, v, angle, mask, segment_ids, cache):
        """o [B, T, H, V], and the state's two parts or None."""
        c, rotation = self.config, lrpe.is_rotation(self.config.theta_type)
        if c.mixer == "lightnet":
            return self._lightnet(q, k, v, angle, mask, segment_ids, cache)
        turn = lambda x: x if angle is None else lrpe.turn(x, angle, rotation)
        if c.mixer == "softmax":
            if cache is not None:
                raise ValueError("softmax attention has no state to continue from")
            options = {"causal": self.causal, "scale": c.query_scale}
            options |= {"mask": mask, "segment_ids": segment_ids}
            return baselines.softmax_attention(turn(q), turn(k), v, **options), None, None
        if segment_ids is not None:
            raise ValueError(f"mixer {c.mixer!r} knows no segments: use rows of one document")
        state, total = (None, None) if cache is None else (cache.s, cache.z)
        if c.mixer == "linear":
            q, k = baselines.features(q), baselines.features(k)
            k = _only(k, mask)
            below, total = baselines.normaliser(q, k, causal=self.causal, start=total)
            if self.causal:
                o, state = baselines.gated_linear_attention(turn(q), turn(k), v, state=state)
            else:
                wide = accumulation_dtype(k.dtype)
                state = jnp.einsum("bthk,bthv->bhkv", turn(k).astype(wide), v.astype(wide))
                o = jnp.einsum("bthk,bhkv->bthv", turn(q).astype(wide), state)
            o = o / jnp.where(below == 0, 1, below)[..., None].astype(o.dtype)
            return (o.astype(q.dtype), *((state, total) if self.causal else (None, None)))
        g = self._log_decay(x, mask)
        q, k = c.query_scale * q, _only(k, mask)
        if angle is not None and not rotation:
            g = jnp.concatenate([g, g], axis=-1)
        if c.mixer == "gla_two_scans":
            return baselines.two_scans(turn(q), turn(k), v, g), None, None
        o, state = baselines.gated_linear_attention(turn(q), turn(k), v, g, state=state)
        return (o, state, None) if self.causal else (o, None, None)

    def _lightnet(self, q, k, v, angle, mask, segment_ids, cache):
        c, factor = self.config, None
        q = nn.silu(q)
        if angle is not None:
            q, k, factor = lrpe.turn_additive(q, k, angle, lrpe.is_rotation(c.theta_type))
        options = {"k_factor": factor, "scale": c.query_scale}
        if not self.causal:
            if segment_ids is not None:
                raise ValueError("without causality there are no segments: use one per row")
            return additive_attention(q, k, v, mask=mask, **options), None, None
        state = None if cache is None else (cache.s, cache.z)
        if state is not None and q.shape[1] == 1 and mask is None and segment_ids is None:
            options["k_factor"] = None if factor is None else factor[:, 0]
            o, state = additive_step(q[:, 0], k[:, 0], v[:, 0], state, **options)
            return o[:, None], *state
        implementation = None if c.implementation == "auto" else c.implementation
        options |= {"mask": mask, "segment_ids": segment_ids, "implementation": implementation}
        o, state = additive_scan(q, k, v, initial_state=state, **options)
        return o, *state

    def _angles(self, place_BTM):
        """[B or 1, T, H or 1, E] of MD-LRPE."""
        c = self.config
        rotation = lrpe.is_rotation(c.theta_type)
        table = lrpe.theta_table(c.theta_type, c.num_heads, c.key_dim, place_BTM.shape[-1])
        dtype = accumulation_dtype(jnp.dtype(c.dtype))
        theta: Any = jnp.asarray(table, dtype)
        if c.learn_theta:
            init = lambda _key, shape, dtype: jnp.asarray(table, dtype).reshape(shape)
            theta = parameter(self, "theta", init, ("rates_heads", "rates"), table.shape, dtype)
        return lrpe.angles(theta, place_BTM, c.key_dim // 2 if rotation else c.key_dim)

    def _log_decay(self, x_BTD, mask):
        """Of gated linear attention: [B, T, H, K], 0 where there is no token."""
        c = self.config
        low = self._dense("decay_in", GLA_RANK, ("embed", "rank"))(x_BTD)
        axes = ("rank", "heads")
        g = self._dense("decay_out", c.num_heads * c.key_dim, axes, bias=True)(low)
        g = nn.log_sigmoid(g.astype(accumulation_dtype(g.dtype))) / GLA_TEMPERATURE
        g = jnp.maximum(g, baselines.MIN_LOG_DECAY).reshape(*g.shape[:2], c.num_heads, -1)
        return _only(g, mask)

    def _gated(self, x_BTD, o_BTHV):
        """Norm over all heads, and gate."""
        c = self.config
        if c.mixer == "softmax":
            return o_BTHV
        norm = RMSNorm(
            OUTPUT_EPS, "heads", c.dtype, c.param_dtype, c.elementwise_affine, 2, name="g_norm"
        )
        if c.output_gate == "none":
            return norm(o_BTHV)
        low = self._dense("g_proj_0", c.gate_low_rank_dim, ("embed", "rank"))(x_BTD)
        u_BTHV = self._dense("g_proj_1", o_BTHV.shape[2:], ("rank", "heads"))(low)
        u_BTHV = tokens_of_heads_together(u_BTHV, c.implementation)
        if c.output_gate == "silu":
            return norm(o_BTHV) * nn.silu(u_BTHV)
        return norm(o_BTHV * nn.sigmoid(u_BTHV))

    def _project(self, x_BTD, name: str, width: int, runs_BT, cache, end_B):
        """Projection to heads of this width and short convolution, with its history."""
        c = self.config
        x = self._dense(f"{name}_proj", (c.num_heads, width), ("embed", "heads"))(x_BTD)
        x = tokens_of_heads_together(x, c.implementation)
        if not c.use_short_conv:
            return x, None
        history = None if cache is None else getattr(cache, f"conv_{name}")
        conv = ShortConv(
            c.conv_size,
            "heads",
            nn.initializers.normal(c.initializer_range),
            c.dtype,
            c.param_dtype,
            implementation="xla" if c.implementation in ("xla", "reference") else None,
            name=f"{name}_conv1d",
        )
        return conv(x, runs_BT, history, end_B)

    def _dense(
        self, name: str, features: int | tuple[int, ...], axes: tuple[str, str], bias: bool = False
    ):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        return Dense(features, axes, init, c.dtype, c.param_dtype, bias=bias, name=name)


def _only(x_BTHK, mask_BT):
    return x_BTHK if mask_BT is None else jnp.where(mask_BT[:, :, None, None], x_BTHK, 0)
