"""The training step: one pure function from (state, batch) to (state, metrics).

Accumulate gradients over microbatches in float32, divide once by the total weight, clip,
update, average the parameters; and if anything is not finite, keep the old state instead
and count. Nothing here knows which family is trained.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from ..kernels.dtypes import accumulation_dtype
from . import mesh as mesh_lib
from .config import Config
from .optimizer import ema_rate, frozen, make_optimizer, make_schedule
from .state import TrainState
from .task import Task

Metrics = dict[str, jax.Array]


def make_step(
    task: Task, config: Config, mesh: Mesh
) -> Callable[[TrainState, Mapping[str, jax.Array], Any], tuple[TrainState, Metrics]]:
    """Builds the step: (state, batch, what ``task.given`` returned) -> (state, metrics).

    The returned metrics are scalars ("loss", "grad_norm", "update_norm", "learning_rate",
    "skipped", "bad_steps" and the task's), and "finite_gradients": one bool per parameter.
    """
    optimizer = make_optimizer(config.optimizer, task.param_axes)
    schedule = make_schedule(config.optimizer, config.num_steps)
    always = frozen(task.frozen, task.param_axes)
    later = frozen(config.optimizer.freeze, task.param_axes)

    def unfrozen(tree, step):
        """The tree, with zeros for parameters that stay as they are."""
        moves = step < config.optimizer.freeze_from
        zero = lambda x, a, b: jnp.zeros_like(x) if a else jnp.where(moves, x, 0) if b else x
        return jax.tree.map(zero, tree, always, later)

    def step(state: TrainState, batch: Mapping[str, jax.Array], given: Any):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models that ask for it
            loss, grads, extra, metrics = _gradients(task, config, mesh, state, batch, given)
        extra = task.settle(extra)
        grads = unfrozen(grads, state.step)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = schedule(state.step)
        updates = jax.tree.map(lambda d, p: (-rate * d).astype(p.dtype), direction, state.params)
        updates = unfrozen(updates, state.step)
        params = optax.apply_updates(state.params, updates)
        ema = _average(config, state, params)

        grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        bad = jnp.where(finite, 0, 1)
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            extra=keep(extra, state.extra),
            opt_state=keep(opt_state, state.opt_state),
            key=state.key,
            skipped=state.skipped + bad,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
        )
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "learning_rate": rate,
            "skipped": new_state.skipped,
            "bad_steps": new_state.bad_steps,
            "finite_gradients": jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]),
        }
        return new_state, metrics

    return step


def jit_step(step, state_shardings: TrainState, mesh: Mesh):
    """Compiles the step for a mesh; the old state's memory is reused for the new one."""
    batch, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch, whole),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )


def microbatches(tree: Any, count: int, mesh: Mesh) -> Any:
    """[B, ...] -> [count, B / count, ...], every device keeping the examples it has.

    Microbatch i takes examples i, i + count, ...: a plain ``reshape(count, B // count)``
    would hand whole microbatches to single devices, so that each device would have to
    gather, and compute, all of every microbatch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh_lib.BATCH_AXES))

    def split(x):
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(split, tree)


def _gradients(task: Task, config: Config, mesh: Mesh, state: TrainState, batch, given):
    """Mean loss, mean gradients in float32 or better, new extra, mean metrics."""
    value_and_grad = jax.value_and_grad(task.loss, has_aux=True)
    wide = lambda x: x.astype(accumulation_dtype(x.dtype))

    step_key = jax.random.fold_in(state.key, state.step)

    def microbatch(extra, rows, batch, index):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, index)  # one per example
        extra = {**extra, **rows, **({"given": given} if given else {})}
        return value_and_grad(state.params, extra, batch, keys)

    def accumulate(carry, inputs):
        extra, sums = carry
        (loss, aux), grads = microbatch(extra, *inputs)
        new = jax.tree.map(wide, (loss, aux.weight, grads, dict(aux.metrics)))
        extra, rows = _rows_apart(aux.extra)
        return (extra, jax.tree.map(jnp.add, sums, new)), rows

    extra, rows = _rows_apart(state.extra)
    index = jnp.arange(config.batch_size)
    parts = microbatches((rows, dict(batch), index), config.microbatches, mesh)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    (loss, aux), grads = jax.eval_shape(microbatch, extra, *one)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)),
        (loss, aux.weight, grads, dict(aux.metrics)),
    )
    if config.microbatches == 1:  # XLA's CPU compiler slows gradients of convolutions in loops
        (extra, sums), rows = accumulate((extra, zeros), jax.tree.map(lambda x: x[0], parts))
        rows = jax.tree.map(lambda x: x[None], rows)
    else:
        (extra, sums), rows = jax.lax.scan(accumulate, (extra, zeros), parts)
    loss, weight, grads, metrics = sums
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    metrics = {name: s / w for name, (s, w) in metrics.items()}
    return loss / weight, grads, {**extra, **_together(rows, mesh)}, metrics


def _rows_apart(extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of the run, and that of the batch's rows; without what was given."""
    rows = {name: tree for name, tree in extra.items() if name == "rows"}
    return {name: tree for name, tree in extra.items() if name not in ("rows", "given")}, rows


def _together(parts: Any, mesh: Mesh) -> Any:
    """The inverse of :func:`microbatches`."""
    whole = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    sharding = mesh_lib.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(whole(x), sharding), parts)


def _average(config: Config, state: TrainState, params):
    """The new parameter average, in the parameters' dtype; None without one."""
    if state.ema is None:
        return None
    rate = ema_rate(config.optimizer, state.step)
    mix = lambda old, new: (rate * old + (1 - rate) * new).astype(old.dtype)
    return jax.tree.map(mix, state.ema, params)
