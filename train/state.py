"""The training state: what is updated, saved and restored, all of it arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from . import mesh as mesh_lib
from .config import Config
from .optimizer import make_optimizer
from .task import Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a run after ``step`` updates.

    Attributes:
      step: int32, batches consumed.
      params, ema: parameters and their average (None without one).
      extra: the task's non-optimised state; its "rows" are divided like a batch.
      opt_state: of the optimizer.
      key: PRNG key of the run; noise at a step is ``fold_in(key, step)``.
      skipped: int32, updates skipped so far because something was not finite.
      bad_steps: int32, how many of the last updates in a row were skipped.
    """

    step: jax.Array
    params: Any
    ema: Any
    extra: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    bad_steps: jax.Array

    @property
    def eval_params(self) -> Any:
        """The averaged parameters where there are any, else the parameters."""
        return self.params if self.ema is None else self.ema


def create(task: Task, config: Config) -> TrainState:
    """The state before the first update; a pure function, to be jitted or eval_shaped."""
    init_key, noise_key = jax.random.split(jax.random.key(config.seed))
    params, extra = task.init(init_key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None,
        extra=extra,
        opt_state=make_optimizer(config.optimizer, task.param_axes).init(params),
        key=noise_key,
        skipped=zero,
        bad_steps=zero,
    )


def shapes(task: Task, config: Config) -> TrainState:
    """The state as a tree of ``ShapeDtypeStruct``; nothing is computed."""
    return jax.eval_shape(lambda: create(task, config))


def shardings(task: Task, config: Config, mesh: Mesh) -> Any:
    """A TrainState of shardings: parameters, average and moments alike, rows of ``extra`` like a
    batch, the rest replicated."""
    state = shapes(task, config)
    params = mesh_lib.param_shardings(mesh, state.params, task.param_axes)
    whole = mesh_lib.replicated(mesh)
    moments = optax.tree.map_params(
        make_optimizer(config.optimizer, task.param_axes),
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    everywhere = jax.tree.map(lambda _: whole, state)
    batch = mesh_lib.batch_sharding(mesh)
    extra = {
        name: jax.tree.map(lambda _, place=batch if name == "rows" else whole: place, tree)
        for name, tree in state.extra.items()
    }
    ema = None if state.ema is None else params
    return dataclasses.replace(everywhere, params=params, ema=ema, extra=extra, opt_state=moments)
