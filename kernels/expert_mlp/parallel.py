"""Experts on several devices: every device holds some of them, and tokens travel.

Dimensions: T tokens of a device, J choices, E experts, P devices along the experts' axis, R rows
from one device to another, C places of an expert, D hidden.

Tokens are split over the devices. Each device sorts its own by the device of their expert, an
all-to-all brings them there, and another one back; the router's state and the residual stream stay
where they are. Sizes are static, so that rows travel for the worst case:

  with a capacity factor   E C rows of each device, C for its own tokens: what is dropped depends
                           on the division of the tokens among devices
  dropless                 P T min(J, E / P) rows
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from . import api, implementations, layout
from .implementations import Experts


def expert_mlp_sharded(
    x: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    experts: Experts,
    *,
    mesh: Mesh,
    axis: str = "expert",
    batch_axes: Sequence[str] = ("data", "fsdp"),
    capacity_factor: float | None = None,
    policy: str = "score",
    score: jax.Array | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """:func:`expert_mlp` on a mesh whose ``axis`` divides the experts.

    Args:
      x, index, weight, experts, score, mask: of all devices together; see there.
      mesh: of the devices.
      axis: of the mesh, along which experts are divided, and tokens as well.
      batch_axes: of the mesh, along which tokens are divided before.
      capacity_factor, policy: see there; a device drops by its own tokens.
      implementation: of the experts on the rows that arrive; dropless ones for no capacity factor.

    Returns:
      y [T, D], divided like the tokens.

    Raises:
      ValueError: if the mesh divides the tokens or the experts into unequal parts.
    """
    devices, number = mesh.shape[axis], experts.up.shape[0]
    token_axes = (*batch_axes, axis)
    parts = 1
    for name in token_axes:
        parts *= mesh.shape[name]
    for what, size, among in (("experts", number, devices), ("tokens", x.shape[0], parts)):
        if size % among:
            raise ValueError(
                f"expert_mlp: {size} {what} do not divide among {among} devices of the mesh"
                f" {dict(mesh.shape)}"
            )
    api.check(x, index, weight, experts, score, mask, None, policy)
    index = index.astype(jnp.int32)
    if mask is not None:
        index = jnp.where(mask[:, None], index, number)
    score = jax.lax.stop_gradient(weight if score is None else score)
    tokens = PartitionSpec(token_axes)

    def local(x_TD, index_TJ, weight_TJ, score_TJ, mine: Experts):
        if capacity_factor is None:
            return _dropless(x_TD, index_TJ, weight_TJ, mine, axis, devices, implementation)
        here, choices = index_TJ.shape
        places = api.capacity(here, choices, number, capacity_factor)
        score_TJ = None if policy == "position" else score_TJ
        where = layout.fixed(index_TJ, number, places, score_TJ)
        return _fixed(x_TD, weight_TJ, mine, where, axis, devices, places)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, tokens, PartitionSpec(axis)),
        out_specs=tokens,
        check_vma=False,
    )
    return run(x, index, weight, score, jax.tree.map(lambda w: w.astype(x.dtype), experts))


def _fixed(x_TD, weight_TJ, mine: Experts, where, axis: str, devices: int, places: int):
    """As many rows for each expert from each device."""
    own, hidden = mine.up.shape[0], x_TD.shape[1]
    rows = layout.dispatch(x_TD, where).reshape(devices, own, places, hidden)
    rows = jax.lax.all_to_all(rows, axis, 0, 0)  # [from, own, C, D]
    rows = rows.swapaxes(0, 1).reshape(own, devices * places, hidden)
    rows = implementations.grouped(rows, mine).reshape(own, devices, places, hidden)
    rows = jax.lax.all_to_all(rows.swapaxes(0, 1), axis, 0, 0)
    return layout.combine(rows.reshape(-1, hidden), weight_TJ, where)


def _dropless(x_TD, index_TJ, weight_TJ, mine: Experts, axis: str, devices: int, implementation):
    """As many rows to each device as could be chosen."""
    own, hidden = mine.up.shape[0], x_TD.shape[1]
    tokens, choices = index_TJ.shape
    room = tokens * min(choices, own)
    where = layout.fixed(index_TJ // own, devices, room, None)
    rows = layout.dispatch(x_TD, where).reshape(devices, room, hidden)
    index_TJ = jnp.pad(index_TJ % own, ((0, 1), (0, 0)), constant_values=own)
    expert_R = index_TJ[where.token_R, where.choice_R].reshape(devices, room)
    rows, expert_R = (jax.lax.all_to_all(a, axis, 0, 0) for a in (rows, expert_R))
    rows, expert_R = rows.reshape(-1, hidden), expert_R.reshape(-1, 1)
    ones = jnp.ones(expert_R.shape, rows.dtype)
    here_R = expert_R[:, 0] < own
    rows = api.expert_mlp(
        rows, expert_R, ones, mine, mask=here_R, implementation=implementation
    ).reshape(devices, room, hidden)
    rows = jax.lax.all_to_all(rows, axis, 0, 0)
    return layout.combine(rows.reshape(-1, hidden), weight_TJ, where)
