"""The diffusion transformer (Peebles and Xie 2023): softmax attention over the patches of an image.

Dimensions: B batch, H height, W width, C channels, T tokens (patches), D hidden, N heads.

Blocks are conditioned on time and class through adaLN-Zero, so that the network begins at 0. Places
are sines and cosines that are not trained. LightNet's version, with a linear recurrence in place of
the attention, is ``LightNetDiT``.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..kernels.dtypes import accumulation_dtype
from .layers import Dense, Initializer, attend, parameter
from .lightnet.dit import SIZES, join_patches, time_features

EPS = 1e-6  # of the norms
MLP_RATIO = 4
MAX_PERIOD = 10_000.0  # of the places' sines
XAVIER = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
SMALL = nn.initializers.normal(0.02)
ZERO = nn.initializers.zeros
DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer; ``SIZES`` has the published shapes.

    Attributes:
      hidden_size: width of the residual stream, a multiple of 4.
      num_hidden_layers: number of blocks.
      num_heads: divides hidden_size.
      patch_size: height and width of a patch.
      num_classes: of the condition; 0 for none. One more label stands for "no class".
      dtype: of the computation. Norms and softmax are in float32 or better.
      param_dtype: of the parameters.
      remat: recompute each block in the backward instead of storing its activations.
    """

    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    patch_size: int
    num_classes: int
    dtype: str
    param_dtype: str
    remat: bool

    def __post_init__(self):
        least = {"num_hidden_layers": 1, "num_heads": 1, "patch_size": 1, "num_classes": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(
                    f"model.{name} must be at least {number}, got {getattr(self, name)}"
                )
        if self.hidden_size < 4 or self.hidden_size % 4:
            raise ValueError(f"model.hidden_size must be a multiple of 4, got {self.hidden_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must divide model.hidden_size"
                f" ({self.hidden_size})"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"model.{name} must be one of {', '.join(DTYPES)}; got {getattr(self, name)!r}"
                )


def size(name: str) -> dict[str, int]:
    """The published shape "S", "B", "L" or "XL", as fields of a config; a ValueError otherwise."""
    if name not in SIZES:
        raise ValueError(f"unknown size {name!r}; choose one of {', '.join(SIZES)}")
    fields = ("hidden_size", "num_hidden_layers", "num_heads")
    return dict(zip(fields, SIZES[name], strict=True))


class DiT(nn.Module):
    """Velocity of an image at a time, for a class."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BHWC, t_B, label_B=None, *, keys=None) -> jax.Array:
        """The velocity dX_t/dt; t = 0 is noise and t = 1 data.

        Args:
          x_BHWC: [B, H, W, C] images at time t; the patch must divide both sides.
          t_B: [B] times in [0, 1].
          label_B: [B] int classes, ``num_classes`` for "no class"; None where there are none.
          keys: of all backbones; not needed here, where nothing is random.

        Returns:
          [B, H, W, C], float32 or better.

        Raises:
          ValueError: if the patch does not divide the image, or labels are missing or too many.
        """
        del keys
        c, p = self.config, self.config.patch_size
        if (label_B is None) != (c.num_classes == 0):
            raise ValueError(f"model.num_classes is {c.num_classes}: labels must fit that")
        batch, height, width, channels = x_BHWC.shape
        if height % p or width % p:
            raise ValueError(
                f"model.patch_size {p} does not divide inputs of {height} x {width}: every side"
                " must be a multiple of it"
            )
        grid = (height // p, width // p)
        patches = x_BHWC.reshape(batch, grid[0], p, grid[1], p, channels).swapaxes(2, 3)
        x_BTF = patches.reshape(batch, grid[0] * grid[1], p * p * channels)
        x_BTD = _dense(c, c.hidden_size, ("pixels", "embed"), XAVIER, "patches")(x_BTF)
        x_BTD = x_BTD + jnp.asarray(places(grid, c.hidden_size), c.dtype)[None]
        condition_BD = nn.silu(self._condition(t_B, label_B))
        block = nn.remat(Block) if c.remat else Block
        for i in range(c.num_hidden_layers):
            x_BTD = block(c, name=f"layers_{i}")(x_BTD, condition_BD)
        modulation = _dense(c, 2 * c.hidden_size, ("embed", "mlp"), ZERO, "modulation")
        shift, scale = jnp.split(modulation(condition_BD)[:, None], 2, axis=-1)
        h_BTD = _norm(x_BTD) * (1 + scale) + shift
        output = _dense(c, p * p * channels, ("embed", "pixels"), ZERO, "output")
        y = join_patches(output(h_BTD), grid, (p, p))
        return y.astype(accumulation_dtype(y.dtype))

    def _condition(self, t_B, label_B):
        """[B, D] of time and class."""
        c = self.config
        first = _dense(c, c.hidden_size, ("rates", "embed"), SMALL, "time_in")
        second = _dense(c, c.hidden_size, ("embed", "mlp"), SMALL, "time_out")
        condition_BD = second(nn.silu(first(time_features(t_B))))
        if label_B is None:
            return condition_BD
        axes, shape = ("classes", "embed"), (c.num_classes + 1, c.hidden_size)
        classes = parameter(self, "classes", SMALL, axes, shape, c.param_dtype)
        return condition_BD + classes[label_B].astype(c.dtype)


class Block(nn.Module):
    """x + a1 attention(norm(x) (1 + g1) + b1), then x + a2 mlp(norm(x) (1 + g2) + b2)."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array) -> jax.Array:
        """[B, T, D] and [B, D], silu of the condition -> [B, T, D]."""
        c, d = self.config, self.config.hidden_size
        modulation = _dense(c, 6 * d, ("embed", "mlp"), ZERO, "modulation")
        b1, g1, a1, b2, g2, a2 = jnp.split(modulation(condition_BD)[:, None], 6, axis=-1)
        qkv = _dense(c, 3 * d, ("embed", "heads"), XAVIER, "qkv")(_norm(x_BTD) * (1 + g1) + b1)
        heads = lambda y: y.reshape(*y.shape[:2], c.num_heads, d // c.num_heads)
        o_BTD = attend(*map(heads, jnp.split(qkv, 3, axis=-1))).reshape(x_BTD.shape)
        x_BTD = x_BTD + a1 * _dense(c, d, ("heads", "embed"), XAVIER, "proj")(o_BTD)
        up = _dense(c, MLP_RATIO * d, ("embed", "mlp"), XAVIER, "up")
        down = _dense(c, d, ("mlp", "embed"), XAVIER, "down")
        h_BTD = nn.gelu(up(_norm(x_BTD) * (1 + g2) + b2), approximate=True)
        return x_BTD + a2 * down(h_BTD)


def places(grid: tuple[int, int], width: int) -> jax.Array:
    """Sines and cosines of column and row, D/4 of each, at rates from 1 to 1e-4: [T, D] float32."""
    quarter = width // 4
    rate = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(quarter, dtype=jnp.float32) / quarter)
    row, column = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in grid), indexing="ij")
    parts = []
    for axis in (column, row):
        angle_TF = axis.reshape(-1, 1) * rate[None]
        parts += [jnp.sin(angle_TF), jnp.cos(angle_TF)]
    return jnp.concatenate(parts, axis=-1)


def _norm(x_BTD: jax.Array) -> jax.Array:
    """LayerNorm without weights, in float32 or better; the result in x's dtype."""
    x = x_BTD.astype(accumulation_dtype(x_BTD.dtype))
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
    return x.astype(x_BTD.dtype)


def _dense(c: DiTConfig, features: int, axes: tuple[str, str], init: Initializer, name: str):
    return Dense(features, axes, init, c.dtype, c.param_dtype, bias=True, name=name)
