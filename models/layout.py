"""How the parameters of a published checkpoint lie in our trees, and the copying.

A family describes itself by a table: checkpoint name -> ``Leaf``. Copying moves and
transposes arrays, nothing else: values and dtypes stay as they are, to the bit.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a checkpoint, and where it goes.

    Attributes:
      path: of the parameter in our tree, joined with "/".
      shape: in the checkpoint.
      axes: our axes in terms of the checkpoint's; axes of length 1 that we do not have are
        left out. (1, 0) transposes, (2, 0) takes [D, 1, W] to [W, D].
      at: where in the parameter it goes, if that is made of several tensors: an index of numpy's,
        of whole numbers and slices with both ends.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    at: tuple[int | slice, ...] = ()


def vector(path: str, size: int) -> Leaf:
    """[size], as it is."""
    return Leaf(path, (size,), (0,))


def matrix(path: str, rows: int, columns: int) -> Leaf:
    """[rows, columns], as it is."""
    return Leaf(path, (rows, columns), (0, 1))


def linear(path: str, features_out: int, features_in: int) -> Leaf:
    """``torch.nn.Linear`` weight [out, in] to our kernel [in, out]."""
    return Leaf(path, (features_out, features_in), (1, 0))


def depthwise(path: str, channels: int, width: int) -> Leaf:
    """``torch.nn.Conv1d`` weight with one group per channel [D, 1, W] to [W, D]."""
    return Leaf(path, (channels, 1, width), (2, 0))


def load(table: Mapping[str, Leaf], tensors: Mapping[str, Any]) -> Any:
    """Checkpoint tensors to our parameter tree.

    Raises:
      ValueError: if a tensor is missing, left over, of another shape, or of a dtype that jax
        would change.
    """
    _check_names("tensor", expected=table, given=tensors)
    parts: dict[str, dict[str, Leaf]] = {}
    for name, leaf in table.items():
        parts.setdefault(leaf.path, {})[name] = leaf
    flat = {path: _to_jax(leaves, tensors) for path, leaves in parts.items()}
    return traverse.unflatten_dict(flat, sep="/")


def dump(table: Mapping[str, Leaf], params: Any) -> dict[str, np.ndarray]:
    """Our parameter tree to contiguous checkpoint tensors.

    Raises:
      ValueError: if a parameter is missing, left over, or of another shape.
    """
    flat: Any = traverse.flatten_dict(params, sep="/")
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in table.values():
        shapes[leaf.path] = _grown(shapes.get(leaf.path, ()), leaf)
    _check_names("parameter", expected=shapes, given=flat)
    for path, shape in shapes.items():
        _check_shape("parameter", path, np.shape(flat[path]), shape)
    return {name: _to_numpy(flat[leaf.path], leaf) for name, leaf in table.items()}


def _check_names(kind: str, expected, given):
    for problem, names in (
        ("missing", sorted(name for name in expected if name not in given)),
        ("not expected", sorted(name for name in given if name not in expected)),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{kind} {problem}: {', '.join(names[:5])}{more}")


def _to_jax(leaves: Mapping[str, Leaf], tensors: Mapping[str, Any]) -> jax.Array:
    """One parameter from the tensors that it is made of."""
    first, shape, parts = next(iter(leaves)), (), {}
    dtype = np.asarray(tensors[first]).dtype
    for name, leaf in leaves.items():
        part = np.asarray(tensors[name])
        _check_shape("tensor", name, part.shape, leaf.shape)
        if part.dtype != dtype:
            raise ValueError(f"tensor {name} is {part.dtype}, but {first} is {dtype}")
        kept = tuple(size for axis, size in enumerate(part.shape) if axis in leaf.axes)
        ranks = tuple(sorted(leaf.axes).index(axis) for axis in leaf.axes)
        parts[name] = part.reshape(kept).transpose(ranks)
        shape = _grown(shape, leaf)
    array = np.empty(shape, dtype)
    for name, part in parts.items():
        array[leaves[name].at or ...] = part
    with_jax = jnp.asarray(array)
    if with_jax.dtype != dtype:
        raise ValueError(
            f"tensor {first} is {dtype}, which jax would turn into {with_jax.dtype};"
            " convert it first, or enable jax_enable_x64"
        )
    return with_jax


def _to_numpy(param, leaf: Leaf) -> np.ndarray:
    part = np.asarray(param)[leaf.at or ...]
    ordered = part.transpose(np.argsort(leaf.axes))
    return np.ascontiguousarray(ordered.reshape(leaf.shape))


def _grown(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    """The shape of a parameter that has room for what it had and for this leaf."""
    sizes = [leaf.shape[axis] for axis in leaf.axes]
    for axis, where in enumerate(leaf.at):
        if isinstance(where, slice):
            sizes[axis] = where.stop
        else:
            sizes.insert(axis, where + 1)
    return tuple(max(a, b) for a, b in zip(shape or sizes, sizes, strict=True))


def _check_shape(kind: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]):
    if shape != expected:
        raise ValueError(f"{kind} {name} has shape {shape}, expected {expected}")
