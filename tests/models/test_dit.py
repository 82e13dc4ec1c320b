"""The diffusion transformer: sizes, its beginning as 0, its condition, and mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import params as params_lib
from scanax.models.dit import SIZES, DiT, DiTConfig

CONFIG = DiTConfig(16, 2, 2, (2, 2), 3, "float32", "float32", False)


def inputs(size: int = 4, batch: int = 2):
    x = jax.random.normal(jax.random.key(0), (batch, size, size, 1))
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch, dtype=jnp.int32)


@pytest.fixture(scope="module")
def trained():
    """Parameters that are 0 nowhere."""
    params = params_lib.initialise(DiT(CONFIG), jax.random.key(1), *inputs())
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noise)


def apply(params, *args, config=CONFIG):
    return jax.jit(DiT(config).apply)({"params": params}, *args)


@pytest.mark.parametrize("size", ["S", "B"])
def test_parameters_are_those_of_the_paper(size):
    """18 d^2 + 15 d in a block; DiT-S/2 on 32 x 32 x 4 latents has 33M with all that is around."""
    d, layers, heads = SIZES[size]
    config = DiTConfig(d, layers, heads, (2, 2), 1000, "float32", "float32", False)
    example = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(lambda: params_lib.initialise(DiT(config), jax.random.key(0), *example))
    assert params_lib.count(shapes["layers_0"]) == 18 * d * d + 15 * d
    around = 17 * d + 257 * d + d * d + d + 1001 * d + 2 * d * (d + 1) + 16 * (d + 1)
    assert params_lib.count(shapes) == layers * (18 * d * d + 15 * d) + around


def test_it_begins_as_0():
    x, t, label = inputs()
    params = params_lib.initialise(DiT(CONFIG), jax.random.key(1), x, t, label)
    assert not np.any(apply(params, x, t, label))


def test_output_is_that_of_the_equations(trained):
    """The whole network again, in numpy."""
    p = jax.tree.map(np.asarray, trained)
    x, t, label = (np.asarray(a) for a in inputs())
    dense = lambda q, y: y @ q["kernel"] + q["bias"]
    silu = lambda y: y / (1 + np.exp(-y))
    norm = lambda y: (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    patches = np.stack(
        [x[:, i : i + 2, j : j + 2].reshape(2, 4) for i in (0, 2) for j in (0, 2)], axis=1
    )
    rates = 10_000.0 ** (-np.arange(4) / 4)
    place = lambda n: np.concatenate([np.sin(n * rates), np.cos(n * rates)])
    places = np.stack([np.concatenate([place(i), place(j)]) for i in (0, 1) for j in (0, 1)])
    h = dense(p["patches"], patches) + places[None]
    angle = 1000 * t[:, None] * np.exp(-np.log(1e4) * np.arange(128) / 128)[None]
    time = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    c = dense(p["time_out"], silu(dense(p["time_in"], time))) + p["classes"][label]
    for i in range(2):
        q = p[f"layers_{i}"]
        b1, s1, a1, b2, s2, a2 = np.split(dense(q["modulation"], silu(c))[:, None], 6, axis=-1)
        qkv = dense(q["qkv"], norm(h) * (1 + s1) + b1).reshape(2, 4, 3, 2, 8)
        score = np.einsum("btnk,bsnk->bnts", qkv[:, :, 0], qkv[:, :, 1]) / np.sqrt(8)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        o = np.einsum("bnts,bsnk->btnk", weight, qkv[:, :, 2]).reshape(2, 4, 16)
        h = h + a1 * dense(q["out"], o)
        y = dense(q["mlp_in"], norm(h) * (1 + s2) + b2)
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        h = h + a2 * dense(q["mlp_out"], y)
    shift, scale = np.split(dense(p["modulation"], silu(c))[:, None], 2, axis=-1)
    out = dense(p["output"], norm(h) * (1 + scale) + shift).reshape(2, 2, 2, 2, 2, 1)
    expected = out.transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 1)
    np.testing.assert_allclose(apply(trained, *inputs()), expected, rtol=2e-4, atol=2e-4)


def test_recomputation_and_bfloat16_agree(trained):
    value = lambda config: jax.jit(
        jax.value_and_grad(
            lambda p: jnp.sum(jnp.square(DiT(config).apply({"params": p}, *inputs())))
        )
    )(trained)
    loss, gradient = value(CONFIG)
    again, same = value(dataclasses.replace(CONFIG, remat=True))
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(a))))
    half = apply(trained, *inputs(), config=dataclasses.replace(CONFIG, dtype="bfloat16"))
    full = apply(trained, *inputs())
    assert half.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(half - full))) < 0.1 * float(jnp.max(jnp.abs(full)))


def test_mistakes_are_named(trained):
    x, t, label = inputs()
    with pytest.raises(ValueError, match="labels must fit"):
        DiT(CONFIG).apply({"params": trained}, x, t)
    with pytest.raises(ValueError, match="does not divide images of 5 x 5"):
        DiT(CONFIG).apply({"params": trained}, jnp.zeros((2, 5, 5, 1)), t, label)
    for change, message in (
        ({"hidden_size": 18}, "multiple of 4"),
        ({"num_heads": 3}, "num_heads"),
        ({"patch_size": (2,)}, "two sizes"),
        ({"num_classes": -1}, "not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
