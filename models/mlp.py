"""A multilayer perceptron on pixels: the plain baseline of image classification.

Dimensions: B batch, H height, W width, C channels, D hidden.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from .layers import Dense, RMSNorm, SwiGLU
from .limits import at_least


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes of the perceptron.

    Attributes:
      num_classes: outputs.
      hidden_size: width of the residual stream.
      num_hidden_layers: SwiGLU blocks.
      intermediate_size: width inside a block.
    """

    num_classes: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int

    def __post_init__(self):
        at_least(self, 1, *(field.name for field in dataclasses.fields(self)))


class MLP(nn.Module):
    """Flattened pixels, residual SwiGLU blocks with pre-RMSNorm, a linear head; float32."""

    config: MLPConfig

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] float32 -> logits [B, num_classes] float32."""
        return self.features_and_logits(images)[1]

    @nn.compact
    def features_and_logits(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the head sees, [B, D], and the logits; arguments as for the call."""
        c = self.config
        init = nn.initializers.lecun_normal()
        dense = lambda size, axes, name: Dense(size, axes, init, "float32", "float32", name=name)
        norm = lambda name: RMSNorm(1e-6, "embed", "float32", "float32", name=name)
        x_BD = jnp.reshape(images, (images.shape[0], -1))
        x_BD = dense(c.hidden_size, ("pixels", "embed"), "embed")(x_BD)
        for i in range(c.num_hidden_layers):
            mlp = SwiGLU(c.intermediate_size, init, "float32", "float32", name=f"mlp_{i}")
            x_BD = x_BD + mlp(norm(f"norm_{i}")(x_BD))
        x_BD = norm("norm")(x_BD)
        return x_BD, dense(c.num_classes, ("embed", "classes"), "head")(x_BD)
