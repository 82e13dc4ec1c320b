"""Image classification: which class is in the picture.

Dimensions: B examples, H height, W width, C channels, K classes.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ...models import params as params_lib
from ...models.convnet import ConvNet, ConvNetConfig
from ...models.lightnet import LightNetClassifier, LightNetGridConfig
from ...models.mlp import MLP, MLPConfig
from ..config import Config, build as build_part
from ..data.image_sources import ImageConfig
from ..data.images import ImageSet
from ..data.pipeline import IGNORE
from ..task import Aux, Task
from .models import choose

# family -> its config and its module
FAMILIES: Mapping[str, tuple[type, type[nn.Module]]] = {
    "mlp": (MLPConfig, MLP),
    "lightnet": (LightNetGridConfig, LightNetClassifier),
    "convnet": (ConvNetConfig, ConvNet),
}


def build(config: Config) -> Task:
    """The task: a classifier of the images of ``config.data``."""
    data: ImageConfig = build_part(ImageConfig, config.data, "data")
    images = ImageSet(data)
    classes = images.num_classes
    if classes < 2:
        raise ValueError("image classification needs at least two classes: see data.label_key")
    kind, make = choose(config, FAMILIES)
    model = build_part(kind, {**config.model, "num_classes": classes}, "model")
    module: Any = make(model)
    noisy = getattr(model, "drop_path", 0.0) > 0
    example = jnp.zeros((1, *images.shape))

    def init(key: jax.Array):
        return params_lib.initialise(module, key, example), {}

    def classify(params, images, **noise) -> jax.Array:
        logits_BK: Any = module.apply({"params": params}, images, **noise)
        return logits_BK

    def loss(params, extra, batch, keys):
        noise = {"keys": keys} if noisy else {}  # the augmentation is the data's
        logits_BK = classify(params, batch["images"], **noise)
        targets_BK = batch.get("targets", jax.nn.one_hot(batch["labels"], classes))
        loss_B = optax.softmax_cross_entropy(logits_BK, targets_BK)
        weight = jnp.asarray(loss_B.size, jnp.float32)
        right_B = jnp.argmax(logits_BK, axis=-1) == batch["labels"]
        return jnp.sum(loss_B), Aux(weight, extra, {"accuracy": (jnp.sum(right_B), weight)})

    def evaluate(params, extra, batch, keys):
        del extra, keys
        logits_BK = classify(params, batch["images"])
        real_B = batch["labels"] != IGNORE
        labels_B = jnp.where(real_B, batch["labels"], 0)
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B)
        _, best_B5 = jax.lax.top_k(logits_BK, min(5, classes))
        right_B5 = (best_B5 == labels_B[:, None]) & real_B[:, None]
        weight = jnp.sum(real_B, dtype=jnp.float32)
        return {
            "loss": (jnp.sum(jnp.where(real_B, loss_B, 0.0)), weight),
            "accuracy": (jnp.sum(right_B5[:, 0]), weight),
            "top5_accuracy": (jnp.sum(right_B5), weight),
        }

    def features(params, extra, images):
        del extra
        found: Any = module.apply({"params": params}, images, method="features_and_logits")
        return found

    def spec(rows: int, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {
            "images": jax.ShapeDtypeStruct((rows, *images.shape), jnp.float32),
            "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
        }
        if training and data.soft_targets:
            shapes["targets"] = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
        return shapes

    size = config.evaluation.batch_size
    return Task(
        batch_spec=spec(config.batch_size, training=True),
        eval_spec=spec(size, training=False),
        param_axes=params_lib.logical_axes(module, example),
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_data=functools.partial(images.train_batches, config.batch_size),
        eval_data=functools.partial(images.eval_batch, size),
        features=features,
    )
