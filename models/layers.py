"""Layers that several families share: projections, norms, SwiGLU, short convolution, attention,
rotary positions, dropout.

Dimensions: B batch, T tokens, H heads, K key, V value, D hidden, F feed-forward, W convolution
width.

Every parameter carries logical axis names (``"embed"``, ``"heads"``, ``"mlp"``, ...);
which mesh axis a name is split over is decided in ``scanax.train.mesh``, not here.
"""

from collections.abc import Callable
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..kernels import short_convolution
from ..kernels.dtypes import accumulation_dtype
from ..kernels.per_device import by_heads, by_rows

Initializer = Callable[..., jax.Array]
DType = str | jnp.dtype


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: DType,
) -> jax.Array:
    """A parameter of ``module`` with a logical axis name per dimension."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    return value


def uniform(inputs: int):
    """An initializer: uniform within 1 / sqrt(inputs)."""
    bound = inputs**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def product_of_rows(x: jax.Array, kernel: jax.Array, dtype: DType | None) -> jax.Array:
    """x @ kernel, [..., in] and [in, *out] -> [..., *out], with sums and result in ``dtype``.

    With one dimension of outputs all rows make one matrix: the kernel's gradient then needs no
    transposed copies on CPU. With heads they stay apart, for a TPU to write heads before tokens.
    """
    rows = x.reshape(-1, x.shape[-1]) if kernel.ndim == 2 else x
    y = jnp.tensordot(rows, kernel, axes=1, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


class Dense(nn.Module):
    """x @ kernel (+ bias); kernel [in, features] with two logical axis names.

    Attributes:
      features: their number; or (H, K), or (N, H, K) for N steps, of H heads of width K. Ask for
        heads here and not after a convolution: a TPU then writes the tokens of a head in one place,
        where the scans read them.
      out_dtype: of the sums and the result; ``dtype`` if None.
    """

    features: int | tuple[int, ...]
    axes: tuple[str, str]
    kernel_init: Initializer
    dtype: DType
    param_dtype: DType
    out_dtype: DType | None = None
    bias: bool = False
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., *features] in ``out_dtype``."""
        features = (self.features,) if isinstance(self.features, int) else self.features
        shape = (x.shape[-1], math.prod(features))
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, shape, self.param_dtype)
        x, kernel = x.astype(self.dtype), by_heads(kernel.astype(self.dtype), features)
        y = product_of_rows(x, kernel, self.out_dtype).reshape(*x.shape[:-1], *features)
        if not self.bias:
            return y
        axes, shape = self.axes[1:], shape[1:]
        bias_F = parameter(self, "bias", self.bias_init, axes, shape, self.param_dtype)
        bias = bias_F.astype(y.dtype).reshape(features)
        return y + jnp.expand_dims(bias, range(x.ndim - 1))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) (* scale) over the last ``axes`` axes, in float32 or better.

    On a mesh, the rows before and after stay where they are (``by_rows``).
    """

    eps: float
    axis_name: str
    dtype: DType
    param_dtype: DType
    affine: bool = True
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *D] -> [..., *D] in ``dtype``."""
        x = by_rows(x.astype(accumulation_dtype(x.dtype)))
        axes, features = tuple(range(-self.axes, 0)), x.shape[-self.axes :]
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + self.eps)
        if not self.affine:
            return by_rows(x.astype(self.dtype))
        names, shape = (self.axis_name,), (math.prod(features),)
        scale_D = parameter(self, "scale", nn.initializers.ones, names, shape, self.param_dtype)
        scale = scale_D.astype(x.dtype).reshape(features)
        x = x * jnp.expand_dims(scale, range(x.ndim - self.axes))
        return by_rows(x.astype(self.dtype))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32 or better.

    On a mesh, the rows before and after stay where they are (``by_rows``).
    """

    eps: float
    axis_name: str
    dtype: DType
    param_dtype: DType
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in ``dtype``."""
        x = by_rows(x.astype(accumulation_dtype(x.dtype)))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        axes, shape, init = (self.axis_name,), (x.shape[-1],), nn.initializers
        scale_D = parameter(self, "scale", init.ones, axes, shape, self.param_dtype)
        bias_D = parameter(self, "bias", self.bias_init, axes, shape, self.param_dtype)
        wide = lambda y: jnp.expand_dims(y.astype(x.dtype), range(x.ndim - 1))
        return by_rows((x * wide(scale_D) + wide(bias_D)).astype(self.dtype))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    intermediate_size: int
    kernel_init: Initializer
    dtype: DType
    param_dtype: DType

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        dense = lambda features, axes, name: Dense(
            features, axes, self.kernel_init, self.dtype, self.param_dtype, name=name
        )
        gate_BTF = dense(self.intermediate_size, ("embed", "mlp"), "gate_proj")(x_BTD)
        up_BTF = dense(self.intermediate_size, ("embed", "mlp"), "up_proj")(x_BTD)
        hidden_BTF = nn.silu(gate_BTF) * up_BTF
        return dense(x_BTD.shape[-1], ("mlp", "embed"), "down_proj")(hidden_BTF)


class ShortConv(nn.Module):
    """Depthwise causal convolution over time without bias, and its activation.

    y_t = activation(sum_i kernel[i] * x_{t-W+1+i}); kernel[W-1] weighs the current token.
    ``activation`` and ``implementation`` are those of ``scanax.kernels.short_convolution``.
    """

    width: int
    axis_name: str
    kernel_init: Initializer
    dtype: DType
    param_dtype: DType
    activation: str | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BTD, segments_BT=None, history=None, end_B=None):
        """Convolves; inputs before the first token come from ``history``.

        Args:
          x_BTD: [B, T, D], where D may be several dimensions, as (N, H, K).
          segments_BT: [B, T] numbers that differ between segments, or None. The history
            belongs to the first token's segment.
          history: [B, W-1, D] with one D, the last inputs before x (newest last), or None for
            zeros.
          end_B: [B] int, how many of the T inputs count for the returned history (what
            follows is padding); None for all.

        Returns:
          y like x, and the history after the last token [B, W-1, D]: the last inputs of that
          token's segment, zeros where the segment is shorter.
        """
        batch, _, *channels = x_BTD.shape
        axes, shape = ("conv", self.axis_name), (self.width, math.prod(channels))
        kernel_WD = parameter(self, "kernel", self.kernel_init, axes, shape, self.param_dtype)
        kernel_WD = by_heads(kernel_WD.astype(self.dtype), channels)
        kernel_WD = kernel_WD.reshape(self.width, *channels)
        x_BTD, shape = x_BTD.astype(self.dtype), (batch, self.width - 1, *channels)
        if history is not None:
            history = history.astype(self.dtype).reshape(shape)
        before = jnp.zeros(shape, self.dtype) if history is None else history
        last = _window(jnp.concatenate([before, x_BTD], axis=1), end_B, self.width - 1)
        if segments_BT is not None:
            padding = ((0, 0), (self.width - 1, 0))
            padded_segments = jnp.pad(segments_BT, padding, mode="edge")
            same = _window(padded_segments, end_B, self.width - 1) == segments_BT[:, -1:]
            last = jnp.where(jnp.expand_dims(same, range(2, x_BTD.ndim)), last, 0)
        y_BTD = short_convolution(
            x_BTD,
            kernel_WD,
            history=history,
            segment_ids=segments_BT,
            activation=self.activation,
            implementation=self.implementation,
        )
        return y_BTD, last.reshape(batch, self.width - 1, -1)


def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array) -> jax.Array:
    """o_i = sum_j softmax_j(<q_i, k_j> / sqrt(K)) v_j over all tokens: [B, T, H, V] in q's dtype.

    Logits and softmax are in float32 or better.
    """
    wide = accumulation_dtype(q_BTHK.dtype)
    q_BTHK = q_BTHK * q_BTHK.shape[-1] ** -0.5
    logits_BHTT = jnp.einsum("bihk,bjhk->bhij", q_BTHK, k_BTHK, preferred_element_type=wide)
    weights_BHTT = jax.nn.softmax(logits_BHTT, axis=-1).astype(v_BTHV.dtype)
    return jnp.einsum("bhij,bjhv->bihv", weights_BHTT, v_BTHV)


def rotate(x_BTHK: jax.Array, place_T: jax.Array, theta: float) -> jax.Array:
    """Turns the pairs (i, i + K / 2) of channels by place * theta^(-2 i / K)."""
    wide, half = accumulation_dtype(x_BTHK.dtype), x_BTHK.shape[-1] // 2
    rate_K = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = (place_T.astype(wide)[:, None] * rate_K[None])[None, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x_BTHK[..., :half].astype(wide), x_BTHK[..., half:].astype(wide)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Zeros with probability ``rate``, to 1 / 65536, and what is left divided by 1 - rate.

    Args:
      x: [B, ...].
      rate: in [0, 1).
      keys_B: [B] PRNG keys, one per row: the noise of a row is its own. None leaves x as it is.
    """
    kept = round((1 - rate) * 2**16)
    if keys_B is None or kept == 2**16:
        return x
    size = x[0].size
    words = jax.vmap(lambda key: jax.random.bits(key, (-(-size // 2),)))(keys_B)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(x.shape[0], -1)
    keep = (halves[:, :size] < jnp.uint16(kept)).reshape(x.shape)
    return jnp.where(keep, x * (2**16 / kept), 0)


def next_token_logits(x_BTD: jax.Array, embedding_SD: jax.Array, config: Any) -> jax.Array:
    """The end of a language model: a norm, and a head or the embedding. [B, T, S], float32 or more.

    Call it where the model is built: "norm" and "lm_head" become submodules of it.

    Args:
      x_BTD: the residual stream.
      embedding_SD: of the tokens.
      config: of the model: vocab_size, tie_word_embeddings, norm_eps, initializer_range, dtypes.
    """
    c = config
    x_BTD = RMSNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, name="norm")(x_BTD)
    wide = accumulation_dtype(x_BTD.dtype)
    if c.tie_word_embeddings:
        weight_DS = embedding_SD.T.astype(c.dtype)
        return product_of_rows(x_BTD, weight_DS, wide)
    init, axes = nn.initializers.normal(c.initializer_range), ("embed", "vocab")
    return Dense(c.vocab_size, axes, init, c.dtype, c.param_dtype, wide, name="lm_head")(x_BTD)


def segment_runs(segment_ids, mask):
    """[B, T] segments numbered by change, so that an id may come back; None if there are none.

    Padding gets the number of the real token before it, whatever its id.
    """
    if segment_ids is None:
        return None
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    runs_BT = jnp.cumsum(jnp.pad(changed, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return runs_BT if mask is None else jax.lax.cummax(jnp.where(mask, runs_BT, 0), axis=1)


def tokens_up_to_last(mask):
    """[B] tokens up to and including the last real one; None without a mask."""
    if mask is None:
        return None
    after_BT = 1 + jnp.broadcast_to(jnp.arange(mask.shape[1])[None], mask.shape)
    return jnp.max(jnp.where(mask, after_BT, 0), axis=1)


def _window(x, start_B, width: int):
    """``width`` entries of [B, T', ...] along axis 1 from start_B on; the last ones if None."""
    if start_B is None:
        return x[:, x.shape[1] - width :]
    index_BW = start_B[:, None] + jnp.arange(width)[None]
    return jnp.take_along_axis(x, index_BW.reshape(index_BW.shape + (1,) * (x.ndim - 2)), axis=1)
