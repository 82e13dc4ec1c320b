"""The device mesh, and the one table that says which parameter axis is split over what.

Parameters carry logical axis names; ``LOGICAL_AXES`` maps a name to a mesh axis. A name that
the table lacks is an error, so that a new layer cannot be left unsharded by accident.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")

LOGICAL_AXES: Mapping[str, str | None] = {
    "embed": "fsdp",  # the residual stream's width
    "heads": "tensor",  # heads times their width
    "mlp": "tensor",  # feed-forward width
    "vocab": "tensor",
    "classes": None,
    "pixels": None,
    "augment": None,  # what was done to an image
    "channels": None,  # that a convolution reads
    "rank": None,  # of low-rank projections
    "rates": None,  # of positions and times
    "rates_heads": None,
    "head_dim": None,
    "conv": None,
    "span": None,  # places of earlier tokens
    "layers": None,  # of a scanned stack
    "experts": "expert",
    "router": None,  # small, and read by every token
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; at most one may be -1: all that are left.

    Attributes:
      data: batch, with replicated parameters.
      fsdp: batch, with parameters and optimizer state split.
      tensor: heads, feed-forward width and vocabulary.
      expert: batch, with the experts of a mixture split.
      sequence: tokens of a row.
    """

    data: int
    fsdp: int
    tensor: int
    expert: int
    sequence: int

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                "mesh axes must be positive, and at most one of them -1 (all devices that are"
                f" left); got {dataclasses.asdict(self)}"
            )


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Builds the mesh over ``devices`` (all of this platform's by default).

    Raises:
      ValueError: if the devices are too few, or are not a multiple of the fixed axes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > len(devices):
        raise ValueError(
            f"the mesh {sizes} needs {fixed} devices, but there are {len(devices)}"
            f" ({devices[0].platform}); make config.mesh smaller"
        )
    if -1 in sizes.values():
        if len(devices) % fixed:
            raise ValueError(
                f"the fixed axes of the mesh {sizes} take {fixed} devices, which does not divide"
                f" the {len(devices)} that there are"
            )
        sizes = {k: len(devices) // fixed if v == -1 else v for k, v in sizes.items()}
    count = math.prod(sizes.values())
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:count],
    )


def check_batch(mesh: Mesh, batch_size: int, microbatches: int, what: str) -> None:
    """Raises a ValueError unless each microbatch divides over the batch axes of the mesh."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if (batch_size // microbatches) % ways:
        raise ValueError(
            f"{what} {batch_size} in {microbatches} microbatches gives"
            f" {batch_size // microbatches} examples, which does not divide over the"
            f" {ways} devices of the mesh axes {', '.join(BATCH_AXES)}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 is split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Shardings of a parameter tree.

    Args:
      shapes: pytree of ``ShapeDtypeStruct``.
      axes: the same structure with a tuple of logical axis names at each leaf.

    Raises:
      ValueError: for an unknown logical name, or a size that its mesh axis does not divide.
    """

    def sharding(path, shape, names):
        where = f"parameter {jax.tree_util.keystr(path)} {shape.shape}"
        spec = []
        for size, name in zip(shape.shape, names, strict=True):
            if name not in LOGICAL_AXES:
                raise ValueError(
                    f"{where}: logical axis {name!r} is not in LOGICAL_AXES of train/mesh.py"
                )
            axis = LOGICAL_AXES[name]
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"{where}: axis {name!r} of size {size} does not divide over"
                    f" config.mesh.{axis} = {mesh.shape[axis]}"
                )
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


def table(shapes: Any, axes: Any, shardings: Any) -> str:
    """A printed table: parameter, shape, logical axes, how it is split."""
    rows = []
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, shape), name, sharding in zip(
        leaves, names, jax.tree.leaves(shardings), strict=True
    ):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        split = "x".join(str(axis) for axis in sharding.spec if axis) or "replicated"
        rows.append((key, "x".join(map(str, shape.shape)), ",".join(name), split))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
