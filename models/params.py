"""Parameter trees: values and logical axis names apart, and their size.

``train/`` sees parameters as plain pytrees; Flax's boxes around them end here.
"""

import math
from typing import Any

import flax.linen as nn
import jax


def initialise(module: nn.Module, key: jax.Array, *example_inputs) -> Any:
    """Parameters of ``module`` as a tree of plain arrays."""
    return nn.meta.unbox(module.init(key, *example_inputs)["params"])


def logical_axes(module: nn.Module, *example_inputs) -> Any:
    """The tree of logical axis names, a tuple of names per parameter; nothing is computed."""
    boxed = jax.eval_shape(module.init, jax.random.key(0), *example_inputs)["params"]
    is_boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_boxed)


def count(params: Any) -> int:
    """Number of parameters of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
