"""The convolutional classifier, and the features that all classifiers of images have."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import base
from scanax.models.convnet import ConvNet, ConvNetConfig
from scanax.train import tasks
from scanax.train.config import from_dict

CONFIG = ConvNetConfig(
    num_classes=3, stages=(4, 6), convs_per_stage=2, norm_groups=2, feature_size=12
)
IMAGES = np.random.default_rng(0).standard_normal((2, 7, 6, 2)).astype(np.float32)


def random_params(config: ConvNetConfig):
    """Parameters of which every one counts; to initialise would take longer than all else."""
    shapes = jax.eval_shape(ConvNet(config).init, jax.random.key(0), jnp.asarray(IMAGES))
    draw = np.random.default_rng(1).standard_normal
    return jax.tree.map(
        lambda x: jnp.asarray(0.5 * draw(x.shape), jnp.float32), nn.unbox(shapes["params"])
    )


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """3 x 3 with one pixel of zeros around, by its definition."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (range(0, size, stride) for size in x.shape[1:3])
    window = lambda i, j: padded[:, i : i + 3, j : j + 3]
    return np.stack(
        [
            np.stack([np.einsum("bhwc,hwcf->bf", window(i, j), kernel) for j in columns], 1)
            for i in rows
        ],
        1,
    )


def group_norm(x: np.ndarray, groups: int, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    grouped = x.reshape(*x.shape[:3], groups, -1)
    mean, variance = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    return ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias


def by_hand(params, config: ConvNetConfig) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits in numpy, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = IMAGES.astype(np.float64)
    for i in range(len(config.stages)):
        for j in range(config.convs_per_stage):
            conv = p[f"conv_{i}_{j}"]
            x = convolve(x, conv["kernel"], 2 if i > 0 and j == 0 else 1)
            if config.norm_groups:
                x = group_norm(x, config.norm_groups, **p[f"norm_{i}_{j}"])
            else:
                x = x + conv["bias"]
            x = np.maximum(x, 0)
    x = x.mean(axis=(1, 2))
    features = np.maximum(x @ p["features"]["kernel"] + p["features"]["bias"], 0)
    return features, features @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("norm_groups", [2, 0])
def test_against_its_definition(norm_groups, jit, check):
    config = dataclasses.replace(CONFIG, norm_groups=norm_groups)
    params, module = random_params(config), ConvNet(config)
    both = jit(lambda p, x: module.apply({"params": p}, x, method="features_and_logits"))
    features, logits = both(params, jnp.asarray(IMAGES))
    want = by_hand(params, config)
    assert np.count_nonzero(want[0]) > 4
    check("features", features, want[0], 1e-5)
    check("logits", logits, want[1], 1e-5)


MODELS = {
    "mlp": {"hidden_size": 16, "intermediate_size": 16},
    "lightnet": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16},
    "convnet": {"stages": (8, 8), "convs_per_stage": 1, "feature_size": 16},
}


@pytest.mark.parametrize("family", MODELS)
def test_every_classifier_has_features(family, jit):
    """The head on the features gives the logits that the loss and the evaluation see."""
    config = base.get_config("image_classification", family)
    config.data.channels, config.mesh.data = 1, 1
    config.model.update(MODELS[family])
    task = tasks.build(from_dict(config.to_dict()))

    @jit
    def run(key, batch):
        params, extra = task.init(key)
        found = task.features(params, extra, batch["images"])
        return *found, params["head"], task.evaluate(params, extra, batch, None)

    batch = {name: jnp.asarray(x[:16]) for name, x in task.eval_data(0).items()}
    features, logits, head, sums = run(jax.random.key(0), batch)
    assert features.shape == (16, 16) and features.dtype == logits.dtype == jnp.float32
    bias = head.get("bias", jnp.zeros(10))
    np.testing.assert_allclose(features @ head["kernel"] + bias[None], logits, atol=1e-5)
    right = jnp.argmax(logits, axis=-1) == batch["labels"]
    assert int(sums["accuracy"][0]) == int(right.sum())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feature_size": 0}, "model.feature_size must be at least 1"),
        ({"stages": ()}, "model.stages must be positive"),
        ({"stages": (4, 0)}, "model.stages must be positive"),
        ({"norm_groups": -1}, "must not be negative"),
        ({"norm_groups": 4}, r"model.norm_groups \(4\) must divide all of model.stages"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("shape", [(1, 3, 3, 1), (1, 4, 8, 8, 1)])
def test_images_too_small_for_the_stages(shape):
    config = dataclasses.replace(CONFIG, stages=(4, 4, 4))
    with pytest.raises(ValueError, match=r"3 stages needs images .* of 4 x 4 or more"):
        jax.eval_shape(ConvNet(config).init, jax.random.key(0), jnp.zeros(shape))
