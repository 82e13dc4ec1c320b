"""Compiles the training step for a mesh and prints what it would cost; trains nothing.

With a topology the mesh may consist of TPUs that are not there: libtpu compiles for them.
"""

import os
from typing import Any

import jax
from jax.experimental import topologies

from . import loop, mesh as mesh_lib, state as state_lib
from .config import Config, ConfigError
from .step import jit_step, make_step
from .task import Task

MIB = 1 << 20


def dry_run(task: Task, config: Config, topology: str = "") -> None:
    """Prints parameters, the sharding table, FLOPs and memory per device of a step.

    Args:
      task, config: what would be trained.
      topology: "" for the devices of this machine, or a TPU slice such as "v5e:4x4".

    Raises:
      ConfigError: if mesh and batch do not divide, or the topology cannot be had.
    """
    compiled, mesh, shapes, shardings = compile_step(task, config, topology)
    print(f"mesh {dict(mesh.shape)} of {mesh.devices.flat[0].device_kind}")
    print(loop.param_table(task, shapes, shardings))
    costs = compiled.cost_analysis() or {}
    flops = f"{costs.get('flops', float('nan')):.4g} FLOPs per step and device"
    print(f"{flops}, of a loop one turn, without kernels that are not XLA's")
    memory = compiled.memory_analysis()
    if memory is not None:
        print(
            f"memory per device: {memory.argument_size_in_bytes / MIB:.1f} MiB state and batch,"
            f" {memory.temp_size_in_bytes / MIB:.1f} MiB temporary,"
            f" {memory.generated_code_size_in_bytes / MIB:.1f} MiB program"
        )


def compile_step(task: Task, config: Config, topology: str = "") -> tuple[Any, Any, Any, Any]:
    """The compiled training step, its mesh, and the shapes and shardings of its state.

    Arguments and errors are those of :func:`dry_run`.
    """
    devices = _topology_devices(topology) if topology else None
    mesh, shardings = loop.place(task, config, devices)
    shapes = state_lib.shapes(task, config)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(place, shapes, shardings)
    batch_sharding = mesh_lib.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: place(x, batch_sharding), dict(task.batch_spec))
    whole = mesh_lib.replicated(mesh)
    given = jax.tree.map(lambda x: place(x, whole), task.given())
    compiled = (
        jit_step(make_step(task, config, mesh), shardings, mesh)
        .lower(state, batch, given)
        .compile()
    )
    return compiled, mesh, shapes, shardings


def _topology_devices(name: str) -> list:
    kind, _, shape = name.partition(":")
    if not shape:
        raise ConfigError(f"--topology {name!r} should look like v5e:4x4")
    # libtpu asks the cloud who it is unless told; nothing is executed, so any answer will do.
    # Nor does it matter who else has loaded it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        raise ConfigError(
            f"--topology {name} cannot be described here ({error}); it needs libtpu:"
            " pip install 'scanax[tpu]'"
        ) from error
