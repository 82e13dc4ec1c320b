"""The short convolution: its definition, the same in C++ with all gradients, and on a mesh."""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from scanax.kernels import dispatch, short_convolution
from scanax.kernels.short_convolution import native_cpu

REASON = native_cpu.why_not()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
native = functools.partial(short_convolution, implementation="native_cpu")
plain = functools.partial(short_convolution, implementation="xla")

# (B, T, D, W), with a history, with segments, activation.
CASES = {
    "several spans": ((2, 300, 33, 4), True, True, "silu"),
    "several parts": ((3, 70, 1030, 4), False, False, "silu"),
    "linear": ((2, 129, 20, 4), True, True, None),
    "three taps": ((1, 200, 48, 3), False, True, "silu"),
    "many taps": ((2, 65, 17, 7), True, True, "silu"),
    "one tap": ((2, 9, 8, 1), True, True, "silu"),
    "a token": ((5, 1, 16, 4), True, False, "silu"),
    "fewer tokens than taps": ((2, 2, 5, 6), True, True, "silu"),
    "no token": ((2, 0, 5, 4), True, False, "silu"),
    "no row": ((0, 3, 5, 4), True, True, None),
    "no channel": ((2, 3, 0, 4), False, False, "silu"),
}


def arrays(shape, history=False, segments=False, dtype="float32"):
    """x, kernel and history; options with the segments; a cotangent."""
    batch, tokens, channels, taps = shape
    rng = np.random.default_rng(0)
    normal = lambda *dims: rng.normal(size=dims).astype(dtype)
    x, kernel = normal(batch, tokens, channels), normal(taps, channels)
    before = normal(batch, taps - 1, channels) if history else None
    ids = np.cumsum(rng.random((batch, tokens)) < 0.1, axis=1) if segments else None
    return (x, kernel, before), ids, normal(batch, tokens, channels)


def with_gradients(function, inputs, ids, dy, activation):
    run = lambda x, kernel, history: function(
        x, kernel, history=history, segment_ids=ids, activation=activation
    )
    y, pullback = jax.vjp(run, *inputs)
    return y, pullback(dy)


def largest(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max(initial=0) / np.abs(b).max(initial=1e-30)


def test_the_definition():
    """Against a loop, with the activation's textbook form."""
    (x, kernel, history), ids, _ = arrays((2, 12, 3, 4), True, True, "float64")
    with jax.enable_x64(True):
        options = {"history": history, "segment_ids": ids}
        actual = plain(x, kernel, **options, activation="silu")
        linear = plain(x, kernel, **options)
    y = np.zeros_like(x)
    for b, t, i in np.ndindex(2, 12, 4):
        before = t - 3 + i
        if ids[b, max(before, 0)] == ids[b, t]:
            y[b, t] += kernel[i] * (x[b, before] if before >= 0 else history[b, before + 3])
    assert largest(linear, y) < 1e-14
    assert largest(actual, y / (1 + np.exp(-y))) < 1e-14


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition(case, dtype):
    shape, history, segments, activation = case
    inputs, ids, dy = arrays(shape, history, segments, dtype)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype("float64"), (inputs, dy))
        expected = with_gradients(plain, wide[0], ids, wide[1], activation)
        actual = with_gradients(native, inputs, ids, dy, activation)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        assert largest(a, e) < (1e-6 if dtype == "float32" else 1e-14)


@needs_compiler
def test_large_values():
    """Where exp(x) or exp(-x) has no float32."""
    x = jnp.asarray([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4])[None, None]
    kernel = jnp.ones((1, 9))
    for a, e in zip(
        *(with_gradients(f, (x, kernel, None), None, x, "silu") for f in (native, plain)),
        strict=True,
    ):
        for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(e), strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-30)


@needs_compiler
def test_nan_reaches_those_that_see_it():
    (x, kernel, history), ids, dy = arrays((2, 150, 20, 4), True, True)
    for spoil in ((x, (0, 70, 3)), (history, (1, 2, 4)), (dy, (1, 149, 19))):
        array, place = spoil
        kept, array[place] = array[place], np.nan
        y, (dx, _, dhistory) = with_gradients(native, (x, kernel, history), ids, dy, "silu")
        expected = with_gradients(plain, (x, kernel, history), ids, dy, "silu")
        for a, e in ((y, expected[0]), (dx, expected[1][0]), (dhistory, expected[1][2])):
            assert (np.isnan(a) == np.isnan(e)).all()
        array[place] = kept


@needs_compiler
@pytest.mark.parametrize("channels", [(4, 6), (2, 3, 4)], ids=str)
def test_channels_of_several_dimensions(channels):
    inputs, ids, dy = arrays((2, 30, 24, 4), True, True)
    several = jax.tree.map(lambda a: a.reshape(*a.shape[:-1], *channels), (inputs, dy))
    for function in (native, plain):
        expected = with_gradients(function, inputs, ids, dy, "silu")
        actual = with_gradients(function, several[0], ids, several[1], "silu")
        for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            assert a.shape == (*e.shape[:-1], *channels)
            np.testing.assert_allclose(a.reshape(e.shape), e, rtol=1e-6, atol=1e-6)


@needs_compiler
def test_under_vmap():
    (x, kernel, _), _, _ = arrays((2, 20, 6, 4))
    pair = np.stack([kernel, 2 * kernel])
    loss = lambda f: jax.grad(lambda x, k: jnp.sum(f(x, k, activation="silu") ** 2), (0, 1))
    for transform in (lambda f: functools.partial(f, activation="silu"), loss):
        run = lambda f: jax.tree.leaves(jax.vmap(transform(f), (None, 0))(x, pair))  # noqa: B023
        for a, e in zip(run(native), run(plain), strict=True):
            assert largest(a, e) < 1e-6


@needs_compiler
@pytest.mark.parametrize(("channels", "of_two"), [((8,), "4"), ((3, 4, 5), "3,2,5")], ids=str)
def test_on_a_mesh_rows_and_heads_are_divided(channels, of_two):
    (*inputs, _), ids, dy = arrays((4, 40, math.prod(channels), 4), False, True)
    *inputs, dy = (a.reshape(*a.shape[:-1], *channels) for a in (*inputs, dy))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    run = lambda x, kernel, dy: with_gradients(native, (x, kernel, None), ids, dy, "silu")
    expected = jax.device_get(run(*inputs, dy))
    whole = jax.device_put((*inputs, dy), jax.sharding.NamedSharding(mesh, P()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(run).lower(*whole).compile()
        actual = jax.device_get(program(*whole))
        pattern = r"f32\[([\d,]+)\]\S* custom-call\(.*scanax_short_convolution\""
        assert f"2,40,{of_two}" in re.findall(pattern, program.as_text())
        with pytest.raises(ValueError, match="3 rows cannot be divided among the 2 devices"):
            native(inputs[0][:3], inputs[1])
        fallen_back = short_convolution(inputs[0][:3], inputs[1])
    assert fallen_back.shape == (3, 40, *channels)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert largest(a, e) < 1e-6


@needs_compiler
def test_cpus_take_it_by_default_where_rows_are_long():
    assert dispatch.fastest_measured("short_convolution", "cpu", 1024, 512) == "native_cpu"
    x, kernel = jnp.zeros((1, 1024, 512)), jnp.zeros((4, 512))
    assert "scanax_short_convolution" in str(jax.make_jaxpr(short_convolution)(x, kernel))
    narrow = [a.astype("bfloat16") for a in arrays((2, 30, 16, 4))[0][:2]]
    y = native(*narrow, activation="silu")
    wide = native(*(a.astype("float32") for a in narrow), activation="silu")
    assert y.dtype == "bfloat16" and (y == wide.astype("bfloat16")).all()  # rounded once
    with pytest.raises(ValueError, match=r"takes floating-point numbers, not int32.*\['xla'\]"):
        native(*(a.astype("int32") for a in (x, kernel)))


WRONG = {
    "kernel": ({"kernel": (4, 5)}, r"are wanted, got \(2, 6, 3\) and \(4, 5\)"),
    "no channels": ({"x": (2, 6), "kernel": (4,)}, r"one to three dimensions of channels"),
    "history": ({"history": (2, 4, 3)}, r"history must be \(2, 3, 3\), not \(2, 4, 3\)"),
    "segments": ({"segment_ids": (2, 5)}, r"segment_ids must be \(2, 6\), not \(2, 5\)"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG.keys())
def test_bad_arguments(change, message):
    given = {"x": (2, 6, 3), "kernel": (4, 3)} | change
    with pytest.raises(ValueError, match=message):
        short_convolution(**{name: jnp.zeros(shape) for name, shape in given.items()})


def test_bad_names_and_types():
    x, kernel = jnp.zeros((2, 6, 3)), jnp.zeros((4, 3))
    with pytest.raises(ValueError, match="inputs are float32 but the kernel is float16"):
        short_convolution(x, kernel.astype("float16"))
    with pytest.raises(ValueError, match="activation is 'gelu', not one of"):
        short_convolution(x, kernel, activation="gelu")
    with pytest.raises(ValueError, match=r"unknown implementation 'fla'.*native_cpu"):
        short_convolution(x, kernel, implementation="fla")
