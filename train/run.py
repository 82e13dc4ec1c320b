"""Reloading a finished or running training from its folder, for notebooks and evaluation."""

import dataclasses
import pathlib
from typing import Any

from . import state as state_lib, tasks
from .checkpoint import CheckpointError, Checkpoints
from .config import Config, from_dict
from .loop import place
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


def load(workdir: str | pathlib.Path, step: int | None = None, **mesh: int) -> Run:
    """Loads the newest undamaged checkpoint of a run, or the one of ``step``.

    Args:
      workdir: the ``--workdir`` of the training run. It is only read.
      step: a saved step; None for the newest.
      **mesh: devices per mesh axis, for example ``fsdp=4``; one device by default, whatever
        the run was trained on.

    Raises:
      CheckpointError: if there is nothing to load, or it is damaged; names the steps there are.
    """
    checkpoints = Checkpoints(pathlib.Path(workdir))
    saved = dict(checkpoints.read_meta(step)[1]["config"])
    config = from_dict({**saved, "mesh": {**dict.fromkeys(saved["mesh"], 1), **mesh}})
    task = tasks.build(config)
    _, shardings = place(task, config)
    shapes = state_lib.shapes(task, config)
    restored = checkpoints.restore_for_evaluation(shapes, shardings, step)
    checkpoints.close()
    if restored is None:
        raise CheckpointError(f"{workdir} holds no checkpoint")
    params, extra = restored.value
    return Run(config, task, params, extra, restored.step)
