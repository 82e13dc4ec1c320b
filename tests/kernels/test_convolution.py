"""The 3 x 3 convolution in C++: values and derivatives of any order, and on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from scanax.kernels import convolution_3x3, dispatch
from scanax.kernels.convolution import api, native_cpu

REASON = native_cpu.why_not()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
native = functools.partial(convolution_3x3, implementation="native_cpu")
plain = functools.partial(convolution_3x3, implementation="xla")

SHAPES = {
    "whole vectors": (2, 8, 8, 32, 64),
    "odd sides, single channels": (3, 5, 7, 3, 5),
    "one pixel": (2, 1, 1, 20, 17),
    "one row": (1, 1, 9, 4, 6),
    "several parts": (2, 10, 12, 100, 70),
    "one tile": (1, 2, 2, 49, 130),
    "no image": (0, 4, 4, 3, 2),
    "no pixel": (2, 0, 4, 3, 2),
    "no channel": (2, 4, 4, 0, 2),
    "no output": (2, 4, 4, 3, 0),
}


def arrays(shape, dtype="float32"):
    """x, kernel, and a cotangent."""
    *image, features = shape
    normal = np.random.default_rng(0).normal
    kernel = normal(size=(3, 3, image[-1], features)) / (9 * image[-1]) ** 0.5
    return (
        normal(size=image).astype(dtype),
        kernel.astype(dtype),
        normal(size=(*image[:3], features)).astype(dtype),
    )


def largest(a, b) -> float:
    return np.abs(a - b).max(initial=0) / np.abs(b).max(initial=1e-30)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_definition(shape, dtype):
    x, kernel, dy = arrays(shape, dtype)

    def all_of(function, *inputs):
        y, pullback = jax.vjp(function, *inputs[:2])
        return y, *pullback(inputs[2])

    with jax.enable_x64(True):
        wide = [jnp.asarray(a, "float64") for a in (x, kernel, dy)]
        expected = jax.device_get(all_of(plain, *wide))
        actual = jax.device_get(all_of(native, *map(jnp.asarray, (x, kernel, dy))))
    for a, e, name in zip(actual, expected, ("y", "dx", "dkernel"), strict=True):
        assert a.dtype == dtype and a.shape == e.shape, name
        assert largest(a, e) < (1e-6 if dtype == "float32" else 1e-14), name


@needs_compiler
def test_derivatives_of_any_mode_and_order():
    x, kernel, dy = map(jnp.asarray, arrays((2, 5, 4, 3, 6)))
    kernel_dot, x_dot = kernel[::-1] + 0.3, jnp.sin(3 * x)

    def loss(function, x, kernel):
        return jnp.sum(jnp.sin(function(x, kernel)) * dy)

    def second(function):
        gradient = jax.grad(functools.partial(loss, function), argnums=(0, 1))
        tangents = (x_dot, kernel_dot)
        forward_over_reverse = jax.jvp(gradient, (x, kernel), tangents)[1]
        pullback = jax.vjp(gradient, x, kernel)[1]
        third = lambda *inputs: jax.vjp(gradient, *inputs)[1](tangents)
        over = jax.jvp(third, (x, kernel), tangents)
        return forward_over_reverse, pullback(tangents), over

    compute = lambda function: jax.device_get(jax.jit(functools.partial(second, function))())
    for a, e in zip(*map(jax.tree.leaves, map(compute, (native, plain))), strict=True):
        assert largest(a, e) < 5e-6


@needs_compiler
@pytest.mark.parametrize("axes", [(0, None), (None, 1), (2, 0)], ids=str)
def test_under_vmap(axes):
    x, kernel, _ = arrays((2, 4, 5, 3, 6))
    three = lambda a, at: a if at is None else np.stack([a, 2 * a, a**2], axis=at)
    inputs = three(x, axes[0]), three(kernel, axes[1])
    for transform in (lambda f: f, lambda f: jax.grad(lambda *z: jnp.sum(f(*z) ** 2), (0, 1))):
        actual, expected = (
            jax.tree.leaves(jax.vmap(transform(f), axes)(*inputs)) for f in (native, plain)
        )
        for a, e in zip(actual, expected, strict=True):
            assert largest(a, e) < 2e-6


@needs_compiler
def test_on_a_mesh_rows_and_outputs_are_divided():
    x, kernel, dy = arrays((4, 6, 6, 5, 8))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(function, *inputs):
        y, pullback = jax.vjp(function, *inputs[:2])
        return y, *pullback(inputs[2])

    expected = jax.device_get(run(native, x, kernel, dy))
    whole = jax.device_put((x, kernel, dy), jax.sharding.NamedSharding(mesh, P()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(functools.partial(run, native)).lower(*whole).compile()
        actual = jax.device_get(program(*whole))
        # Every device has two rows and four outputs.
        pattern = r"f32\[([\d,]+)\]\S* custom-call\(.*scanax_convolution\""
        calls = re.findall(pattern, program.as_text())
        assert calls and "2,6,6,4" in calls
        for a, e in zip(actual, expected, strict=True):
            assert largest(a, e) < 2e-6
        with pytest.raises(ValueError, match="3 rows cannot be divided among the 2 devices"):
            native(x[:3], kernel)
        assert largest(convolution_3x3(x[:3], kernel), expected[0][:3]) < 2e-6  # falls back


@needs_compiler
def test_within_a_shard_map_that_checks_replication():
    x, kernel, _ = arrays((4, 4, 4, 3, 2))
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(x, kernel):
        loss = lambda x, kernel: jax.lax.psum(jnp.sum(native(x, kernel) ** 2), "rows")
        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    specs = {"in_specs": (P("rows"), P()), "out_specs": (P("rows"), P())}
    actual = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(x, kernel)
    expected = jax.grad(lambda *z: jnp.sum(plain(*z) ** 2), argnums=(0, 1))(x, kernel)
    for a, e in zip(actual, expected, strict=True):
        assert largest(jax.device_get(a), jax.device_get(e)) < 2e-6


@needs_compiler
def test_nan_reaches_those_that_see_it():
    x, kernel, dy = arrays((2, 12, 11, 3, 4))
    for pixel in ((0, 5, 6), (1, 0, 0), (0, 11, 10), (1, 4, 3)):
        spoilt, cotangent = x.copy(), dy.copy()
        spoilt[pixel], cotangent[pixel] = np.nan, np.nan
        for spoil in (
            lambda f, x=spoilt: f(x, kernel),
            lambda f, dy=cotangent: jax.vjp(f, x, kernel)[1](dy)[0],
        ):
            assert (np.isnan(spoil(native)) == np.isnan(spoil(plain))).all()


@needs_compiler
@pytest.mark.parametrize("devices", [1, 4])
def test_arrays_on_explicit_axes_take_the_compilers(devices):
    x, kernel, _ = arrays((4, 4, 4, 3, 2))
    mesh = jax.make_mesh((devices,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    divided = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("rows")))
    whole = jax.device_put(kernel, jax.sharding.NamedSharding(mesh, P()))
    loss = lambda function: jax.jit(jax.grad(lambda *z: jnp.sum(function(*z) ** 2), (0, 1)))
    for a, e in zip(loss(convolution_3x3)(divided, whole), loss(plain)(x, kernel), strict=True):
        assert largest(jax.device_get(a), jax.device_get(e)) < 2e-6
    with pytest.raises(ValueError, match="the mesh axes rows are explicit"):
        jax.jit(native)(divided, whole)


@needs_compiler
def test_cpus_take_it_by_default():
    x = jax.ShapeDtypeStruct((2, 32, 32, 96), "float32")
    kernel = jax.ShapeDtypeStruct((3, 3, 96, 96), "float32")
    assert dispatch.fastest_measured("convolution_3x3", "cpu", 32 * 32, 96) == "native_cpu"
    assert "convolution_3x3[" in str(jax.make_jaxpr(convolution_3x3)(x, kernel))
    whole = [a.update(dtype=jnp.dtype("int32")) for a in (x, kernel)]
    assert "conv_general_dilated[" in str(jax.make_jaxpr(convolution_3x3)(*whole))
    with pytest.raises(ValueError, match=r"takes floating-point numbers, not int32.*\['xla'\]"):
        jax.eval_shape(native, *whole)


@needs_compiler
def test_narrow_types_are_rounded_once():
    x, kernel, _ = map(jnp.asarray, arrays((2, 8, 8, 32, 16)))
    narrow = [a.astype("bfloat16") for a in (x, kernel)]
    y = native(*narrow)
    assert y.dtype == "bfloat16"
    assert (y == native(*(a.astype("float32") for a in narrow)).astype("bfloat16")).all()


def test_bad_arguments():
    x, kernel, _ = arrays((2, 4, 4, 3, 2))
    with pytest.raises(ValueError, match=r"kernel \[3, 3, I, O\] are wanted, got .*\(3, 3, 2, 2\)"):
        convolution_3x3(x, kernel[:, :, :2])
    with pytest.raises(ValueError, match="images are float32 but the kernel is float16"):
        convolution_3x3(x, kernel.astype("float16"))
    with pytest.raises(ValueError, match=r"unknown implementation 'winograd'.*native_cpu"):
        convolution_3x3(x, kernel, implementation="winograd")
    assert list(api.IMPLEMENTATIONS) == ["native_cpu", "xla"]
