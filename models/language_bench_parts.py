"""The parts of a training step, each compiled alone at the model's shapes, forward and backward.

Dimensions: B batch, T tokens, D hidden, N Householder steps, H heads, K key, V value.

The mixer is timed whole and as its recurrence alone: the difference is its projections, short
convolutions, gates and norm.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..kernels import additive_scan, delta_product
from .delta_product import DeltaProduct, DeltaProductConfig
from .layers import SwiGLU, next_token_logits
from .lightnet import Mixer


def parts(
    c: Any, params: Any, ids: np.ndarray, optimizer: optax.GradientTransformation
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions to time and their arguments: the embedding with the head and the loss ("ends"), a
    layer's mixer, its recurrence ("scan") and its MLP, and the optimizer.

    Args:
      c: configuration of the model.
      params: of the model.
      ids: [B, T + 1] tokens.
    """
    shape = (ids.shape[0], ids.shape[1] - 1, c.hidden_size)
    x_BTD = np.random.default_rng(0).standard_normal(shape, np.float32)
    layer = params["layers_0"]
    mixer: Any = DeltaProduct(c) if isinstance(c, DeltaProductConfig) else Mixer(c, causal=True)
    mlp: Any = SwiGLU(c.mlp_size, nn.initializers.zeros, c.dtype, c.param_dtype)
    ends = {name: x for name, x in params.items() if not name.startswith("layers_")}
    module: Any = _Ends(c)

    def loss(ends, x_BTD, ids):
        return cross_entropy(module.apply({"params": ends}, ids[:, :-1], x_BTD), ids)

    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return {
        "ends": (jax.value_and_grad(loss, argnums=(0, 1)), (ends, x_BTD, ids)),
        "mixer": (both(lambda p, x: mixer.apply({"params": p}, x)[0]), (layer["attn"], x_BTD)),
        "scan": scan(c, *shape[:2]),
        "mlp": (both(lambda p, x: mlp.apply({"params": p}, x)), (layer["mlp"], x_BTD)),
        "optimizer": (update, (params, optimizer.init(params), params)),
    }


def cross_entropy(logits_BTS: jax.Array, ids: jax.Array) -> jax.Array:
    """Mean over the tokens, of [B, T + 1], after the first."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BTS, ids[:, 1:]))


def both(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Outputs and gradients in all arguments."""

    def call(*arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(y)

    return call


def scan(c: Any, batch: int, tokens: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The recurrence of one layer, and arrays like those in it at the beginning of training."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((batch, tokens, *shape), np.float32)
    heads, value = c.num_heads, c.value_dim
    if not isinstance(c, DeltaProductConfig):
        arrays = (normal(heads, c.key_dim), normal(heads, c.key_dim), normal(heads, value))
        return both(lambda q, k, v: additive_scan(q, k, v, scale=c.query_scale)[0]), arrays
    steps, unit = c.num_householder, lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    q, k = unit(normal(heads, c.head_dim)), unit(normal(steps, heads, c.head_dim))
    beta = 1 + np.tanh(normal(steps, heads))
    g = -np.log1p(np.exp(normal(heads))) if c.use_forget_gate else None
    arrays = (q, k, normal(steps, heads, value), beta, g)
    return both(lambda *arrays: delta_product(*arrays)[0]), arrays


class _Ends(nn.Module):
    """The embedding, whose result stands before x, and the head behind it."""

    config: Any

    @nn.compact
    def __call__(self, ids, x_BTD):
        c = self.config
        shape = (c.vocab_size, c.hidden_size)
        embedding_SD: Any = self.param("embeddings", nn.initializers.zeros, shape)
        return next_token_logits(x_BTD + embedding_SD[ids], embedding_SD, c)
