"""The training loop, the same for every family.

Per step, in this order (do not change it):

  1. evaluate, if due
  2. save, if due, preempted or last: before ``next``, so that state and data position agree
  3. stop, if last or preempted
  4. next batch
  5. step: dispatched, not waited for
  6. log the metrics of the *previous* step, so that logging never stalls the device
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import evaluation, mesh as mesh_lib, state as state_lib
from .checkpoint import CheckpointError, Checkpoints, Restored
from .compilations import CompilationWatch
from .config import Config, ConfigError, changes, to_dict
from .data.pipeline import DataChanged
from .optimizer import frozen
from .preemption import Preemption
from .state import TrainState
from .step import jit_step, make_step
from .task import Task
from .writers import Writers

logger = logging.getLogger("scanax")
CONFIG_DRAFT = "config.json.tmp"


class TrainingDiverged(RuntimeError):
    """Too many updates in a row were not finite; the message says where and what is kept."""

    exit_code = 1


def train(
    task: Task,
    config: Config,
    workdir: pathlib.Path,
    *,
    allow_config_change: bool = False,
    allow_data_change: bool = False,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains, or continues what ``workdir`` holds.

    Args:
      task: what to train.
      config: the run; must be the one that the workdir was started with.
      workdir: gets config.json, metrics.jsonl, checkpoints/, and eval/<step>/.
      allow_config_change: continue although the config differs from the workdir's.
      allow_data_change: continue at the same batch number although the data is another.

    Returns:
      The final state and the last evaluation's means.

    Raises:
      ConfigError: if config, mesh and workdir do not fit; nothing is written then.
      DataError: if the data cannot be read; before anything is written if that can be known.
      CheckpointError: if no checkpoint in the workdir can be trusted.
      TrainingDiverged: after ``max_bad_steps`` non-finite updates in a row.
      SystemExit: after a SIGTERM or Ctrl-C, once the state is saved.
    """
    mesh, shardings = place(task, config)
    goal = evaluation.stop_condition(task, config)
    check_workdir(workdir, config, allow_config_change)
    shapes = state_lib.shapes(task, config)
    found = starting_params(config, workdir, shapes, shardings)
    given = put_given(task, mesh)
    data = task.train_data(jax.process_index(), jax.process_count())
    if not begun(workdir):
        task.begin()

    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "config.json").exists():
        write_config(workdir, config)
    logger.info("%s\n%s", dict(mesh.shape), param_table(task, shapes, shardings))

    checkpoints = Checkpoints(workdir, config.checkpoint)
    restored = checkpoints.restore(shapes, shardings)
    if restored is not None:
        _continue(data, restored, allow_data_change)
    state, first_step = _start(task, config, shardings, restored, found)
    write_config(workdir, config)  # a changed config replaces the old one once it has worked
    step_fn = jit_step(make_step(task, config, mesh), shardings, mesh)
    watch = CompilationWatch(step_fn, "the training step")
    evaluate = evaluation.make_evaluator(task, config, mesh)
    writers = Writers(workdir, first_step, config.num_steps, config.batch_size)
    batch_sharding = mesh_lib.batch_sharding(mesh)
    step, means, pending = first_step, {}, None
    trace = _Profiler(config, workdir)

    def flush() -> None:
        """Writes the metrics of the last step, and stops if it was one bad step too many."""
        nonlocal pending
        if pending is not None:
            at, metrics, pending = *pending, None
            _log(writers, config, shapes, at, metrics, watch.count, checkpoints)

    with Preemption() as preemption, contextlib.closing(writers):
        while True:
            stop = preemption.received is not None  # read once: a signal may come at any time
            last = step >= config.num_steps
            due = bool(config.evaluation.every_steps) and step % config.evaluation.every_steps == 0
            if last or due:
                flush()
                means = evaluate(state.eval_params, state.extra)
                writers.evaluation(step, means)
                folder = workdir / "eval" / f"{step:08d}"
                evaluation.write_report(task, config, folder, means, state.eval_params, state.extra)
                writers.pause()
                if goal is not None and goal.met(means) and not last:
                    logger.info("%s at step %d: done", config.evaluation.stop_when, step)
                    last = True
            due = step % config.checkpoint.every_steps == 0
            if (due and step > first_step) or last or stop:
                flush()
                checkpoints.save(state, to_dict(config), data.get_state())
            if last or stop:
                break
            batch = put_local(next(data), batch_sharding)
            trace.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = watch(state, batch, given)
            trace.after(step, state)
            step += 1
            flush()
            pending = (step, metrics)
            writers.advance(step)
        checkpoints.wait()
        checkpoints.close()
        if stop:
            preemption.leave(f"step {step} is saved in {workdir}; the same command continues")
    return state, means


def place(
    task: Task, config: Config, devices: list[Any] | None = None
) -> tuple[jax.sharding.Mesh, TrainState]:
    """The mesh over ``devices`` (all by default), and the state's shardings on it.

    Nothing is compiled.

    Raises:
      ConfigError: if devices, batch sizes or parameters do not divide.
    """
    try:
        mesh = mesh_lib.make_mesh(config.mesh, devices)
        mesh_lib.check_batch(mesh, config.batch_size, config.microbatches, "batch_size")
        size = config.evaluation.batch_size
        mesh_lib.check_batch(mesh, size, 1, "evaluation.batch_size")
        frozen(config.optimizer.freeze, task.param_axes)
        return mesh, state_lib.shardings(task, config, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_workdir(workdir: pathlib.Path, config: Config, allow_change: bool) -> None:
    """Raises a ConfigError if the workdir cannot be this run's."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir {workdir} is a file")
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_dir() and any(p.name != CONFIG_DRAFT for p in workdir.iterdir()):
            raise ConfigError(
                f"--workdir {workdir} is not empty and holds no run; give a new or a run's folder"
            )
        return
    try:
        old = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not readable ({error}); restore it or remove it") from error
    different = changes(old, to_dict(config))
    if different and not allow_change:
        raise ConfigError(
            f"--workdir {workdir} holds a run with another config ({'; '.join(different[:5])});"
            " give a new --workdir, or --allow_config_change to continue it all the same"
        )


def write_config(workdir: pathlib.Path, config: Config) -> None:
    """config.json, whole or not at all: a run may be killed at any moment."""
    if jax.process_index() != 0:
        return
    draft = workdir / CONFIG_DRAFT
    draft.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    draft.replace(workdir / "config.json")


def put_local(batch: Mapping[str, np.ndarray], sharding) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays."""
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def starting_params(
    config: Config, workdir: pathlib.Path, shapes: TrainState, shardings: TrainState
) -> Any:
    """The parameters in ``config.init_from``; None without one, or once the run has begun.

    Raises:
      CheckpointError: if there are none, or they are another model's.
    """
    if not config.init_from or begun(workdir):
        return None
    try:
        source = Checkpoints(pathlib.Path(config.init_from))
        found = source.restore_params(shapes.params, shardings.params)
        source.close()
    except CheckpointError as error:
        raise CheckpointError(f"config.init_from: {error}") from error
    logger.info("starting from the parameters of %s, step %d", config.init_from, found.step)
    return found.value


def begun(workdir: pathlib.Path) -> bool:
    """Whether a step was saved, whole or damaged since; what a killed save left does not count."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def put_given(task: Task, mesh: jax.sharding.Mesh) -> Any:
    """What ``task.given`` returns, on every device."""
    return jax.device_put(task.given(), mesh_lib.replicated(mesh))


def _continue(data, restored: Restored, allow_data_change: bool) -> None:
    """Sets the data to the checkpoint's position."""
    try:
        data.set_state(restored.meta["data"], allow_data_change)
    except DataChanged as error:
        raise CheckpointError(
            f"{error}. Start in a new --workdir, or give --allow_data_change to continue at the"
            " same batch number"
        ) from error
    logger.info("continuing from step %d", restored.step)


def _start(
    task: Task, config: Config, shardings: TrainState, restored: Restored | None, params: Any
):
    """The state to start from and its step; a new run has ``params`` if they are given."""
    if restored is not None:
        return restored.value, restored.step
    start = time.perf_counter()
    state = jax.jit(lambda: state_lib.create(task, config), out_shardings=shardings)()
    if params is not None:
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        state = dataclasses.replace(state, params=params, ema=ema)
    jax.block_until_ready(state.step)
    logger.info("parameters initialised in %.1f s", time.perf_counter() - start)
    return state, 0


def _log(writers, config: Config, shapes, step: int, metrics: Any, compilations: int, checkpoints):
    """Writes metrics if due; raises if too many updates in a row were bad."""
    bad_steps = int(metrics["bad_steps"])  # waits for that step
    if bad_steps:
        where = _not_finite(shapes, metrics)
        logger.warning("update %d skipped (%d in a row): not finite: %s", step, bad_steps, where)
        if bad_steps >= config.max_bad_steps:
            checkpoints.wait()
            kept = checkpoints.steps()
            raise TrainingDiverged(
                f"stopped at step {step}: {bad_steps} updates in a row were not finite ({where})."
                f" Checkpoints kept: {kept or 'none'}. Lower optimizer.learning_rate, set"
                " optimizer.clip_norm, or look at the data of these steps"
            )
    if step % config.log.every_steps == 0 or step == config.num_steps or bad_steps:
        values = {k: float(v) for k, v in metrics.items() if k != "finite_gradients"}
        writers.train(step, values, compilations)


def _not_finite(shapes: TrainState, metrics: Any) -> str:
    """Names what was not finite in an update."""
    names = [name for name in ("loss", "update_norm") if not np.isfinite(metrics[name])]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params)]
    bad = np.flatnonzero(~np.asarray(metrics["finite_gradients"]))
    keys = [jax.tree_util.keystr(paths[i], simple=True, separator="/") for i in bad[:3]]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    if keys:
        names.append(f"gradients of {', '.join(keys)}{more}")
    return ", ".join(names) or "norm of the gradients"


def param_table(task: Task, shapes: TrainState, shardings: TrainState) -> str:
    """A line per parameter with its axes and how it is split, and their number."""
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes.params))
    rows = mesh_lib.table(shapes.params, task.param_axes, shardings.params)
    return f"{rows}\n{count:,} parameters"


class _Profiler:
    """A profiler trace over the steps that the config names."""

    def __init__(self, config: Config, workdir: pathlib.Path):
        self._first = config.log.profile_start
        self._last = self._first + config.log.profile_steps - 1
        self._folder = workdir / "profile"

    def before(self, step: int) -> None:
        if self._first >= 0 and step == self._first:
            jax.profiler.start_trace(str(self._folder))

    def after(self, step: int, state: TrainState) -> None:
        if self._first >= 0 and step == self._last:
            jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
