"""Rectified flow, of images and of points: the first flow, reflow, distillation, annealing.

Dimensions: B examples, T bins of time; an example's own axes are of any number.

t = 0 is noise or where the flow starts, t = 1 is data. What is trained is decided by where the ends
of a path come from (``data``), and by what is asked of the velocity between them (``objective``).
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models import params as params_lib
from ...models.rectified_flow import distillation, losses, recipe, solvers, time_density
from ...models.rectified_flow.annealing import Annealing, anneal, flip_pair, schedule as annealing
from ...models.rectified_flow.lpips import load_lpips
from ...models.rectified_flow.perceptual import random_conv_distance, resized
from .. import flow_analyses, flow_pictures
from ..checkpoint import Checkpoints
from ..config import Config, ConfigError, build as build_part, from_dict
from ..data.flow import FlowImageConfig, FlowImages
from ..data.mixtures import MixtureConfig, MixtureData
from ..data.pairs import Pairs
from ..data.pipeline import IGNORE, Batches
from ..task import Aux, Curve, Task
from .flow_models import FlowModel, flow_model

BINS = 10  # of time, in evaluation
FLIPS = ("none", "example", "batch")
UPDATES = "updates"  # so many there were, in extra


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is asked of the velocity.

    Attributes:
      loss: a name of ``scanax.models.rectified_flow.losses``.
      times: density of the training times, see ``times.time_density``.
      eps: its cut-off; 0 for the density's own.
      weight: over time, a name of ``losses.WEIGHTS``.
      huber_c: "d", "sqrt_d" or a number, see ``losses.per_example``.
      distance: perceptual, for losses with "lpips": "random_conv", or "lpips:FILE", "piq:FILE"
        with weights that the user has; "" for none.
      distance_size: images are resized to this for it: "" as they are, "64" as SlimFlow does,
        corners aligned, or "224" as 2-RF++ does.
      annealing: share of fresh noise in the pairs' (``annealing.schedule``): "linear:300000";
        "none".
      flip: pairs are mirrored as one: "none", "example" or "batch", one coin for the batch.
      teacher: folder of a trained flow, for the two keys below; its averaged parameters are used.
      online_steps: the data's X_1 are replaced by the teacher's, in so many Euler steps from X_0:
        reflow without stored pairs; 0 for none.
      guidance: weight of the two-step term of flow-guided distillation; 0 for none.
    """

    loss: str
    times: str
    eps: float
    weight: str
    huber_c: str
    distance: str
    distance_size: str
    annealing: str
    flip: str
    teacher: str
    online_steps: int
    guidance: float

    def __post_init__(self):
        time_density(self.times, self.eps or None)
        losses.weight(self.weight, jnp.zeros(1))
        if self.annealing != "none":
            annealing(self.annealing)
        if self.flip not in FLIPS:
            raise ValueError(f"objective.flip must be one of {', '.join(FLIPS)}; got {self.flip!r}")
        if self.distance_size not in _RESIZED:
            raise ValueError(
                f"objective.distance_size must be one of {', '.join(map(repr, _RESIZED))}"
            )
        if min(self.online_steps, self.guidance, self.eps) < 0:
            raise ValueError("objective.online_steps, guidance and eps must not be negative")
        if bool(self.online_steps or self.guidance) != bool(self.teacher):
            raise ValueError(
                "objective.teacher is the flow that objective.online_steps or objective.guidance"
                " use: set it with one of them"
            )
        if losses.is_perceptual(self.loss) != bool(self.distance):
            raise ValueError(
                f"objective.loss={self.loss} with objective.distance={self.distance!r}: a loss with"
                " lpips in its name needs a distance, the others none"
            )
        losses.check(self.loss, lambda x, y: x, self.c)

    @property
    def c(self) -> float | str:
        """Of the pseudo-Huber loss."""
        try:
            return float(self.huber_c)
        except ValueError:
            return self.huber_c


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn.

    Attributes:
      recipe: of the solver, see ``scanax.models.rectified_flow.recipes``.
      label: class of all samples; -1 for all classes in turn.
      invert: of the way back to noise, for the analyses that need it.
      features: by what the analysis "quality" compares images, see
        ``scanax.train.metrics.make_extractor``; "classifier" trains a small one on the data first.
      recipes: what the analysis "quality" compares.
    """

    recipe: str
    label: int
    invert: str
    features: str
    recipes: tuple[str, ...]

    def __post_init__(self):
        for text in (self.recipe, *self.recipes):
            if not recipe(text).to_data:
                raise ValueError(f"sampler: recipe {text!r} goes to noise, samples go to data")
        if recipe(self.invert).to_data:
            raise ValueError(f"sampler.invert: recipe {self.invert!r} goes to data")


FlowData = FlowImages | MixtureData  # they have the same methods


@dataclasses.dataclass(frozen=True)
class Flow:
    """A velocity with its data: what the task, the analyses and the pairs' generator work on.

    Attributes:
      config: of the run.
      objective, sampler: its parts.
      data: where it begins and ends.
      model: the velocity.
    """

    config: Config
    objective: ObjectiveConfig
    sampler: SamplerConfig
    data: FlowData
    model: FlowModel

    def velocity(self, params, labels_B=None, keys_B=None) -> solvers.Velocity:
        """(x, t) -> v, with these labels, and the noise of training if there are keys."""
        labels_B = labels_B if self.model.num_classes else None
        apply: Any = self.model.module.apply
        return lambda x, t_B: apply({"params": params}, x, t_B, labels_B, keys=keys_B)

    def solve(
        self, params, x: jax.Array, labels_B: jax.Array, text: str, keys_B=None, trajectory=False
    ) -> solvers.Solution:
        """From x, [B, ...], by the recipe ``text``; compiled once per recipe and shape.

        Raises:
          ValueError: if images that are to become noise are not in [-1, 1], or for a label that
            there is not.
        """
        if len(self.data.shape) == 3 and not recipe(text).to_data:
            largest = float(jnp.max(jnp.abs(x)))
            if not largest <= 1.001:
                raise ValueError(
                    f"images must be in [-1, 1]; the largest number of these is {largest:.4g}:"
                    " divide grey levels by 127.5 and subtract 1"
                )
        if self.model.num_classes and not bool(
            jnp.all((labels_B >= 0) & (labels_B <= self.model.num_classes))
        ):
            raise ValueError(
                f"labels must be 0 to {self.model.num_classes - 1}, or {self.model.num_classes}"
                f" for no class; got {np.unique(np.asarray(labels_B))}"
            )
        return self._solve(params, x, labels_B, keys_B, recipe(text), trajectory)

    @functools.cached_property
    def _solve(self):
        def solve(params, x, labels_B, keys_B, solver, trajectory):
            v = self.velocity(params, labels_B)
            return solvers.solve(v, x, solver, key=keys_B, trajectory=trajectory)

        return jax.jit(solve, static_argnums=(4, 5))

    def starts(self, numbers: np.ndarray, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """X_0 [B, ...] and labels [B] of these numbers, and their keys [B] for other noise.

        Noise is a function of the key and the number alone; labels take turns, or are the
        sampler's.
        """
        keys_B2 = _split(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers)), 2)
        given = self.data.start(numbers, training=False)
        x = _normal(keys_B2[0], self.data.shape) if given is None else jnp.asarray(given)
        labels = numbers % max(self.model.num_classes, 1)
        if self.sampler.label >= 0:
            labels = np.full_like(numbers, self.sampler.label)
        return x, jnp.asarray(labels, jnp.int32), keys_B2[1]


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


def flow_of(config: Config) -> Flow:
    """The flow of a config.

    Raises:
      ConfigError, ValueError: if its parts do not fit together.
    """
    if config.task == "rectified_flow":
        data = FlowImages(build_part(FlowImageConfig, config.data, "data"))
    elif config.task == "rectified_flow_2d":
        data = MixtureData(build_part(MixtureConfig, config.data, "data"))
    else:
        raise ConfigError(f"task {config.task} is no rectified flow")
    objective: ObjectiveConfig = build_part(ObjectiveConfig, config.objective, "objective")
    sampler: SamplerConfig = build_part(SamplerConfig, config.sampler, "sampler")
    model = flow_model(config, data.shape)
    if model.num_classes and model.num_classes < data.num_classes:
        raise ValueError(
            f"model.num_classes ({model.num_classes}) is smaller than the {data.num_classes}"
            " classes of the data"
        )
    if not -1 <= sampler.label < max(model.num_classes, 0):
        raise ValueError(
            f"sampler.label must be -1 or one of the {model.num_classes} classes, got"
            f" {sampler.label}"
        )
    if objective.flip != "none" and len(data.shape) != 3:
        raise ValueError("objective.flip mirrors images, and these are none")
    return Flow(config, objective, sampler, data, model)


def make_task(flow: Flow, render: Callable[[Any], Any], analyses: Mapping[str, Any]) -> Task:
    """The Task of a flow."""
    config, data, module = flow.config, flow.data, flow.model.module
    example = _example(flow)
    teacher = _Teacher(flow) if flow.objective.teacher else None
    loss = make_loss(flow, teacher)
    schedule = annealing(flow.objective.annealing) if flow.objective.annealing != "none" else None

    def init(key: jax.Array):
        extra = {UPDATES: jnp.zeros((), jnp.int32)} if schedule else {}
        return params_lib.initialise(module, key, *example), extra

    def train_data(process_index: int, process_count: int) -> Batches:
        check_teacher(config, data.pairs, flow.objective.teacher, data.config.teacher)
        return data.train_batches(config.batch_size, process_index, process_count)

    def sample(params, extra, key, n: int):
        del extra
        x, labels_B, keys_B = flow.starts(np.arange(n), key)
        return np.asarray(flow.solve(params, x, labels_B, flow.sampler.recipe, keys_B).x)

    return Task(
        batch_spec=_spec(flow, config.batch_size),
        eval_spec=_spec(flow, config.evaluation.batch_size),
        param_axes=params_lib.logical_axes(module, *example),
        init=init,
        loss=loss,
        evaluate=functools.partial(_evaluate, flow),
        train_data=train_data,
        eval_data=functools.partial(data.eval_batch, config.evaluation.batch_size),
        settle=lambda extra: {n: x + 1 if n == UPDATES else x for n, x in extra.items()},
        given=(lambda: {}) if teacher is None else teacher.params,
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


def make_loss(flow: Flow, teacher: "_Teacher | None"):
    """``Task.loss``: the objective along the paths of a batch."""
    o = flow.objective
    density, distance = time_density(o.times, o.eps or None), make_distance(flow)
    schedule: Annealing | None = annealing(o.annealing) if o.annealing != "none" else None
    eps = density.eps

    def loss(params, extra, batch, keys_B):
        noise, fresh, coin, time, net, leg, xi = _split(keys_B, 7)
        labels_B, x1 = batch["labels"], batch["x1"]
        x0 = batch["x0"] if "x0" in batch else _normal(noise, x1.shape[1:])
        if o.online_steps:
            assert teacher is not None
            euler = recipe(f"rf_euler:{o.online_steps}")
            end = solvers.solve(teacher.velocity(extra["given"], labels_B), x0, euler).x
            x1 = jax.lax.stop_gradient(end)
        if schedule is not None:
            x0 = anneal(x0, _normal(fresh, x0.shape[1:]), schedule.beta(extra[UPDATES]))
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
            s_B = jax.vmap(lambda k: jax.random.uniform(k, (), minval=_LEGS[0], maxval=_LEGS[1]))(
                leg
            )
            start = _normal(xi, x1.shape[1:])
            two_B = distillation.two_step_loss(
                o.loss, student, guide, start, s_B, distance, eps=eps
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
    return resized(distance, int(o.distance_size), align_corners=_RESIZED[o.distance_size])


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


class _Teacher:
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
        shapes = jax.eval_shape(init, jax.random.key(0), *_example(self._flow))
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = jax.tree.map(lambda _: one, shapes)
        return self._checkpoints.restore_params(shapes, place, average=True).value


def _evaluate(flow: Flow, params, extra, batch, keys_B):
    """The loss of pairs, and the same in bins of time."""
    del extra
    o = flow.objective
    noise, time = _split(keys_B, 2)
    x1, real_B = batch["x1"], batch["labels"] != IGNORE
    x0 = batch["x0"] if "x0" in batch else _normal(noise, x1.shape[1:])
    t_B = time_density(o.times, o.eps or None).sample(time)
    v = flow.velocity(params, jnp.where(real_B, batch["labels"], 0))
    loss_B = distillation.pair_loss(o.loss, v, x0, x1, t_B, make_distance(flow), huber_c=o.c)
    loss_B = jnp.where(real_B, loss_B, 0.0)
    bin_B = jnp.minimum((t_B * BINS).astype(jnp.int32), BINS - 1)
    where_BT = jax.nn.one_hot(bin_B, BINS) * real_B[:, None]
    return {
        "loss": (jnp.sum(loss_B), jnp.sum(real_B, dtype=jnp.float32)),
        "loss_by_time": (jnp.sum(loss_B[:, None] * where_BT, axis=0), jnp.sum(where_BT, axis=0)),
    }


def _spec(flow: Flow, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    end = jax.ShapeDtypeStruct((rows, *flow.data.shape), jnp.float32)
    spec = {"x1": end, "labels": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    c = flow.data.config
    if c.pairs or getattr(c, "start_path", "points"):
        spec["x0"] = end
    return spec


def _example(flow: Flow) -> tuple[Any, ...]:
    """Inputs of the module."""
    x, t_B = jnp.zeros((1, *flow.data.shape)), jnp.zeros(1)
    return (x, t_B, jnp.zeros(1, jnp.int32)) if flow.model.num_classes else (x, t_B)


def _noisy(flow: Flow) -> bool:
    return getattr(flow.model.config, "dropout", 0.0) > 0


def _split(keys_B: jax.Array, number: int) -> list[jax.Array]:
    """[B] keys -> ``number`` times [B] keys."""
    split = jax.vmap(lambda key: jax.random.split(key, number))(keys_B)
    return [split[:, i] for i in range(number)]


def _normal(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_B)


_LEGS = distillation.LEGS
_RESIZED = {"": None, "64": True, "224": False}  # to this size: whether corners are aligned
