"""Features of a classifier that was trained in this repository.

Dimensions: N images, H height, W width, C channels, D features, K classes.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from ..checksum import tree_checksums
from .batches import in_batches


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
      name: family, data, step, accuracy on what was held out if that is known, and a checksum
        of the parameters.
      features_and_probabilities: [N, H, W, C] uint8 -> [N, D], [N, K] float32.
    """

    name: str
    features_and_probabilities: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load(workdir: str | pathlib.Path, step: int | None = None) -> Classifier:
    """The classifier of a run; arguments and errors of ``features.classifier_features``."""
    from .. import run as run_lib  # it imports the tasks, which may evaluate with metrics

    folder = pathlib.Path(workdir)
    run = run_lib.load(folder, step)
    task, compute_features = run.task, run.task.features
    if compute_features is None or len(task.eval_spec["images"].shape) != 4:
        raise ValueError(
            f"{workdir} is a run of task {run.config.task}, not of image_classification on single"
            " images: it has no features"
        )
    shape = task.eval_spec["images"].shape[1:]

    @jax.jit
    def compute(params, images):
        x = images.astype(jnp.float32) / 127.5 - 1
        features_ND, logits_NK = compute_features(params, run.extra, x)
        return features_ND, jax.nn.softmax(logits_NK)

    def features_and_probabilities(images: np.ndarray):
        if images.shape[1:] != shape:
            raise ValueError(
                f"images of shape {images.shape[1:]}, but the classifier of {workdir} was trained"
                f" on {shape}"
            )
        return in_batches(functools.partial(compute, run.params), images)

    data, identity = run.config.data, task.train_data(0, 1).identity
    checksums = json.dumps(tree_checksums(run.params), sort_keys=True)
    parts = {
        "data": f"{data['name'] or data['path'] or data['source']} {identity['fingerprint']}",
        "step": str(run.step),
        "accuracy": _accuracy(folder, run.step),
        "parameters": hashlib.sha256(checksums.encode()).hexdigest()[:12],
    }
    text = ", ".join(f"{name} {value}" for name, value in parts.items())
    return Classifier(f"classifier-v1: {run.config.family}, {text}", features_and_probabilities)


def _accuracy(workdir: pathlib.Path, step: int) -> str:
    """On the run's own evaluation data, as its evaluation of that step wrote it."""
    path = workdir / "eval" / f"{step:08d}" / "metrics.json"
    if not path.is_file():
        return "unknown"
    return f"{json.loads(path.read_text())['accuracy']:.4f}"
