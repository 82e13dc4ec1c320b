"""Diffusion transformer with softmax attention (DiT, Peebles and Xie 2023), as a velocity.

Dimensions: B batch, H height, W width, C channels, T tokens, D hidden, N heads, K head width.

Patches get fixed sines and cosines of their places; blocks are conditioned on time and class
through adaLN-Zero, so that every block begins as the identity and the output as 0.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..kernels.dtypes import accumulation_dtype
from ..kernels.per_device import by_rows
from .layers import Dense, attend, parameter
from .lightnet.dit import SIZES, join_patches, time_features
from .limits import DTYPES, at_least, one_of

__all__ = ["SIZES", "DiT", "DiTConfig"]
NORM_EPS = 1e-6
MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer; ``SIZES`` has the published ones.

    Attributes:
      hidden_size: a multiple of 4 (sines and cosines along two axes) and of num_heads.
      num_hidden_layers: blocks.
      num_heads: of the attention.
      patch_size: height and width of a patch; they divide the image.
      num_classes: of the condition; 0 for none. One more label stands for "no class".
      dtype: of the computation. Norms, softmax and the output are in float32 or better.
      param_dtype: of the parameters.
      remat: recompute each block in the backward instead of storing its activations.
    """

    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    patch_size: tuple[int, ...]
    num_classes: int
    dtype: str
    param_dtype: str
    remat: bool

    def __post_init__(self):
        at_least(self, 1, "hidden_size", "num_hidden_layers", "num_heads")
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) must be a multiple of 4 and of"
                f" model.num_heads ({self.num_heads})"
            )
        if len(self.patch_size) != 2 or min(self.patch_size) < 1:
            raise ValueError(f"model.patch_size must be two sizes, got {self.patch_size}")
        if self.num_classes < 0:
            raise ValueError(f"model.num_classes must not be negative, got {self.num_classes}")
        one_of(self, DTYPES, "dtype", "param_dtype")


class DiT(nn.Module):
    """The velocity of an image at a time, for a class."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x_BHWC: jax.Array,
        t_B: jax.Array,
        label_B: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """The velocity dX_t/dt; t = 0 is noise and t = 1 data.

        Args:
          x_BHWC: [B, H, W, C]; the patch must divide H and W.
          t_B: [B] times in [0, 1].
          label_B: [B] int classes, ``num_classes`` for "no class"; None where there are none.
          keys: not used: there is no dropout.

        Returns:
          [B, H, W, C], float32 or better.

        Raises:
          ValueError: if the patch does not divide the image, or labels are missing or too many.
        """
        del keys
        c, patch = self.config, self.config.patch_size
        if (label_B is None) != (c.num_classes == 0):
            raise ValueError(f"model.num_classes is {c.num_classes}: labels must fit that")
        batch, height, width, channels = x_BHWC.shape
        if height % patch[0] or width % patch[1]:
            raise ValueError(
                f"model.patch_size {patch} does not divide images of {height} x {width}"
            )
        grid = height // patch[0], width // patch[1]
        features = patch[0] * patch[1] * channels
        x = x_BHWC.reshape(batch, grid[0], patch[0], grid[1], patch[1], channels)
        x_BTF = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, features)
        x_BTD = _dense(c, c.hidden_size, ("pixels", "embed"), "patches")(x_BTF)
        x_BTD = x_BTD + jnp.asarray(sines_of_places(grid, c.hidden_size), x_BTD.dtype)[None]
        condition_BD = self._condition(t_B, label_B)
        block = nn.remat(Block) if c.remat else Block
        for i in range(c.num_hidden_layers):
            x_BTD = block(c, name=f"layers_{i}")(x_BTD, condition_BD)
        shift, scale = _modulation(c, 2, "modulation", condition_BD)
        x_BTD = _norm(x_BTD) * (1 + scale) + shift
        x_BTF = _dense(c, features, ("embed", "pixels"), "output", zero=True)(x_BTD)
        y = join_patches(x_BTF, grid, patch)
        return y.astype(accumulation_dtype(y.dtype))

    def _condition(self, t_B, label_B):
        """[B, D] of time and class."""
        c, init = self.config, nn.initializers.normal(0.02)
        dense = lambda axes, name: Dense(
            c.hidden_size, axes, init, c.dtype, c.param_dtype, bias=True, name=name
        )
        hidden_BD = nn.silu(dense(("rates", "embed"), "time_in")(time_features(t_B)))
        condition_BD = dense(("embed", "mlp"), "time_out")(hidden_BD)
        if label_B is None:
            return condition_BD
        shape = (c.num_classes + 1, c.hidden_size)
        classes = parameter(self, "classes", init, ("classes", "embed"), shape, c.param_dtype)
        return condition_BD + classes[label_B].astype(c.dtype)


class Block(nn.Module):
    """x + a_1 attention(n_1(x)), then x + a_2 mlp(n_2(x)); n_i(x) = norm(x) (1 + s_i) + b_i.

    a_i, s_i and b_i are linear in silu(condition), and begin as 0.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, condition_BD: jax.Array) -> jax.Array:
        """[B, T, D] and [B, D] -> [B, T, D]."""
        c = self.config
        parts = _modulation(c, 6, "modulation", condition_BD)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        x_BTD = x_BTD + gate_1 * self._attention(_norm(x_BTD) * (1 + scale_1) + shift_1)
        return x_BTD + gate_2 * self._mlp(_norm(x_BTD) * (1 + scale_2) + shift_2)

    def _attention(self, x_BTD):
        c = self.config
        split = lambda y: y.reshape(*y.shape[:2], c.num_heads, -1)
        qkv = _dense(c, 3 * c.hidden_size, ("embed", "heads"), "qkv")(x_BTD)
        q_BTNK, k_BTNK, v_BTNK = map(split, jnp.split(qkv, 3, axis=-1))
        o_BTNK = attend(q_BTNK, k_BTNK, v_BTNK)
        return _dense(c, c.hidden_size, ("heads", "embed"), "out")(o_BTNK.reshape(x_BTD.shape))

    def _mlp(self, x_BTD):
        c, size = self.config, MLP_RATIO * self.config.hidden_size
        hidden_BTF = nn.gelu(_dense(c, size, ("embed", "mlp"), "mlp_in")(x_BTD), approximate=True)
        return _dense(c, c.hidden_size, ("mlp", "embed"), "mlp_out")(hidden_BTF)


def sines_of_places(grid: tuple[int, int], width: int) -> np.ndarray:
    """Of all places of a grid, row by row: [T, width] float32.

    A quarter of the channels each: sines and cosines of the row, then of the column, at rates
    10,000^(-4 i / width).
    """
    rate_F = 10_000.0 ** (-4 * np.arange(width // 4) / width)
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [place.reshape(-1, 1) * rate_F[None] for place in (rows, columns)]
    parts = [f(angle) for angle in angles for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def _norm(x_BTD):
    """Layer norm without weights."""
    wide = by_rows(x_BTD.astype(accumulation_dtype(x_BTD.dtype)))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPS)
    return by_rows(wide.astype(x_BTD.dtype))


def _modulation(c: DiTConfig, number: int, name: str, condition_BD) -> list[jax.Array]:
    """``number`` times [B, 1, D], which begin as 0."""
    dense = _dense(c, number * c.hidden_size, ("embed", "mlp"), name, zero=True)
    return jnp.split(dense(nn.silu(condition_BD))[:, None], number, axis=-1)


def _dense(c: DiTConfig, size: int, axes: tuple[str, str], name: str, zero: bool = False) -> Dense:
    init = nn.initializers.zeros if zero else nn.initializers.xavier_uniform()
    return Dense(size, axes, init, c.dtype, c.param_dtype, bias=True, name=name)
