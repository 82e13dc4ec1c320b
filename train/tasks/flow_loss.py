"""The losses of flows: ends of paths, what is asked on them, and teachers.

Dimensions: B examples; an example's own axes are of any number.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from ...models import params as params_lib
from ...models.rectified_flow import distillation, losses, recipe, solvers, time_density
from ...models.rectified_flow.annealing import Annealing, anneal, flip_pair, schedule as annealing
from ...models.rectified_flow.lpips import load_lpips
from ...models.rectified_flow.perceptual import random_conv_distance, resized
from ..checkpoint import Checkpoints
from ..config import Config, ConfigError, from_dict
from ..data.pairs import Pairs
from ..task import Aux
from .flow import Flow, example_inputs, normal, split_keys
from .flow_config import RESIZED
from .flow_models import flow_model

UPDATES = "updates"  # so many there were, in extra


def make_loss(flow: Flow, teacher: "Teacher | None"):
    """``Task.loss``: the objective along the paths of a batch."""
    o = flow.objective
    density, distance = time_density(o.times, o.eps or None), make_distance(flow)
    schedule: Annealing | None = annealing(o.annealing) if o.annealing != "none" else None
    legs = time_density("range:{}:{}".format(*distillation.LEGS))

    def loss(params, extra, batch, keys_B):
        noise, fresh, coin, time, net, leg, xi = split_keys(keys_B, 7)
        labels_B, x1 = batch["labels"], batch["x1"]
        x0 = batch["x0"] if "x0" in batch else normal(noise, x1.shape[1:])
        if o.online_steps:
            assert teacher is not None
            euler = recipe(f"rf_euler:{o.online_steps}")
            end = solvers.solve(teacher.velocity(extra["given"], labels_B), x0, euler).x
            x1 = jax.lax.stop_gradient(end)
        if schedule is not None:
            x0 = anneal(x0, normal(fresh, x0.shape[1:]), schedule.beta(extra[UPDATES]))
        if o.flip == "example":
            x0, x1 = flip_pair(coin, x0, x1)
        elif o.flip == "batch":
            x0, x1 = flip_pair(coin[0], x0, x1)
        t_B = density.sample(time)
        student = flow.velocity(params, labels_B, net if _noisy(flow) else None)
        loss_B = distillation.pair_loss(
            o.loss, student, x0, x1, t_B, distance, huber_c=o.c
        ) * losses.weight(o.weight, t_B)
        weight = jnp.asarray(loss_B.size, jnp.float32)
        metrics = {}
        if o.guidance:
            assert teacher is not None
            guide = teacher.velocity(extra["given"], labels_B)
            s_B = legs.sample(leg)
            start = normal(xi, x1.shape[1:])
            two_B = distillation.two_step_loss(
                o.loss, student, guide, start, s_B, distance, eps=density.eps
            ) * losses.weight(o.weight, s_B)
            metrics = {
                "pair_loss": (jnp.sum(loss_B), weight),
                "two_step_loss": (jnp.sum(two_B), weight),
            }
            loss_B = loss_B + o.guidance * two_B
        return jnp.sum(loss_B), Aux(weight, extra, metrics)

    return loss


def make_distance(flow: Flow) -> losses.Distance | None:
    """The perceptual distance of the objective; None without one.

    Raises:
      ConfigError: for another name, or a file that holds no weights.
    """
    o = flow.objective
    if not o.distance:
        return None
    if len(flow.data.shape) != 3:
        raise ConfigError("objective.distance compares images, and these are none")
    kind, _, file = o.distance.partition(":")
    if kind == "random_conv" and not file:
        side = min(flow.data.shape[:2])
        scales = max(n for n in (1, 2, 3) if 2 ** (n - 1) <= side)
        distance = random_conv_distance(channels=flow.data.shape[2], scales=scales)
    elif kind in ("lpips", "piq") and file:
        try:
            distance = load_lpips(pathlib.Path(file), kind)
        except (ValueError, OSError) as error:
            raise ConfigError(f"objective.distance: {error}") from error
    else:
        raise ConfigError(
            f"objective.distance={o.distance!r} should be random_conv, lpips:FILE or piq:FILE"
        )
    if not o.distance_size:
        return distance
    return resized(distance, int(o.distance_size), align_corners=RESIZED[o.distance_size])


def check_teacher(config: Config, pairs: Pairs | None, teacher: str, named: str) -> None:
    """Raises a ConfigError if pairs are not those of the flow that they should be of."""
    expected = named or teacher or config.init_from
    if pairs is None or not expected:
        return
    source = Checkpoints(pathlib.Path(expected))
    steps = source.steps()
    found = [source.fingerprint(step) for step in steps]
    source.close()
    if pairs.metadata["teacher"] not in found:
        raise ConfigError(
            f"data.pairs={config.data['pairs']} are of another teacher ({pairs.metadata['run']},"
            f" checksum {pairs.metadata['teacher']}) than {expected} (steps {steps}, checksums"
            f" {', '.join(found)}). Generate pairs with it, or set data.teacher to the folder of"
            " the flow that they are of"
        )


class Teacher:
    """A trained flow that stays as it is; its parameters are ``Task.given``."""

    def __init__(self, student: Flow):
        folder = student.objective.teacher
        self._checkpoints = Checkpoints(pathlib.Path(folder))
        config = from_dict(dict(self._checkpoints.read_meta()[1]["config"]))
        if not config.task.startswith("rectified_flow"):
            raise ConfigError(f"objective.teacher={folder} is a run of task {config.task}, no flow")
        model = flow_model(config, student.data.shape)
        if bool(model.num_classes) != bool(student.model.num_classes):
            raise ConfigError("teacher and student must both have classes, or neither")
        self._flow = dataclasses.replace(student, config=config, model=model)
        self.velocity = self._flow.velocity

    def params(self) -> Any:
        init = functools.partial(params_lib.initialise, self._flow.model.module)
        shapes = jax.eval_shape(init, jax.random.key(0), *example_inputs(self._flow))
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = jax.tree.map(lambda _: one, shapes)
        return self._checkpoints.restore_params(shapes, place, average=True).value


def _noisy(flow: Flow) -> bool:
    return getattr(flow.model.config, "dropout", 0.0) > 0
