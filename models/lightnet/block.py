"""LightNet's block: x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)).

Dimensions: B batch, T tokens, D hidden.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers import Dense, RMSNorm, SwiGLU
from .config import LightNetConfig
from .layer import Mixer
from .tpe import MDTPE


class Block(nn.Module):
    """One layer of a model.

    Attributes:
      causal: see ``Mixer``.

    A condition makes it adaLN-Zero (Peebles and Xie 2023): shifts and scales of both norms'
    outputs, and gates on both branches, are projections of it that begin at 0, the block at the
    identity.
    """

    config: LightNetConfig
    causal: bool

    @nn.compact
    def __call__(
        self,
        x_BTD,
        place_BTM=None,
        mask=None,
        segment_ids=None,
        cache=None,
        condition_BD=None,
        keep_2B=None,
    ):
        """Arguments of ``Mixer``, and:

        Args:
          condition_BD: [B, D], or None.
          keep_2B: [2, B] factors on the branches of each row (stochastic depth), or None.

        Returns:
          y [B, T, D] and the cache.
        """
        c = self.config
        parts = None
        if condition_BD is not None:
            modulation = zero_dense(c, 6 * c.hidden_size, "mlp", name="modulation")
            parts = jnp.split(modulation(nn.silu(condition_BD))[:, None], 6, axis=-1)

        def branch(x, i, name, function):
            affine, name = parts is None, f"{name}_norm"
            h = RMSNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, affine, name=name)(x)
            if parts is None:
                h, cache = function(h)
            else:
                shift, scale, gate = parts[3 * i : 3 * i + 3]
                h, cache = function(h * (1 + scale) + shift)
                h = gate * h
            if keep_2B is not None:
                h = h * keep_2B[i][:, None, None].astype(h.dtype)
            return x + h, cache

        options = {"mask": mask, "segment_ids": segment_ids, "cache": cache}
        mixer = Mixer(c, self.causal, name="attn")
        x_BTD, cache = branch(x_BTD, 0, "attn", lambda h: mixer(h, place_BTM, **options))
        init = nn.initializers.normal(c.initializer_range)
        mlp = SwiGLU(c.mlp_size, init, c.dtype, c.param_dtype, name="mlp")
        x_BTD, _ = branch(x_BTD, 1, "mlp", lambda h: (mlp(h), None))
        return x_BTD, cache


def block_of(c: LightNetConfig) -> type[nn.Module]:
    """``Block``, recomputed in the backward if the config says so."""
    return nn.remat(Block) if c.remat else Block


def zero_dense(c: LightNetConfig, features: int, axis: str, name: str) -> Dense:
    """A projection with a bias that begins at 0."""
    axes, zeros = ("embed", axis), nn.initializers.zeros
    return Dense(features, axes, zeros, c.dtype, c.param_dtype, bias=True, name=name)


def positions(c: LightNetConfig, axes: int, name: str) -> MDTPE:
    """The config's MD-TPE, for a grid with so many axes."""
    init = nn.initializers.normal(c.initializer_range)
    both, share = c.tpe == "bidirectional", c.tpe_share_axes
    return MDTPE(axes, c.num_heads, both, share, init, c.dtype, c.param_dtype, name=name)


class Patches(nn.Module):
    """Cuts a grid into patches and projects each: the tokens of ``Grid`` models.

    Raises:
      ValueError: if the patch does not divide the grid, or has another number of axes.
    """

    config: LightNetConfig
    patch_size: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, m_1, ..., m_M, C] -> [B, m_1 / p_1, ..., m_M / p_M, D]."""
        c, patch = self.config, self.patch_size
        sizes = x.shape[1:-1]
        if len(sizes) != len(patch) or any(m % p for m, p in zip(sizes, patch, strict=True)):
            raise ValueError(
                f"model.patch_size {_times(patch)} does not divide inputs of {_times(sizes)}: every"
                " side must be a multiple of the patch's"
            )
        pairs = [size for m, p in zip(sizes, patch, strict=True) for size in (m // p, p)]
        order = (0, *range(1, len(pairs), 2), *range(2, len(pairs) + 1, 2), len(pairs) + 1)
        x = x.reshape(x.shape[0], *pairs, x.shape[-1]).transpose(order)
        x = x.reshape(*x.shape[: 1 + len(patch)], -1)
        axes, init = ("pixels", "embed"), nn.initializers.normal(c.initializer_range)
        embed = Dense(
            c.hidden_size, axes, init, c.dtype, c.param_dtype, bias=True, name="projection"
        )
        return embed(x)


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
