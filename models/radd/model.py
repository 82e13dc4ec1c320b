"""RADD's network: a transformer that predicts all masked tokens from those that are not.

Dimensions: B batch, T tokens, D hidden, H heads, K head width, F feed-forward, S vocabulary.

The probability of a token given the unmasked ones does not depend on the time (Ou et al. 2025,
Theorem 1), so nothing here is told the time: SEDD's transformer without its modulations. Blocks are
pre-norm and see the whole row; positions are rotary, in queries and keys.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ...kernels.per_device import by_rows
from ..layers import Dense, LayerNorm, attend, dropout, parameter, rotate, uniform
from .config import RADDConfig

NORM_EPS = 1e-5
MLP_RATIO = 4


class RADD(nn.Module):
    """ids [B, T] -> logits [B, T, S]; ``body`` and ``head`` are its two parts.

    The last column, the mask's, means nothing: probabilities are the softmax over those before it.
    """

    config: RADDConfig

    def setup(self):
        c = self.config
        axes, shape = ("vocab", "embed"), (c.vocab_size, c.hidden_size)
        init = uniform(c.hidden_size)
        self.embeddings = parameter(self, "embeddings", init, axes, shape, c.param_dtype)
        block = nn.remat(Block) if c.remat else Block
        self.layers = [block(c) for _ in range(c.num_hidden_layers)]
        self.norm = _norm(c)
        self.lm_head = Dense(
            c.vocab_size,
            ("embed", "vocab"),
            nn.initializers.zeros,
            c.dtype,
            c.param_dtype,
            accumulation_dtype(c.dtype),
            bias=True,
        )

    def __call__(self, ids: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """Logits of the token at every position.

        Args:
          ids: [B, T] int, the mask is S - 1.
          keys: [B] PRNG keys of the rows' dropout; None (evaluation) drops nothing.

        Returns:
          [B, T, S], float32 or better.
        """
        return self.head(self.body(ids, keys=keys))

    def body(self, ids: jax.Array, *, keys: jax.Array | None = None) -> jax.Array:
        """[B, T] -> what ``head`` reads, [B, T, D]."""
        c = self.config
        x_BTD = by_rows(self.embeddings[ids].astype(c.dtype))
        own = lambda n: None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, n)
        for i, block in enumerate(self.layers):
            x_BTD = block(x_BTD, own(2 * i), own(2 * i + 1))
        return x_BTD

    def head(self, x: jax.Array) -> jax.Array:
        """[..., D] -> logits [..., S]: of chosen positions, where only they are wanted."""
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: RADDConfig

    @nn.compact
    def __call__(self, x_BTD, attn_keys_B: jax.Array | None, mlp_keys_B: jax.Array | None):
        """[B, T, D] -> [B, T, D]; the keys are those of the branches' dropout, one per row."""
        c = self.config
        y_BTD = Attention(c, name="attn")(_norm(c, "attn_norm")(x_BTD))
        x_BTD = x_BTD + dropout(y_BTD, c.dropout, attn_keys_B)
        y_BTD = MLP(c, name="mlp")(_norm(c, "mlp_norm")(x_BTD))
        return x_BTD + dropout(y_BTD, c.dropout, mlp_keys_B)


class Attention(nn.Module):
    """softmax(q k / sqrt(K)) v over the whole row, q and k turned by their places."""

    config: RADDConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, shape = self.config, x_BTD.shape
        init, split = uniform(c.hidden_size), (*shape[:2], c.num_heads, c.head_dim)
        dense = lambda name, axes, x: Dense(
            c.hidden_size, axes, init, c.dtype, c.param_dtype, name=f"{name}_proj"
        )(x)
        q, k, v = (dense(name, ("embed", "heads"), x_BTD).reshape(split) for name in "qkv")
        place_T = jnp.arange(shape[1], dtype=jnp.int32)
        q, k = (rotate(x, place_T, c.rope_theta) for x in (q, k))
        return dense("o", ("heads", "embed"), attend(q, k, v).reshape(shape))


class MLP(nn.Module):
    """down(gelu(up(x))), with biases and the tanh form of gelu."""

    config: RADDConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, hidden = self.config, self.config.hidden_size
        dense = lambda name, width, inputs, axes, x: Dense(
            width,
            axes,
            uniform(inputs),
            c.dtype,
            c.param_dtype,
            bias=True,
            bias_init=uniform(inputs),
            name=f"{name}_proj",
        )(x)
        wide = MLP_RATIO * hidden
        h_BTF = nn.gelu(dense("up", wide, hidden, ("embed", "mlp"), x_BTD), approximate=True)
        return dense("down", hidden, wide, ("mlp", "embed"), h_BTF)


def _norm(c: RADDConfig, name: str | None = None) -> LayerNorm:
    """Both weight and bias begin at 1, as published."""
    ones = nn.initializers.ones
    return LayerNorm(NORM_EPS, "embed", c.dtype, c.param_dtype, ones, name=name)
