"""Rectified flow, of images and of points: the first flow, reflow, distillation, annealing.

Dimensions: B examples, T bins of time; an example's own axes are of any number.

What is trained is decided by where the ends of a path come from (``data``, see flow.py), and by
what is asked of the velocity between them (``objective``, see flow_loss.py).
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import params as params_lib
from ...models.rectified_flow import distillation, losses, time_density
from .. import flow_analyses, flow_pictures
from ..config import Config
from ..data.pipeline import IGNORE, Batches
from ..task import Curve, Task
from .flow import Flow, example_inputs, flow_of, normal, split_keys
from .flow_loss import UPDATES, Teacher, check_teacher, make_loss

BINS = 10  # of time, in evaluation


def build_images(config: Config) -> Task:
    """The task: a flow of images."""
    flow = flow_of(config)
    return make_task(
        flow,
        flow_pictures.images,
        {
            "quality": functools.partial(flow_analyses.quality, flow),
            "geometry": functools.partial(flow_analyses.geometry, flow),
            "inversion": functools.partial(flow_analyses.inversion, flow),
            "interpolation": functools.partial(flow_analyses.interpolation, flow),
            "editing": functools.partial(flow_analyses.editing, flow),
            "transfer": functools.partial(flow_analyses.transfer, flow),
        },
    )


def build_points(config: Config) -> Task:
    """The task: a flow of points in the plane."""
    flow = flow_of(config)
    mixtures: Any = flow.data.config
    return make_task(
        flow,
        functools.partial(flow_pictures.points, mixtures),
        {
            "geometry": functools.partial(flow_analyses.geometry, flow),
            "toy": functools.partial(flow_analyses.toy, flow),
        },
    )


def make_task(flow: Flow, render: Callable[[Any], Any], analyses: Mapping[str, Any]) -> Task:
    """The Task of a flow."""
    config, data, module = flow.config, flow.data, flow.model.module
    example = example_inputs(flow)
    teacher = Teacher(flow) if flow.objective.teacher else None
    anneals = flow.objective.annealing != "none"

    def init(key: jax.Array):
        extra = {UPDATES: jnp.zeros((), jnp.int32)} if anneals else {}
        return params_lib.initialise(module, key, *example), extra

    def begin() -> None:
        check_teacher(config, data.pairs, flow.objective.teacher, data.config.teacher)

    def train_data(process_index: int, process_count: int) -> Batches:
        flow.check()
        batches = data.train_batches(config.batch_size, process_index, process_count)
        if teacher is not None:
            batches.identity |= {"objective.teacher": teacher.fingerprint}
        return batches

    def sample(params, extra, key, n: int):
        del extra
        x, labels_B, keys_B = flow.starts(np.arange(n), key)
        return np.asarray(flow.solve(params, x, labels_B, flow.sampler.recipe, keys_B).x)

    return Task(
        batch_spec=_spec(flow, config.batch_size),
        eval_spec=_spec(flow, config.evaluation.batch_size),
        param_axes=params_lib.logical_axes(module, *example),
        init=init,
        loss=make_loss(flow, teacher),
        evaluate=functools.partial(_evaluate, flow),
        train_data=train_data,
        eval_data=functools.partial(data.eval_batch, config.evaluation.batch_size),
        settle=lambda extra: {n: x + 1 if n == UPDATES else x for n, x in extra.items()},
        begin=begin,
        given=lambda: {} if teacher is None else teacher.params,
        sample=sample,
        render=render,
        curve=Curve(
            "loss_by_time",
            [(i + 0.5) / BINS for i in range(BINS)],
            "time (0 noise, 1 data)",
            f"loss ({flow.objective.loss})",
            log_x=False,
        ),
        analyses=analyses,
    )


def _evaluate(flow: Flow, params, extra, batch, keys_B):
    """The weighted loss of pairs, and the same in bins of time.

    Of the ends as the data, or the stored pairs, have them: annealing, mirroring, the ends and the
    guidance of a teacher are training's alone.
    """
    del extra
    o = flow.objective
    noise, time = split_keys(keys_B, 2)
    x1, real_B = batch["x1"], batch["labels"] != IGNORE
    x0 = batch["x0"] if "x0" in batch else normal(noise, x1.shape[1:])
    t_B = time_density(o.times, o.eps or None).sample(time)
    v = flow.velocity(params, jnp.where(real_B, batch["labels"], 0))
    loss_B = distillation.pair_loss(o.loss, v, x0, x1, t_B, flow.distance, huber_c=o.c)
    loss_B = jnp.where(real_B, loss_B * losses.weight(o.weight, t_B), 0.0)
    bin_B = jnp.minimum((t_B * BINS).astype(jnp.int32), BINS - 1)
    where_BT = jax.nn.one_hot(bin_B, BINS) * real_B[:, None]
    return {
        "loss": (jnp.sum(loss_B), jnp.sum(real_B, dtype=jnp.float32)),
        "loss_by_time": (jnp.sum(loss_B[:, None] * where_BT, axis=0), jnp.sum(where_BT, axis=0)),
    }


def _spec(flow: Flow, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    end = jax.ShapeDtypeStruct((rows, *flow.shape), jnp.float32)
    spec = {"x1": end, "labels": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    if flow.data.config.pairs or not flow.data.from_noise:
        spec["x0"] = end
    return spec
