"""The tasks: one file per family; each has ``build(config) -> Task``."""

from collections.abc import Callable

from ..config import Config, ConfigError
from ..task import Task
from . import (
    formal_language,
    image_classification,
    language_model,
    masked_diffusion,
    masked_language_model,
    rectified_flow,
    word_problem,
)

TASKS: dict[str, Callable[[Config], Task]] = {
    "word_problem": word_problem.build,
    "formal_language": formal_language.build,
    "language_model": language_model.build,
    "masked_language_model": masked_language_model.build,
    "masked_diffusion": masked_diffusion.build,
    "image_classification": image_classification.build,
    "rectified_flow": rectified_flow.build_images,
    "rectified_flow_2d": rectified_flow.build_points,
}


def build(config: Config) -> Task:
    """Builds the task that the config names.

    Raises:
      ConfigError: if there is no such task, or its part of the config is invalid.
    """
    if config.task not in TASKS:
        raise ConfigError(f"unknown task {config.task!r}; choose one of {', '.join(TASKS)}")
    try:
        return TASKS[config.task](config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"invalid config: {error}") from error
