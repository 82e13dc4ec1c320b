"""Classifier of images, and of anything else on a grid: patches, MD-TPE, blocks, a linear head.

Dimensions: B batch, C channels, M grid axes, T tokens, D hidden, L layers.

Nothing is scanned: every layer summarises the whole grid at once (``additive_attention``).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ..layers import Dense, RMSNorm, parameter
from . import lrpe
from .block import Patches, block_of, positions
from .config import LightNetGridConfig


class LightNetClassifier(nn.Module):
    """Which class a grid belongs to."""

    config: LightNetGridConfig

    def __call__(self, x: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Classifies.

        Args:
          x: [B, m_1, ..., m_M, C]; the patch must divide every side.
          keys: [B] PRNG keys of the stochastic depth; None (evaluation) leaves nothing out.

        Returns:
          Logits [B, num_classes], float32 or better.

        Raises:
          ValueError: if the patch does not divide the sides.
        """
        return self.features_and_logits(x, keys=keys)[1]

    @nn.compact
    def features_and_logits(
        self, x: jax.Array, *, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What the head sees, [B, D], and the logits; arguments as for the call."""
        c = self.config
        x = Patches(c, c.patch_size, name="patches")(x)
        grid = x.shape[1:-1]
        if c.tpe != "none":
            x, _ = positions(c, len(grid), "tpe")(x)
        x_BTD = x.reshape(x.shape[0], -1, x.shape[-1])
        init = nn.initializers.normal(c.initializer_range)
        if c.class_token:
            axes, shape = ("embed",), (c.hidden_size,)
            token_D = parameter(self, "class_token", init, axes, shape, c.param_dtype)
            token_B1D = jnp.broadcast_to(token_D.astype(c.dtype), (x.shape[0], 1, c.hidden_size))
            x_BTD = jnp.concatenate([token_B1D, x_BTD], axis=1)
        place_1TM = lrpe.places(grid, extra=int(c.class_token))
        keep_L2B = None if keys is None or not c.drop_path else survival(c, keys)
        for i in range(c.num_hidden_layers):
            keep_2B = None if keep_L2B is None else keep_L2B[i]
            block = block_of(c)(c, False, name=f"layers_{i}")
            x_BTD, _ = block(x_BTD, place_1TM, keep_2B=keep_2B)
        x_BTD = RMSNorm(c.norm_eps, "embed", c.dtype, c.param_dtype, name="norm")(x_BTD)
        x_BD = x_BTD[:, 0] if c.class_token else jnp.mean(x_BTD, axis=1)
        wide, axes = accumulation_dtype(x_BD.dtype), ("embed", "classes")
        head = Dense(c.num_classes, axes, init, c.dtype, c.param_dtype, wide, True, name="head")
        return x_BD, head(x_BD)


def survival(c: LightNetGridConfig, keys: jax.Array) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): [L, 2, B], 0 or 1 / (1 - rate) per branch and row.

    The rate rises linearly from 0 in the first layer to ``drop_path`` in the last.
    """
    layers = c.num_hidden_layers
    rate_L = c.drop_path * jnp.arange(layers, dtype=jnp.float32) / max(layers - 1, 1)
    draw = lambda key: jax.random.uniform(key, (layers, 2))
    uniform_L2B = jnp.moveaxis(jax.vmap(draw)(keys), 0, -1)
    kept_L11 = 1 - rate_L[:, None, None]
    return jnp.where(uniform_L2B < kept_L11, 1 / kept_L11, 0)
