"""The configuration of a run: schema, validation, and what a resumed run may change.

``configs/base.py`` declares the defaults; this module knows types and meaning. A wrong key,
type or combination is a ``ConfigError`` before anything is compiled or written.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import typing
from typing import Any

from .mesh import MeshConfig
from .optimizer import OptimizerConfig, check_schedule

# Keys that decide how a run is executed, not what it computes: free to change on resume.
FREE_ON_RESUME = ("checkpoint", "log", "mesh", "microbatches", "evaluation.every_steps", "sampler")


class ConfigError(ValueError):
    """The user asked for something that cannot be run; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation.

    Attributes:
      every_steps: cadence; 0 is at the end only.
      batches: at most so many per evaluation; 0 is the whole evaluation set.
      batch_size: rows of each.
      seed: of the noise, and of data that is generated.
      samples: drawn at each evaluation.
      stop_when: METRIC>=NUMBER or METRIC<=NUMBER: the run ends at the first evaluation at which
        it holds, or at ``num_steps``; empty for no condition.
    """

    every_steps: int
    batches: int
    batch_size: int
    seed: int
    samples: int
    stop_when: str

    def __post_init__(self):
        if min(self.every_steps, self.samples, self.batches) < 0 or self.batch_size < 1:
            raise ValueError(
                "evaluation: batch_size must be positive, every_steps, batches and samples not"
                " negative"
            )
        if self.stop_when and not self.every_steps:
            raise ValueError("evaluation.stop_when needs evaluation.every_steps")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Attributes:
      every_steps: saving cadence; the end of a run and a preemption always save.
      keep: number of newest checkpoints that stay.
      asynchronous: write in the background while training goes on.
    """

    every_steps: int
    keep: int
    asynchronous: bool

    def __post_init__(self):
        if self.every_steps < 1 or self.keep < 1:
            raise ValueError("checkpoint.every_steps and checkpoint.keep must be at least 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Logging cadence and profiler window, in steps."""

    every_steps: int
    profile_start: int
    profile_steps: int

    def __post_init__(self):
        if self.every_steps < 1 or self.profile_steps < 1:
            raise ValueError("log.every_steps and log.profile_steps must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
      task: name of the file in ``train/tasks`` that builds the ``Task``.
      family: of the model; the task knows which it can train.
      seed: of the parameters and of all noise in training.
      num_steps: parameter updates.
      batch_size: examples per update, over all devices and microbatches.
      microbatches: parts that an update's batch is computed in; gradients are accumulated.
      max_bad_steps: non-finite updates in a row after which the run stops.
      init_from: a run's folder; its newest parameters (not their average) are where a new run
        starts; empty for the parameters that ``seed`` draws.
      model, data, objective, sampler: validated by the task, which knows their keys: what is
        trained, on what, for what, and how samples are drawn from it.
      optimizer, evaluation, checkpoint, mesh, log: see their classes.
    """

    task: str
    family: str
    seed: int
    num_steps: int
    batch_size: int
    microbatches: int
    max_bad_steps: int
    init_from: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    objective: Mapping[str, Any]
    sampler: Mapping[str, Any]
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    log: LogConfig

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "microbatches", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of microbatches"
                f" ({self.microbatches})"
            )
        check_schedule(self.optimizer, self.num_steps)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and validates a Config from nested mappings (a ConfigDict, or parsed JSON)."""
    return build(Config, values)


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of ``from_dict``: nested dictionaries that JSON can hold."""
    return dataclasses.asdict(dataclasses.replace(config, model=dict(config.model)))


def build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """Builds dataclass ``cls`` from a mapping, checking keys and types.

    Args:
      cls: a dataclass without defaults; its fields are the allowed keys.
      values: the mapping. Integers are accepted for floats, lists for tuples.
      path: where the mapping stands in the config, for messages ("model").

    Raises:
      ConfigError: for an unknown or missing key, a wrong type, or a value that the class
        rejects.
    """
    types = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(unknown_key(_join(path, key), [_join(path, n) for n in names]))
    missing = [_join(path, name) for name in names if name not in values]
    if missing:
        raise ConfigError(f"the config lacks {', '.join(missing)}: declared in configs/base.py")
    fields = {name: _convert(types[name], values[name], _join(path, name)) for name in names}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"invalid config: {error}") from error


def replaced(values: Mapping[str, Any], new: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A group of the config with other values; texts become numbers where there were numbers.

    Raises:
      ConfigError: for an unknown key, or a text that is no such number.
    """
    result = dict(values)
    for key, value in new.items():
        if key not in values:
            raise ConfigError(unknown_key(_join(path, key), [_join(path, n) for n in values]))
        kind = type(values[key])
        if isinstance(value, str) and kind in (int, float):
            try:
                value = kind(value)
            except ValueError:
                raise ConfigError(f"{_join(path, key)} must be a number, got {value!r}") from None
        result[key] = value
    return result


def unknown_key(key: str, known: list[str]) -> str:
    """The message for an unknown config key, with the nearest right name.

    Args:
      key: as written, dotted.
      known: all dotted keys.
    """
    matches = [""]  # walk down the dots, taking the nearest name at every level
    for depth, part in enumerate(key.split(".")):
        below = [name for name in known if depth == 0 or name.startswith(matches[-1] + ".")]
        level = sorted({".".join(name.split(".")[: depth + 1]) for name in below})
        near = difflib.get_close_matches(_join(matches[-1], part), level, n=1, cutoff=0.6)
        if not near:
            where = f"{matches[-1]!r} has" if matches[-1] else "known keys:"
            return f"unknown config key {key!r}; {where} {', '.join(level)}"
        matches.append(near[0])
    return f"unknown config key {key!r}; did you mean {matches[-1]!r}?"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two configs beyond ``FREE_ON_RESUME``, one line per key."""
    old_flat, new_flat = flatten(old), flatten(new)
    lines = []
    for key in sorted(old_flat | new_flat):
        if any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME):
            continue
        before, after = old_flat.get(key, "absent"), new_flat.get(key, "absent")
        if _plain(before) != _plain(after):
            lines.append(f"{key}: {before} -> {after}")
    return lines


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one dictionary with dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, _join(path, key))
        else:
            flat[_join(path, key)] = value
    return flat


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a group of keys, got {value!r}")
        return build(kind, value, path)
    origin: Any = typing.get_origin(kind) or kind
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, list | tuple):
        item = typing.get_args(kind)[0]
        return tuple(_convert(item, x, f"{path}[{i}]") for i, x in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    if isinstance(value, bool) != (origin is bool) or not isinstance(value, origin):
        raise ConfigError(f"{path} must be of type {origin.__name__}, got {value!r}")
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
