"""Experts on several devices: every device holds some of them, and tokens travel.

Dimensions: T tokens of a device, J choices, E experts, P devices along the experts' axis, R rows
from one device to another, C places of an expert, D hidden.

Tokens are split over the devices. Each device sorts its own by the device of their expert, an
all-to-all brings them there, and another one back; the router's state and the residual stream stay
where they are. Dropout factors travel with their rows. Sizes are static, so that a device sends,
receives and computes rows for the worst case:

  with a capacity factor   E C rows, C for its own tokens: what is dropped depends on the division
                           of the tokens among devices
  dropless                 P T min(J, E / P) rows, which are as many as all P devices' assignments
                           if E / P >= J: the experts' memory is divided, their work is not

Where only the tokens are divided, none travels: each device sends its own through all experts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from . import api, implementations, layout
from .implementations import Experts


def expert_mlp_sharded(
    x: jax.Array,
    index: jax.Array,
    weight: jax.Array,
    experts: Experts,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str = "expert",
    batch_axes: Sequence[str] = ("data", "fsdp"),
    capacity_factor: float | None = None,
    policy: str = "score",
    score: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """:func:`expert_mlp` on a mesh that divides the tokens, and along ``axis`` the experts.

    Args:
      x, index, weight, experts, score, mask, keep: of all devices together; see there.
      mesh: of the devices.
      axis: of the mesh, along which experts are divided, and tokens as well.
      batch_axes: of the mesh, along which tokens are divided before.
      capacity_factor, policy: see there; a device drops by its own tokens.
      implementation: of the experts on the rows that arrive: "capacity" with a capacity factor, a
        dropless one without; None chooses for the platform.

    Returns:
      y [T, D], divided like the tokens.

    Raises:
      ValueError: if the mesh divides the tokens or the experts into unequal parts; for shapes that
        do not fit, or an implementation that cannot do this.
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
    api.check(x, index, weight, experts, score, mask, keep, policy)
    if capacity_factor is not None and implementation not in (None, "capacity"):
        raise ValueError(
            f"expert_mlp: {implementation!r} drops no token; leave capacity_factor or it out"
        )
    index = index.astype(jnp.int32)
    if mask is not None:
        index = jnp.where(mask[:, None], index, number)
    score = jax.lax.stop_gradient(weight if score is None else score)
    tokens = PartitionSpec(token_axes)

    def local(x_TD, index_TJ, weight_TJ, score_TJ, keep_TJF, mine: Experts):
        if devices == 1:
            options = {"capacity_factor": capacity_factor, "policy": policy, "score": score_TJ}
            options |= {"keep": keep_TJF, "implementation": implementation}
            return api.expert_mlp(x_TD, index_TJ, weight_TJ, mine, **options)
        if capacity_factor is None:
            assignments = (x_TD, index_TJ, weight_TJ, keep_TJF)
            return _dropless(*assignments, mine, axis, devices, implementation)
        here, choices = index_TJ.shape
        places = api.capacity(here, choices, number, capacity_factor)
        score_TJ = None if policy == "position" else score_TJ
        where = layout.fixed(index_TJ, number, places, score_TJ)
        return _fixed(x_TD, weight_TJ, keep_TJF, mine, where, axis, devices, places)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens,) * 5 + (PartitionSpec(axis),),
        out_specs=tokens,
        # The compiler may divide matrices along the other axes.
        axis_names={
            name for name in mesh.axis_names if name in token_axes or mesh.shape[name] == 1
        },
        check_vma=False,
    )
    experts = jax.tree.map(lambda w: w.astype(x.dtype), experts)
    return run(x, index, weight, score, keep, experts)


def _fixed(x_TD, weight_TJ, keep_TJF, mine: Experts, where, axis: str, devices: int, places: int):
    """As many rows for each expert from each device."""
    own, hidden = mine.up.shape[0], x_TD.shape[1]

    def to_experts(rows):
        rows = rows.reshape(devices, own, places, rows.shape[-1])
        rows = jax.lax.all_to_all(rows, axis, 0, 0).swapaxes(0, 1)  # [own, from, C, width]
        return rows.reshape(own, devices * places, rows.shape[-1])

    rows = to_experts(layout.dispatch(x_TD, where))
    keep = implementations.rows_of(keep_TJF, where, (-1,))
    keep = None if keep is None else to_experts(keep.astype(rows.dtype))
    rows = implementations.grouped(rows, mine, keep).reshape(own, devices, places, hidden)
    rows = jax.lax.all_to_all(rows.swapaxes(0, 1), axis, 0, 0)
    return layout.combine(rows.reshape(-1, hidden), weight_TJ, where)


def _dropless(
    x_TD, index_TJ, weight_TJ, keep_TJF, mine: Experts, axis: str, devices: int, implementation
):
    """As many rows to each device as could be chosen."""
    own, hidden = mine.up.shape[0], x_TD.shape[1]
    tokens, choices = index_TJ.shape
    room = tokens * min(choices, own)
    where = layout.fixed(index_TJ // own, devices, room, None)

    def to_experts(rows):
        rows = rows.reshape(devices, room, *rows.shape[1:])
        rows = jax.lax.all_to_all(rows, axis, 0, 0)
        return rows.reshape(-1, *rows.shape[2:])

    index_TJ = jnp.pad(index_TJ % own, ((0, 1), (0, 0)), constant_values=own)
    expert_R = to_experts(index_TJ[where.token_R, where.choice_R])
    rows = to_experts(layout.dispatch(x_TD, where))
    keep = implementations.rows_of(keep_TJF, where, (-1,))
    rows = api.expert_mlp(
        rows,
        expert_R[:, None],
        jnp.ones((len(rows), 1), rows.dtype),
        mine,
        mask=expert_R < own,
        keep=None if keep is None else to_experts(keep.astype(rows.dtype))[:, None],
        implementation=implementation,
    )
    rows = jax.lax.all_to_all(rows.reshape(devices, room, hidden), axis, 0, 0)
    return layout.combine(rows.reshape(-1, hidden), weight_TJ, where)
