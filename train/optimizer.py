"""AdamW with clipping and weight-decay masks, and the learning-rate schedules.

The schedule is a function of the run's step, not of a counter inside the optimizer, so that
a skipped update does not shift it. Parameter averaging (EMA) is part of the step.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "wsd")
DECAY_MASKS = ("matrices", "all")
EMA_STARTS = ("warmup", "constant", "halflife")
STACKED = ("layers", "experts")  # logical axes of parameters that are many of a kind


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and its schedule.

    Attributes:
      learning_rate: peak rate.
      schedule: after the warmup: "constant"; "cosine" down to the final rate; or "wsd"
        (warmup, stable, linear decay to the final rate over the last ``decay_steps``).
      warmup_steps: the rate rises linearly from 0 over these steps.
      decay_steps: length of the decay of "wsd".
      final_fraction: rate after the last step, as a fraction of the peak.
      b1, b2, eps, weight_decay: of AdamW; the decay is multiplied by the rate.
      decay_mask: "matrices" decays parameters with two or more axes, not counting those along
        which layers or experts lie behind each other; "all" every one.
      clip_norm: largest global gradient norm; 0 turns clipping off.
      ema_decay: of the parameter average; 0 turns the average off.
      ema_start: how the average forgets the first parameters: "warmup", a decay of at most
        (1 + n) / (10 + n) in the n-th update, n = 1, 2, ... (score SDE, rectified flow, SlimFlow);
        "constant", the parameters after the third update and the full decay from then on (2-RF++);
        or "halflife", a half-life of at most a twentieth of the updates so far (EDM).
      freeze: regular expressions; parameters in whose path one is found, for example
        "layers/moe/router_head", are not updated...
      freeze_from: ...from this step on.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    final_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decay_mask: str
    clip_norm: float
    ema_decay: float
    ema_start: str
    freeze: tuple[str, ...]
    freeze_from: int

    def __post_init__(self):
        choices = (("schedule", SCHEDULES), ("decay_mask", DECAY_MASKS), ("ema_start", EMA_STARTS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"optimizer.{name} must be one of {', '.join(allowed)};"
                    f" got {getattr(self, name)!r}"
                )
        fractions = {"b1": self.b1, "b2": self.b2, "ema_decay": self.ema_decay}
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {value}")
        names = ("learning_rate", "warmup_steps", "decay_steps", "final_fraction", "clip_norm")
        for name in (*names, "weight_decay", "freeze_from"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"optimizer.{name} must be finite and not negative, got {value}")
        if self.freeze_from and not self.freeze:
            raise ValueError("optimizer.freeze_from needs optimizer.freeze: what is to be frozen")


def check_schedule(config: OptimizerConfig, num_steps: int) -> None:
    """Raises a ValueError if the schedule's parts do not fit into the run."""
    parts = {"warmup_steps": config.warmup_steps}
    if config.schedule == "wsd":
        parts["decay_steps"] = config.decay_steps
    if sum(parts.values()) > num_steps:
        names = " + ".join(f"optimizer.{name} ({value})" for name, value in parts.items())
        raise ValueError(f"{names} exceeds num_steps ({num_steps})")


def make_schedule(config: OptimizerConfig, num_steps: int):
    """The learning rate as a function of the step (a traced integer)."""

    def schedule(step: jax.Array) -> jax.Array:
        step = step.astype(jnp.float32)
        # The first update already moves: its rate is one warmup step above 0.
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.schedule == "constant":
            shape = jnp.ones(())
        elif config.schedule == "cosine":
            length = max(num_steps - config.warmup_steps, 1)
            done = jnp.clip((step - config.warmup_steps) / length, 0, 1)
            shape = 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            start = num_steps - config.decay_steps
            shape = 1 - jnp.clip((step - start) / max(config.decay_steps, 1), 0, 1)
        floor = config.final_fraction
        return config.learning_rate * warmup * (floor + (1 - floor) * shape)

    return schedule


def make_optimizer(config: OptimizerConfig, param_axes: Any) -> optax.GradientTransformation:
    """Clipping, Adam's direction and weight decay; the step multiplies by -rate.

    Args:
      config: its settings.
      param_axes: logical axis names of the parameters, ``Task.param_axes``.
    """
    mask = None
    if config.decay_mask == "matrices":
        own = lambda axes: [axis for axis in axes if axis not in STACKED]
        mask = lambda params: jax.tree.map(lambda _, axes: len(own(axes)) >= 2, params, param_axes)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask),
    )


def frozen(patterns: Sequence[str], param_axes: Any) -> Any:
    """A tree like the parameters: whether one of the regular expressions is found in their path.

    Raises:
      ValueError: for what is no regular expression, or is found in no parameter's path.
    """
    is_leaf = lambda x: isinstance(x, tuple)
    paths, tree = jax.tree_util.tree_flatten_with_path(param_axes, is_leaf)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    for pattern in patterns:
        try:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"optimizer.freeze: no parameter has {pattern!r} in its path; there are"
                    f" {', '.join(names)}"
                )
        except re.error as error:
            raise ValueError(f"optimizer.freeze: {pattern!r} is no regular expression") from error
    found = [any(re.search(pattern, name) for pattern in patterns) for name in names]
    return jax.tree.unflatten(tree, found)


def ema_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Decay of the parameter average in the update of a step: how much of the old one stays."""
    step = step.astype(jnp.float32)
    if config.ema_start == "constant":
        return jnp.where(step < 3, 0.0, config.ema_decay)
    if config.ema_start == "halflife":
        return jnp.minimum(config.ema_decay, 0.5 ** (20 / (step + 1)))
    return jnp.minimum(config.ema_decay, (2 + step) / (11 + step))
