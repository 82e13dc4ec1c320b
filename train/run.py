"""Training and reloading from Python: what notebooks use, and evaluation."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import ml_collections

from . import loop, state as state_lib, tasks
from .checkpoint import CheckpointError, Checkpoints
from .config import Config, from_dict, replaced
from .task import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
      config: of the run, as saved with the checkpoint.
      task: built from it; ``task.sample(params, extra, key, n)`` and the rest work on params.
      params: the averaged parameters where there are any, else the parameters.
      extra: the task's non-optimised state.
      step: of the checkpoint.
    """

    config: Config
    task: Task
    params: Any
    extra: Any
    step: int


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    *,
    allow_config_change: bool = False,
) -> Run:
    """Trains, or continues what ``workdir`` holds; what ``scanax.train.main`` does.

    Args:
      config: as a config file's ``get_config`` returns it.
      workdir: the run's folder.
      allow_config_change: continue although the config differs from the workdir's.

    Returns:
      The trained model.

    Raises:
      ConfigError, CheckpointError, TrainingDiverged: see ``scanax.train.loop.train``.
    """
    frozen = from_dict(config.to_dict())
    task = tasks.build(frozen)
    state, _ = loop.train(
        task, frozen, pathlib.Path(workdir), allow_config_change=allow_config_change
    )
    return Run(frozen, task, state.eval_params, state.extra, int(state.step))


def load(
    workdir: str | pathlib.Path,
    step: int | None = None,
    *,
    sampler: Mapping[str, Any] | None = None,
    **mesh: int,
) -> Run:
    """Loads the newest undamaged checkpoint of a run, or the one of ``step``.

    Args:
      workdir: the ``--workdir`` of the training run. It is only read.
      step: a saved step; None for the newest.
      sampler: keys of the config's ``sampler`` with other values; texts are read as the type that
        is asked for.
      **mesh: devices per mesh axis, for example ``fsdp=4``; one device by default, whatever
        the run was trained on.

    Raises:
      CheckpointError: if there is nothing to load, or it is damaged; names the steps there are.
      ConfigError: if the sampler has no such key, or no such value.
    """
    checkpoints = Checkpoints(pathlib.Path(workdir))
    saved = dict(checkpoints.read_meta(step)[1]["config"])
    saved["mesh"] = {**dict.fromkeys(saved["mesh"], 1), **mesh}
    saved["sampler"] = replaced(saved["sampler"], sampler or {}, "sampler")
    config = from_dict(saved)
    task = tasks.build(config)
    _, shardings = loop.place(task, config)
    shapes = state_lib.shapes(task, config)
    restored = checkpoints.restore_for_evaluation(shapes, shardings, step)
    checkpoints.close()
    if restored is None:
        raise CheckpointError(f"{workdir} holds no checkpoint")
    params, extra = restored.value
    return Run(config, task, params, extra, restored.step)
