"""Public function of a mixture's experts: checks its arguments, then dispatches.

Dimensions: T tokens, J choices of a token, E experts, D hidden, F expert width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..dispatch import Implementation, call, target
from . import implementations, layout
from .implementations import Experts

BLOCK_SIZE = 64  # rows

POLICIES = ("score", "position")


def expert_mlp(
    x: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    experts: Experts,
    *,
    capacity_factor: float | None = None,
    policy: str = "score",
    score: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep: jax.Array | None = None,
    implementation: str | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """Sends every token through its experts: y_t = sum_j weight_tj expert_{index_tj}(x_t).

    Args:
      x: [T, D] tokens.
      index: [T, J] int, experts of each token, all different.
      weight: [T, J] factors on their outputs.
      experts: their parameters.
      capacity_factor: None: no token is dropped. Else an expert has ``capacity`` places, and an
        assignment beyond contributes 0; the other weights stay as they are.
      policy: who keeps a place: the highest "score", or the first "position" (all first choices
        before all second ones, each in the order of tokens).
      score: [T, J] for policy "score"; the weights if None.
      mask: [T] bool, True = a token; the others take no place, and their y is 0.
      keep: [T, J, F] factors on the hidden activations (dropout), or None.
      implementation: "dense", "block", "ragged", "gmm" or "capacity"; None chooses for the
        platform.
      block_size: rows of a block; BLOCK_SIZE if None.

    Returns:
      y [T, D] in x's dtype; sums over experts are in float32 or better.

    Raises:
      ValueError: for shapes that do not fit, or an implementation that cannot do this.
    """
    check(x, index, weight, experts, score, mask, keep, policy)
    tokens, number = x.shape[0], experts.up.shape[0]
    if block_size is not None and block_size < 1:
        raise ValueError(f"expert_mlp: block_size must be positive, got {block_size}")
    index = index.astype(jnp.int32)
    if mask is not None:
        index = jnp.where(mask[:, None], index, number)
    places = None
    if capacity_factor is not None:
        places = capacity(tokens, index.shape[1], number, capacity_factor)
    if policy == "position":
        score = None
    else:
        score = jax.lax.stop_gradient(weight if score is None else score)
    experts = jax.tree.map(lambda w: w.astype(x.dtype), experts)
    options: dict[str, Any] = {
        "places": places,
        "score_TJ": score,
        "block_size": block_size or BLOCK_SIZE,
    }
    arguments = (x, index, weight, experts, keep)
    return call("expert_mlp", IMPLEMENTATIONS, implementation, *arguments, **options)


def capacity(tokens: int, choices: int, experts: int, factor: float) -> int:
    """Places of an expert: ceil(factor T J / E)."""
    if factor <= 0:
        raise ValueError(f"expert_mlp: capacity_factor must be positive, got {factor}")
    return math.ceil(factor * tokens * choices / experts)


def kept(
    index: jax.Array, experts: int, factor: float, score: jax.Array | None = None
) -> jax.Array:
    """Which assignments find a place: [T, J] bool.

    Args:
      index: [T, J] int.
      experts: their number.
      factor: see :func:`capacity`.
      score: [T, J] for policy "score"; None for policy "position".
    """
    tokens, choices = index.shape
    places = capacity(tokens, choices, experts, factor)
    where = layout.fixed(index.astype(jnp.int32), experts, places, score)
    return where.row_TJ < experts * places


def _dropless(*args, places, **options) -> str | None:
    return None if places is None else "it drops no token; leave capacity_factor out"


def _tpu(*args, **options) -> str | None:
    if target()[0] != "tpu":
        return "it needs a TPU"
    mesh = jax.sharding.get_abstract_mesh()
    alone = jax.device_count() == 1 if mesh.empty else mesh.size == 1 or mesh.are_all_axes_manual
    return _dropless(*args, **options) if alone else "the compiler cannot divide it among devices"


def _with_places(*args, places, **options) -> str | None:
    return "it needs a capacity_factor" if places is None else None


IMPLEMENTATIONS = {
    "capacity": Implementation(implementations.capacity, _with_places),
    "gmm": Implementation(implementations.gmm, _tpu, ("tpu",)),
    "block": Implementation(implementations.block, _dropless),
    "ragged": Implementation(implementations.ragged, _dropless),
    "dense": Implementation(implementations.dense, _dropless),
}


def check(x, index, weight, experts: Experts, score, mask, keep, policy: str) -> None:
    """Raises a ValueError that names the argument of ``expert_mlp`` that does not fit."""
    if policy not in POLICIES:
        raise ValueError(f"expert_mlp: policy {policy!r} must be one of {', '.join(POLICIES)}")
    if x.ndim != 2 or index.ndim != 2:
        raise ValueError(
            f"expert_mlp needs x [T, D] and index [T, J]; got x {x.shape}, index {index.shape}"
        )
    (tokens, hidden), choices = x.shape, index.shape[1]
    number, width = experts.up.shape[0], experts.up.shape[-1]
    expected = {
        "index": (index, (tokens, choices)),
        "weight": (weight, (tokens, choices)),
        "score": (score, (tokens, choices)),
        "mask": (mask, (tokens,)),
        "keep": (keep, (tokens, choices, width)),
        "experts.up": (experts.up, (number, hidden, width)),
        "experts.gate": (experts.gate, (number, hidden, width)),
        "experts.down": (experts.down, (number, width, hidden)),
        "experts.up_bias": (experts.up_bias, (number, width)),
        "experts.down_bias": (experts.down_bias, (number, hidden)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"expert_mlp: {name} has shape {array.shape}, expected {shape}")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"expert_mlp: index must be integers, got {index.dtype}")
    if not 1 <= choices <= number:
        raise ValueError(f"expert_mlp: {choices} choices among {number} experts")
