"""Evaluation: averages of a task's sums over batches that are always the same.

The noise of evaluation batch i is ``fold_in(key(seed), i)``, and the batch itself depends on
the seed and i only, so two evaluations of the same parameters agree at any step, after any
resume and on any mesh.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np
from PIL import Image

from . import mesh as mesh_lib, plots, state as state_lib
from .config import Config, ConfigError
from .task import Task

Means = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Condition:
    """A metric with a limit: "sequence_accuracy_512>=0.95" or "bits_per_byte<=1.8"."""

    metric: str
    at_least: bool
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Raises a ConfigError if the text is not METRIC>=NUMBER or METRIC<=NUMBER."""
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*([-+.\deE]+)\s*", text)
        try:
            assert found
            return cls(found[1], found[2] == ">=", float(found[3]))
        except (AssertionError, ValueError):
            raise ConfigError(
                f"{text!r} is not a condition; write METRIC>=NUMBER or METRIC<=NUMBER"
            ) from None

    def met(self, means: Mapping[str, Any]) -> bool:
        """Whether the metric is on the right side; never if it is NaN."""
        value = means[self.metric]
        return bool(value >= self.limit if self.at_least else value <= self.limit)


def stop_condition(task: Task, config: Config) -> Condition | None:
    """``evaluation.stop_when``, checked against what the task reports; nothing is computed.

    Raises:
      ConfigError: if it is no condition on one of the task's scalar metrics.
    """
    if not config.evaluation.stop_when:
        return None
    condition = Condition.parse(config.evaluation.stop_when)
    check_metrics("evaluation.stop_when", [condition.metric], task, config)
    return condition


def check_metrics(what: str, names: Iterable[str], task: Task, config: Config) -> None:
    """Raises a ConfigError if the task reports no scalar of such a name; nothing is computed."""
    shapes = state_lib.shapes(task, config)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.evaluation.batch_size))
    sums = jax.eval_shape(task.evaluate, shapes.params, shapes.extra, task.eval_spec, keys)
    totals = jax.tree.map(lambda x: np.ones(x.shape), dict(sums))
    means = {name: value / weight for name, (value, weight) in totals.items()}
    means |= task.derive(totals, means)
    known = [name for name, value in means.items() if np.ndim(value) == 0]
    for name in names:
        if name not in known:
            raise ConfigError(f"{what}: there is no metric {name!r}; there are {', '.join(known)}")


def make_evaluator(task: Task, config: Config, mesh: Mesh) -> Callable[[Any, Any], Means]:
    """Returns evaluate(params, extra) -> {name: mean}; compiled at its first call."""
    size = config.evaluation.batch_size
    batch_sharding, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)

    def sums(params, extra, batch, index):
        key = jax.random.fold_in(jax.random.key(config.evaluation.seed), index)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models that ask for it
            return dict(task.evaluate(params, extra, batch, jax.random.split(key, size)))

    compiled = jax.jit(sums, out_shardings=whole)

    def evaluate(params: Any, extra: Any) -> Means:
        total = None
        for index in range(config.evaluation.batches or sys.maxsize):
            local = task.eval_data(index)
            if local is None:
                break
            batch = put_global(local, batch_sharding)
            values = jax.device_get(compiled(params, extra, batch, np.int32(index)))
            values = jax.tree.map(lambda x: np.asarray(x, np.float64), values)
            total = values if total is None else jax.tree.map(np.add, total, values)
        assert total is not None  # there is at least one batch
        with np.errstate(invalid="ignore"):  # an entry of a curve without examples is NaN
            means = {name: value / weight for name, (value, weight) in total.items()}
            return {**means, **task.derive(total, means)}

    return evaluate


def put_global(batch: Mapping[str, np.ndarray], sharding) -> dict[str, jax.Array]:
    """A batch that every process holds whole, as sharded global arrays."""
    return {
        name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
        for name, x in batch.items()
    }


def write_report(
    task: Task, config: Config, folder: pathlib.Path, means: Means, params: Any, extra: Any
) -> str:
    """Writes metrics.json, arrays, the curve and samples.

    Returns:
      The samples' text, or where the picture of them is; "" without samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scalars = {name: float(x) for name, x in means.items() if x.ndim == 0}
    curves = {name: x for name, x in means.items() if x.ndim > 0}
    (folder / "metrics.json").write_text(json.dumps(scalars, indent=2) + "\n")
    if curves:
        np.savez_compressed(folder / "curves.npz", **curves)  # pyright: ignore[reportArgumentType]
    if task.curve is not None:
        plots.write_curve(task.curve, means[task.curve.metric], folder.parents[1].name, folder)
    if not config.evaluation.samples:
        return ""
    drawn = draw_samples(task, params, extra, config.evaluation.seed, config.evaluation.samples)
    if isinstance(drawn, str):
        (folder / "samples.txt").write_text(drawn + "\n")
        return drawn
    return write_picture(drawn, folder / "samples.png")


def draw_samples(task: Task, params: Any, extra: Any, seed: int, number: int) -> str | np.ndarray:
    """Samples of the task as text or a picture for people; empty if it has none."""
    if task.sample is None or task.render is None:
        return ""
    return task.render(task.sample(params, extra, jax.random.key(seed), number))


def write_picture(picture: np.ndarray, path: pathlib.Path) -> str:
    """Writes a PNG of uint8 [H, W] or [H, W, 3]; returns a line that says so."""
    Image.fromarray(picture).save(path)
    return f"samples drawn in {path}"
