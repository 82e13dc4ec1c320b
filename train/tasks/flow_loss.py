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
from ..checkpoint import CheckpointError, Checkpoints
from ..checksum import fingerprint, tree_checksums
from ..config import Config, ConfigError, from_dict
from ..data.pairs import Pairs
from ..task import Aux
from .flow import Flow, example_inputs, normal, split_keys
from .flow_models import flow_model

UPDATES = "updates"  # so many there were, in extra


def make_loss(flow: Flow, teacher: "Teacher | None"):
    """``Task.loss``: the objective along the paths of a batch."""
    o = flow.objective
    density = time_density(o.times, o.eps or None)
    schedule: Annealing | None = annealing(o.annealing) if o.annealing != "none" else None
    legs = time_density("range:{}:{}".format(*distillation.LEGS))

    def loss(params, extra, batch, keys_B):
        noise, fresh, coin, time, net, leg, xi, net_two = split_keys(keys_B, 8)
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
        student = lambda keys: flow.velocity(params, labels_B, keys if _noisy(flow) else None)
        loss_B = distillation.pair_loss(
            o.loss, student(net), x0, x1, t_B, flow.distance, huber_c=o.c
        ) * losses.weight(o.weight, t_B)
        weight = jnp.asarray(loss_B.size, jnp.float32)
        metrics = {}
        if o.guidance:
            assert teacher is not None
            guide = teacher.velocity(extra["given"], labels_B)
            s_B = legs.sample(leg)
            start = normal(xi, x1.shape[1:])
            two_B = distillation.two_step_loss(
                *(o.loss, student(net_two), guide, start, s_B, flow.distance),
                huber_c=o.c,
                eps=density.eps,
            ) * losses.weight(o.weight, s_B)
            metrics = {
                "pair_loss": (jnp.sum(loss_B), weight),
                "two_step_loss": (jnp.sum(two_B), weight),
            }
            loss_B = loss_B + o.guidance * two_B
        return jnp.sum(loss_B), Aux(weight, extra, metrics)

    return loss


def check_teacher(config: Config, pairs: Pairs | None, teacher: str, named: str) -> None:
    """Raises a ConfigError if pairs are not those of the flow that they should be of.

    Of any whole step of it.
    """
    expected = named or teacher or config.init_from
    if pairs is None or not expected:
        return
    source = Checkpoints(pathlib.Path(expected))
    found: dict[int, str] = {}
    for step in source.steps():
        try:
            found[step] = source.fingerprint(step)
        except CheckpointError:
            continue  # a damaged step is nobody's teacher
    source.close()
    if pairs.metadata["teacher"] not in found.values():
        steps = ", ".join(f"step {step}: {checksum}" for step, checksum in found.items())
        raise ConfigError(
            f"data.pairs={config.data['pairs']} are of another teacher ({pairs.metadata['run']},"
            f" checksum {pairs.metadata['teacher']}) than {expected} ({steps or 'no whole step'})."
            " Generate pairs with it, or set data.teacher to the folder of the flow that they are"
            " of"
        )


class Teacher:
    """A trained flow that stays as it is, opened when it is first needed.

    Its parameters, the newest averaged ones, are ``Task.given``; their fingerprint is part of what
    a run must agree with when it continues.

    Raises, when it is opened:
      CheckpointError: if the folder holds no run, or nothing whole.
      ConfigError: if that is no flow for the student.
    """

    def __init__(self, student: Flow):
        self._student = student
        self._folder = student.objective.teacher

    def velocity(self, params, labels_B) -> solvers.Velocity:
        return self._flow.velocity(params, labels_B)

    @functools.cached_property
    def params(self) -> Any:
        init = functools.partial(params_lib.initialise, self._flow.model.module)
        shapes = jax.eval_shape(init, jax.random.key(0), *example_inputs(self._flow))
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        checkpoints = Checkpoints(pathlib.Path(self._folder))
        place = jax.tree.map(lambda _: one, shapes)
        found = checkpoints.restore_params(shapes, place, average=True)
        checkpoints.close()
        return found.value

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(tree_checksums(self.params))

    @functools.cached_property
    def _flow(self) -> Flow:
        """The student's, with the teacher's model."""
        student, checkpoints = self._student, Checkpoints(pathlib.Path(self._folder))
        config = from_dict(dict(checkpoints.read_meta()[1]["config"]))
        checkpoints.close()
        named = f"objective.teacher={self._folder}"
        if config.task != student.config.task:
            raise ConfigError(f"{named} is a run of task {config.task}, not {student.config.task}")
        model = flow_model(config)
        if model.shape not in (None, student.shape):
            raise ConfigError(f"{named} is for {model.shape}, the student for {student.shape}")
        classes = student.model.num_classes, model.num_classes
        if bool(classes[0]) != bool(classes[1]) or classes[0] > classes[1]:
            raise ConfigError(
                f"the student has {classes[0]} classes and {named} {classes[1]}: both must have"
                " classes, or neither, and the teacher all of the student's"
            )
        return dataclasses.replace(student, config=config, model=model)


def _noisy(flow: Flow) -> bool:
    return getattr(flow.model.config, "dropout", 0.0) > 0
