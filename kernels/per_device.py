"""Kernels that the compiler cannot divide: each device of a mesh runs on its rows and heads."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp", "expert")  # of the mesh, along which rows are divided
HEAD_AXIS = "tensor"


def per_device(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """``function`` on the ambient mesh, rows and heads divided; without one, itself.

    Args:
      function: of arrays that all have rows, and computes each row and head alone.
      inputs, outputs: the dimensions of its arguments and results, as strings in the same
        structure ("BTHK"): B rows, H heads; other dimensions are whole on every device.

    Raises:
      ValueError: when called with rows or heads that the mesh does not divide.
    """

    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
            return function(*arrays)
        axes = {
            "B": tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names),
            "H": (HEAD_AXIS,) if HEAD_AXIS in mesh.axis_names else (),
        }

        def spec(dimensions: str, array=None):
            for i, dimension in enumerate(dimensions):
                ways = math.prod(mesh.shape[axis] for axis in axes.get(dimension, ()))
                if array is not None and array.shape[i] % ways:
                    what = "rows" if dimension == "B" else "heads"
                    raise ValueError(
                        f"{array.shape[i]} {what} cannot be divided among the {ways} devices of"
                        f" the mesh axes {', '.join(axes[dimension])}"
                    )
            return PartitionSpec(*(axes.get(dimension) for dimension in dimensions))

        in_specs = jax.tree.map(
            lambda dims, array: None if array is None else spec(dims, array), inputs, arrays
        )
        out_specs = jax.tree.map(spec, outputs)
        run = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return run(*arrays)

    return call


def varying(shapes: list[jax.ShapeDtypeStruct], inputs: list[jax.Array]) -> Any:
    """Shapes of outputs that vary over a mesh axis of ``jax.shard_map`` if any input does.

    They pass its check of replication, which :func:`per_device` leaves out.
    """

    def outputs(*inputs):
        seed = sum(x.ravel()[0].astype(jnp.float32) for x in inputs)
        return [jnp.broadcast_to(seed, x.shape).astype(x.dtype) for x in shapes]

    return jax.eval_shape(outputs, *inputs)
