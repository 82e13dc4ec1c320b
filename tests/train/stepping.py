"""Runs of a few steps, for tests."""

import jax

from scanax.train import mesh as mesh_lib, state as state_lib, tasks
from scanax.train.config import Config
from scanax.train.loop import place, put_given, put_local
from scanax.train.step import jit_step, make_step
from scanax.train.task import Task


def train(config: Config, steps: int = 5, task: Task | None = None):
    """A few steps from the start: final state and the losses."""
    task = task or tasks.build(config)
    mesh, shardings = place(task, config)
    create = jax.jit(lambda: state_lib.create(task, config), out_shardings=shardings)
    state, data = create(), task.train_data(0, 1)
    step = jit_step(make_step(task, config, mesh), shardings, mesh)
    given = put_given(task, mesh)
    losses = []
    for _ in range(steps):
        batch = put_local(next(data), mesh_lib.batch_sharding(mesh))
        state, metrics = step(state, batch, given)
        losses.append(float(metrics["loss"]))
    return state, losses
