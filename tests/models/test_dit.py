"""The diffusion transformer: size, beginning, gradients, precision, places, mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import params as params_lib
from scanax.models.dit import DiT, DiTConfig, places, size

SMALL = DiTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_heads=2,
    patch_size=2,
    num_classes=3,
    dtype="float32",
    param_dtype="float32",
    remat=False,
)
LOW = {"dtype": "bfloat16"}
X, T, LABEL = jnp.ones((2, 4, 6, 3)), jnp.asarray([0.2, 0.7]), jnp.asarray([1, 3])


def shapes(config, *inputs):
    init = lambda *inputs: params_lib.initialise(DiT(config), jax.random.key(0), *inputs)
    return jax.eval_shape(init, *inputs)


@pytest.mark.parametrize("name", ["S", "B", "XL"])
def test_size(name):
    """18 d^2 + 15 d of each block; the whole of S/2 without classes, counted by hand."""
    config = dataclasses.replace(SMALL, **size(name), num_classes=0)
    d, x = config.hidden_size, jnp.ones((1, 32, 32, 3))
    tree = shapes(config, x, T[:1])
    assert params_lib.count(tree["layers_0"]) == 18 * d**2 + 15 * d
    ends = 12 * d + d + 256 * d + d + d**2 + d + 2 * d**2 + 2 * d + 12 * d + 12
    blocks = config.num_hidden_layers * (18 * d**2 + 15 * d)
    assert params_lib.count(tree) == blocks + ends


def test_beginning_and_gradients(jit):
    """0 at first. With other weights: finite differences, recomputed, in bfloat16."""
    params = jit(lambda: params_lib.initialise(DiT(SMALL), jax.random.key(0), X, T, LABEL))()
    run = lambda config, params, x: DiT(config).apply({"params": params}, x, T, LABEL)
    apply = jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(run(SMALL, p, x))), argnums=1))
    assert float(apply(params, X)[0]) == 0
    rng = np.random.default_rng(0)
    noise = lambda p: jnp.asarray(rng.standard_normal(p.shape) * p.shape[0] ** -0.5, jnp.float32)
    params = jax.tree.map(noise, params)
    x = jnp.asarray(rng.standard_normal(X.shape), jnp.float32)
    value, gradient = apply(params, x)
    direction = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    ends = [apply(params, x + s * 1e-2 * direction)[0] for s in (1, -1)]
    assert abs((ends[0] - ends[1]) / 2e-2 / jnp.sum(gradient * direction) - 1) < 2e-2
    configs = [SMALL, *(dataclasses.replace(SMALL, **c) for c in ({"remat": True}, LOW))]
    wide, remat, low = jit(lambda p, x: [run(c, p, x) for c in configs])(params, x)
    assert wide.dtype == low.dtype == jnp.float32 and np.isfinite(value)
    np.testing.assert_allclose(remat, wide, 1e-5, 1e-5)
    assert 0 < np.abs(low - wide).max() < 0.1 * np.abs(wide).max()
    assert np.abs(wide).max() > 0.1


def test_places():
    """Column first, then row; sines, then cosines."""
    table = np.asarray(places((2, 3), 8))
    rate = 0.01  # the second of two
    for row in range(2):
        for column in range(3):
            angles = column, column * rate, row, row * rate
            sin, cos = np.sin(angles), np.cos(angles)
            want = [*sin[:2], *cos[:2], *sin[2:], *cos[2:]]
            np.testing.assert_allclose(table[3 * row + column], want, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 3}, "must divide model.hidden_size"),
        ({"hidden_size": 18}, "multiple of 4"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"dtype": "half"}, "dtype must be one of"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="num_classes is 3: labels must fit"):
        shapes(SMALL, X, T)
    with pytest.raises(ValueError, match="num_classes is 0: labels must fit"):
        shapes(dataclasses.replace(SMALL, num_classes=0), X, T, LABEL)
    with pytest.raises(ValueError, match="patch_size 4 does not divide inputs of 4 x 6"):
        shapes(dataclasses.replace(SMALL, patch_size=4), X, T, LABEL)
    with pytest.raises(ValueError, match="choose one of S, B, L, XL"):
        size("M")
