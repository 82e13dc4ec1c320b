"""Kernels that the compiler cannot divide: each device of a mesh runs on its rows and heads."""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .dispatch import target

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
        mesh = _divided()
        if mesh is None:
            return function(*arrays)
        reason = not_divided(inputs, arrays)
        if reason is not None:
            raise ValueError(reason)
        spec = lambda dimensions: PartitionSpec(*(_axes(mesh).get(d) for d in dimensions))
        in_specs = jax.tree.map(
            lambda dims, array: None if array is None else spec(dims), inputs, arrays
        )
        out_specs = jax.tree.map(spec, outputs)
        run = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return run(*arrays)

    return call


def not_divided(inputs: Any, arrays: Any) -> str | None:
    """Which rows or heads of the arrays the ambient mesh does not divide; None if it does.

    Explicit axes divide nothing here: arrays on them are only accepted whole, on one device.
    """
    for array in jax.tree.leaves(arrays):
        mesh, spec = (at := jax.typeof(array).sharding).mesh, at.spec
        if mesh.explicit_axes and (mesh.size > 1 or any(spec)):
            return f"the mesh axes {', '.join(mesh.explicit_axes)} are explicit, not automatic"
    mesh = _divided()
    if mesh is None:
        return None
    if mesh.explicit_axes:
        return f"the mesh axes {', '.join(mesh.explicit_axes)} are explicit, not automatic"
    present = jax.tree.map(lambda dims, array: None if array is None else dims, inputs, arrays)
    for dimensions, array in zip(jax.tree.leaves(present), jax.tree.leaves(arrays), strict=True):
        for dimension, size in zip(dimensions, array.shape, strict=True):
            axes = _axes(mesh).get(dimension, ())
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if size % ways:
                what = "rows" if dimension == "B" else "heads"
                return (
                    f"{size} {what} cannot be divided among the {ways} devices of the mesh axes"
                    f" {', '.join(axes)}"
                )
    return None


def by_heads(parameter: jax.Array, features: Sequence[int]) -> jax.Array:
    """[..., N * H * K] -> [..., N, H, K] with the heads divided, as they are in a kernel.

    Parameters are divided by columns, and so by steps before heads. Their products with the tokens
    would be too, and all of them change devices before the kernel, and their gradients after it.
    So the parameter does, and its gradient. And a TPU writes what is a product by heads with the
    tokens of a head in one place, as a kernel reads them.

    Args:
      parameter: on an ambient mesh divided along its last axis, if at all.
      features: (N, H, K), (H, K), or what has no heads: (D,).

    Returns:
      The parameter, reshaped only on a mesh that divides these heads, or for TPU.
    """
    mesh = _divided()
    if len(features) == 1 or (mesh is not None and (mesh.manual_axes or mesh.explicit_axes)):
        return parameter
    ways = 1 if mesh is None else dict(mesh.shape).get(HEAD_AXIS, 1)
    if ways == 1 and target()[0] == "tpu":
        return parameter.reshape(*parameter.shape[:-1], *features)
    if ways == 1 or features[-2] % ways:
        return parameter

    def divide(x, axis):
        spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
        spec[axis] = HEAD_AXIS
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    parameter = divide(parameter, -1)  # for the gradient: it comes back divided by columns
    return divide(parameter.reshape(*parameter.shape[:-1], *features), -2)


def by_rows(x: jax.Array) -> jax.Array:
    """[B, ...] with its rows divided among the devices of the ambient mesh; the values are x's.

    A parameter that is divided along the width of the residual stream would have the compiler
    divide the channels of the tokens that it meets, too, instead of gathering the parameter; all
    of them would change devices there and back in every layer, and so would their gradients.
    """
    mesh = _divided()
    if mesh is None or mesh.manual_axes or mesh.explicit_axes:
        return x
    axes = _axes(mesh)["B"]
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *others))


def tokens_of_heads_together(x: jax.Array, implementation: str | None) -> jax.Array:
    """[B, T, ..., H, K] kept in memory as [B, ..., H, T, K] where kernels for TPU will read it.

    For projections to heads whose channels are then put together with others. The compiler would
    have their tokens last, and copy what follows from them before the kernel.
    """
    dimensions = "BTHK" if x.ndim == 4 else "BTNHK"
    if implementation != "pallas_tpu" or target()[0] != "tpu" or not_divided((dimensions,), (x,)):
        return x
    layout = Layout((0, *range(2, x.ndim - 1), 1, x.ndim - 1))
    keep = lambda x: with_layout_constraint(x, layout)
    return per_device(keep, (dimensions,), dimensions)(x)


def _divided() -> Any:
    """The ambient mesh, or None if it leaves nothing to divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual else mesh


def _axes(mesh) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh along which a dimension is divided."""
    axes = {"B": BATCH_AXES, "H": (HEAD_AXIS,)}
    return {
        d: tuple(axis for axis in given if axis in mesh.axis_names) for d, given in axes.items()
    }


def varying(shapes: list[jax.ShapeDtypeStruct], inputs: list[jax.Array]) -> Any:
    """Shapes of outputs that vary over a mesh axis of ``jax.shard_map`` if any input does.

    They pass its check of replication, which :func:`per_device` leaves out.
    """

    def outputs(*inputs):
        seed = sum(x.ravel()[0].astype(jnp.float32) for x in inputs)
        return [jnp.broadcast_to(seed, x.shape).astype(x.dtype) for x in shapes]

    return jax.eval_shape(outputs, *inputs)
