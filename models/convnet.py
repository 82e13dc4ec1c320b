"""A small convolutional network: the classifier of images whose features metrics use.

Dimensions: B batch, H height, W width, C channels, D features.

It is no published architecture: 3 x 3 convolutions in stages, the mean over the image, one hidden
layer, a head; float32.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from .layers import Dense
from .limits import at_least


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """Sizes of the network.

    Attributes:
      num_classes: outputs.
      stages: channels of each stage; the first convolution of every stage but the first has
        stride 2.
      convs_per_stage: 3 x 3 convolutions of a stage.
      norm_groups: groups of the GroupNorm behind each convolution; 0 for no norm.
      feature_size: width of the hidden layer in front of the head.
    """

    num_classes: int
    stages: tuple[int, ...]
    convs_per_stage: int
    norm_groups: int
    feature_size: int

    def __post_init__(self):
        at_least(self, 1, "num_classes", "convs_per_stage", "feature_size")
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"model.stages must be positive numbers, got {self.stages}")
        if self.norm_groups < 0:
            raise ValueError(f"model.norm_groups must not be negative, got {self.norm_groups}")
        if self.norm_groups and any(size % self.norm_groups for size in self.stages):
            raise ValueError(
                f"model.norm_groups ({self.norm_groups}) must divide all of model.stages"
                f" {self.stages}"
            )


class ConvNet(nn.Module):
    """Which class is in the picture."""

    config: ConvNetConfig

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] float32 -> logits [B, num_classes] float32.

        Raises:
          ValueError: if these are no images, or too small for so many stages.
        """
        return self.features_and_logits(images)[1]

    @nn.compact
    def features_and_logits(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the head sees, [B, D] float32, and the logits; arguments as for the call."""
        c = self.config
        least = 2 ** (len(c.stages) - 1)
        if images.ndim != 4 or min(images.shape[1:3]) < least:
            raise ValueError(
                f"a convnet with {len(c.stages)} stages needs images [H, W, C] of {least} x {least}"
                f" or more, got {images.shape[1:]}"
            )
        x_BHWC = images
        for i, channels in enumerate(c.stages):
            for j in range(c.convs_per_stage):
                x_BHWC = self._layer(x_BHWC, channels, 2 if i and not j else 1, f"{i}_{j}")
        x_BC = jnp.mean(x_BHWC, axis=(1, 2))
        init = nn.initializers.he_normal()
        dense = lambda size, axes, name: Dense(
            size, axes, init, "float32", "float32", bias=True, name=name
        )
        x_BD = nn.relu(dense(c.feature_size, ("channels", "embed"), "features")(x_BC))
        return x_BD, dense(c.num_classes, ("embed", "classes"), "head")(x_BD)

    def _layer(self, x_BHWC: jax.Array, channels: int, stride: int, name: str) -> jax.Array:
        """Convolution, norm, ReLU."""
        named, init = nn.with_logical_partitioning, nn.initializers
        axes, sides = ("conv", "conv", "channels", "embed"), ((1, 1), (1, 1))
        x_BHWC = nn.Conv(
            *(channels, (3, 3), (stride, stride), sides),
            use_bias=not self.config.norm_groups,
            kernel_init=named(init.he_normal(), axes),
            bias_init=named(init.zeros, ("embed",)),
            name=f"conv_{name}",
        )(x_BHWC)
        if self.config.norm_groups:
            x_BHWC = nn.GroupNorm(
                self.config.norm_groups,
                epsilon=1e-6,
                use_fast_variance=False,
                scale_init=named(init.ones, ("embed",)),
                bias_init=named(init.zeros, ("embed",)),
                name=f"norm_{name}",
            )(x_BHWC)
        return nn.relu(x_BHWC)
