"""A velocity for points: a perceptron on the point and the time (the toy of Liu et al. 2022).

Dimensions: B batch, D coordinates, H hidden.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...kernels.dtypes import accumulation_dtype
from ..layers import Dense


@dataclasses.dataclass(frozen=True)
class VelocityMLPConfig:
    """The perceptron.

    Attributes:
      hidden_size: of each hidden layer.
      num_hidden_layers: their number, each followed by tanh.
      dtype, param_dtype: of the computation and of the parameters.
    """

    hidden_size: int
    num_hidden_layers: int
    dtype: str
    param_dtype: str

    def __post_init__(self):
        if min(self.hidden_size, self.num_hidden_layers) < 1:
            raise ValueError("model.hidden_size and model.num_hidden_layers must be at least 1")

    @property
    def num_classes(self) -> int:
        return 0


class VelocityMLP(nn.Module):
    """The velocity at a point and a time."""

    config: VelocityMLPConfig

    @nn.compact
    def __call__(
        self,
        x_BD: jax.Array,
        t_B: jax.Array,
        label_B: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """[B, D] points at times [B] in [0, 1] -> velocities [B, D], float32 or better.

        It has no classes and no noise: ``label_B`` must be None, ``keys`` are not used.
        """
        del keys
        if label_B is not None:
            raise ValueError("the perceptron has no classes")
        c = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        dense = lambda features, axes, name: Dense(
            features, axes, init, c.dtype, c.param_dtype, bias=True, name=name
        )
        names = ["pixels", *("embed", "mlp") * c.num_hidden_layers]
        hidden_BH = jnp.concatenate([x_BD, t_B[:, None].astype(x_BD.dtype)], axis=-1)
        for i in range(c.num_hidden_layers):
            axes = (names[i], names[i + 1])
            hidden_BH = jnp.tanh(dense(c.hidden_size, axes, f"hidden_{i}")(hidden_BH))
        axes = (names[c.num_hidden_layers], "pixels")
        v_BD = dense(x_BD.shape[-1], axes, "output")(hidden_BH)
        return v_BD.astype(accumulation_dtype(v_BD.dtype))
