"""A velocity with its data: what tasks, analyses and the pairs' generator work on.

Dimensions: B examples; an example's own axes are of any number.

t = 0 is noise or where the flow starts, t = 1 is data.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models.rectified_flow import losses, recipe, solvers
from ..config import Config, ConfigError, build as build_part
from ..data.flow import FlowImageConfig, FlowImages
from ..data.mixtures import MixtureConfig, MixtureData
from ..data.pairs import check_pairs
from .flow_config import ObjectiveConfig, SamplerConfig
from .flow_distance import make_distance
from .flow_models import FlowModel, flow_model

logger = logging.getLogger("scanax")

FlowData = FlowImages | MixtureData  # they have the same methods


@dataclasses.dataclass(frozen=True)
class Flow:
    """A velocity with its data.

    Attributes:
      config: of the run.
      objective, sampler: its parts.
      data: where it begins and ends.
      model: the velocity.
      shape: of an example.
    """

    config: Config
    objective: ObjectiveConfig
    sampler: SamplerConfig
    data: FlowData
    model: FlowModel
    shape: tuple[int, ...]

    def check(self) -> None:
        """Reads what training needs.

        Raises:
          ConfigError, DataError: if data, pairs and model do not fit together, or the file of the
            perceptual distance holds no weights.
        """
        data, classes = self.data, self.model.num_classes
        if data.shape != self.shape:
            raise ConfigError(
                f"the model is for images of {_by(self.shape)}, the data has {_by(data.shape)}: set"
                " model.image_size, model.channels or data.image_size, data.channels"
            )
        if classes and classes < data.num_classes:
            raise ConfigError(
                f"model.num_classes ({classes}) is smaller than the {data.num_classes} classes of"
                " the data"
            )
        if data.pairs is not None:
            check_pairs(data.pairs, self.shape, classes)
        assert self.distance is not None or not self.objective.distance

    @functools.cached_property
    def distance(self) -> losses.Distance | None:
        """The perceptual distance of the objective."""
        return make_distance(self.objective, self.shape)

    def velocity(self, params, labels_B=None, keys_B=None) -> solvers.Velocity:
        """(x, t) -> v, with these labels, and the noise of training if there are keys."""
        labels_B = labels_B if self.model.num_classes else None
        apply: Any = self.model.module.apply
        return lambda x, t_B: apply({"params": params}, x, t_B, labels_B, keys=keys_B)

    def solve(
        self, params, x: jax.Array, labels_B: jax.Array, text: str, keys_B=None, trajectory=False
    ) -> solvers.Solution:
        """From x, [B, ...], by the recipe ``text``; compiled once per recipe and shape.

        A solver that does not arrive is a warning.

        Raises:
          ValueError: if images that are to become noise are not in [-1, 1], or for a label that
            there is not.
        """
        solver = recipe(text)
        if len(self.shape) == 3 and not solver.to_data:
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
        solution = self._solve(params, x, labels_B, keys_B, solver, trajectory)
        if solver.method == "rk45" and not np.asarray(solution.reached).all():
            late = ~np.asarray(solution.reached)
            logger.warning(
                "%s did not reach its tolerance for %d of %d samples: they stop at times from"
                " %.3g on",
                *(text, late.sum(), late.size, float(np.asarray(solution.time)[late].min())),
            )
        return solution

    @functools.cached_property
    def _solve(self):
        def solve(params, x, labels_B, keys_B, solver, trajectory):
            v = self.velocity(params, labels_B)
            return solvers.solve(v, x, solver, key=keys_B, trajectory=trajectory)

        return jax.jit(solve, static_argnums=(4, 5))

    def starts(
        self, numbers: np.ndarray, key: jax.Array, training: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """X_0 [B, ...] and labels [B] of these numbers, and their keys [B] for other noise.

        Noise and points are functions of the key and the number alone; images are the training or
        the held-out ones, in an order of the key. Labels take turns, or are the sampler's.
        """
        keys_B2 = split_keys(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers)), 2)
        seed = int.from_bytes(np.asarray(jax.random.key_data(key)).tobytes())
        given = self.data.start(numbers, seed, training)
        x = normal(keys_B2[0], self.shape) if given is None else jnp.asarray(given)
        labels = numbers % max(self.model.num_classes, 1)
        if self.sampler.label >= 0:
            labels = np.full_like(numbers, self.sampler.label)
        return x, jnp.asarray(labels, jnp.int32), keys_B2[1]


def flow_of(config: Config) -> Flow:
    """The flow of a config; its data is not read if the config tells the shape.

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
    model = flow_model(config)
    if not -1 <= sampler.label < max(model.num_classes, 0):
        raise ValueError(
            f"sampler.label must be -1 or one of the {model.num_classes} classes, got"
            f" {sampler.label}"
        )
    _check_objective(objective, config, data)
    return Flow(config, objective, sampler, data, model, model.shape or data.shape)


def _check_objective(o: ObjectiveConfig, config: Config, data: FlowData) -> None:
    """Raises a ValueError if something is asked of a flow that it cannot be asked."""
    if isinstance(data, MixtureData) and (o.flip != "none" or o.distance):
        raise ValueError(
            "objective.flip mirrors images, objective.distance compares them: here are none"
        )
    if not data.from_noise and (o.annealing != "none" or o.guidance):
        raise ValueError(
            "objective.annealing and objective.guidance are for flows that start from noise"
        )
    if o.online_steps and data.config.pairs:
        raise ValueError("objective.online_steps is reflow without pairs: leave data.pairs empty")
    if o.flip == "batch" and config.microbatches > 1:
        raise ValueError(
            "objective.flip=batch is one coin for the batch: set microbatches to 1, or flip=example"
        )


def example_inputs(flow: Flow) -> tuple[Any, ...]:
    """Inputs of the module."""
    x, t_B = jnp.zeros((1, *flow.shape)), jnp.zeros(1)
    return (x, t_B, jnp.zeros(1, jnp.int32)) if flow.model.num_classes else (x, t_B)


def split_keys(keys_B: jax.Array, number: int) -> list[jax.Array]:
    """[B] keys -> ``number`` times [B] keys."""
    split = jax.vmap(lambda key: jax.random.split(key, number))(keys_B)
    return [split[:, i] for i in range(number)]


def normal(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_B)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
