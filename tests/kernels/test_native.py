"""Kernels in C++: compiled once, and what is said where they cannot be.

What they compute is checked with the other implementations (``delta_product_cases.py``).
"""

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys

import additive_scan_cases as additive_cases
from delta_product_cases import NAMES, Case, arrays, cotangents, defined, runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax import kernels
from scanax.kernels import backends, native
from scanax.kernels.additive_scan import api as additive_api
from scanax.kernels.additive_scan.contract import CONTRACT as ADDITIVE
from scanax.kernels.delta_product import api, native_cpu
from scanax.kernels.delta_product.contract import CONTRACT

REASON = native_cpu.why_not()
COMPILERS = (*os.environ.get("CXX", "").split()[:1], "g++", "clang++")
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))

WIDE = {
    "whole vectors": Case((2, 65, 2, 64, 64, 1), gated=True, segments=(17, 40)),
    "rest of rows and vectors": Case((1, 50, 3, 20, 72, 3), gated=True, segments=(33,)),
    "N = 4, wide keys": Case((1, 40, 1, 128, 32, 4), beta="ends", keys="cone"),
    "chunk of a stride": Case((1, 70, 2, 33, 17, 2), gated=True, chunk=16),
}


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE.keys())
def test_widths(case, dtype):
    inputs = arrays(case, dtype)
    with jax.enable_x64(dtype == "float64"):
        (o, final), gradients = computed(
            case, [x if x is None else jnp.asarray(x, dtype) for x in inputs]
        )
    (expected_o, expected_final), expected = defined(case, inputs)
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    pairs = {"o": (o, expected_o), "final": (final, expected_final)}
    pairs |= {name: (a, e) for name, a, e in zip(NAMES, gradients, expected, strict=True)}
    for name, (a, e) in pairs.items():
        assert (a is None) == (e is None)
        if a is not None:
            assert a.dtype == dtype
            assert np.abs(a - e).max() <= tolerance * max(np.abs(e).max(), 5e-2), name


def computed(case: Case, inputs, names=("native_cpu", "native_cpu")):
    """(o, final) and the gradients by every input, of one backend's forward and one's backward."""
    run = runs(case)
    reset = None if run is None else jnp.asarray(np.diff(run, axis=1, prepend=0) > 0)
    forward, backward = (api.BACKENDS[name] for name in names)
    options = {"scale": case.shape[3] ** -0.5, "chunk_size": case.chunk, "contract": CONTRACT}
    scan = functools.partial(backends.scan, forward=forward, backward=backward, **options)

    @jax.jit
    def both(inputs):
        outputs, pull = jax.vjp(lambda *inputs: scan(*inputs, reset), *inputs)
        given = (x.astype(y.dtype) for x, y in zip(cotangents(case), outputs, strict=True))
        return outputs, pull(tuple(given))

    return jax.device_get(both(inputs))


@needs_compiler
@pytest.mark.parametrize("names", [("native_cpu", "xla"), ("xla", "native_cpu")])
def test_forward_and_backward_of_different_backends(names):
    case = Case((1, 40, 2, 32, 32, 2), gated=True, segments=(21,))
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(case)]
    actual, expected = (computed(case, inputs, x) for x in (names, ("xla", "xla")))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


KEYS = {
    "all kinds of keys": additive_cases.Case(70, 2, (32, 64), 64, segments=True),
    "rest of vectors, factors": additive_cases.Case(45, 3, (20, 24), 16, factors=True),
}


@needs_compiler
@pytest.mark.parametrize("names", [("native_cpu", "native_cpu"), ("xla", "native_cpu")])
@pytest.mark.parametrize("case", KEYS.values(), ids=KEYS.keys())
def test_additive_scan(case, names):
    inputs, cotangents = additive_cases.arrays(case)
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, x.dtype if x.dtype == jnp.int32 else np.float64)
        define = jax.jit(additive_cases.definition)
        expected = jax.device_get(define(*jax.tree.map(wide, (inputs, cotangents))))
    *inputs, run = inputs
    reset = None if run is None else jnp.diff(run, axis=1, prepend=0) > 0
    forward, backward = (additive_api.BACKENDS[name] for name in names)
    options = {"scale": 0.3, "chunk_size": None, "contract": ADDITIVE}
    scan = functools.partial(backends.scan, forward=forward, backward=backward, **options)

    @jax.jit
    def both(inputs, cotangents):
        outputs, pull = jax.vjp(lambda *inputs: scan(*inputs, reset), *inputs)
        return outputs, pull(cotangents)

    actual = jax.device_get(both(inputs, cotangents))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        there = np.isfinite(e)
        assert (np.isfinite(a) == there).all()  # z alone may be -inf
        for kind, row, expected_row in zip(case.kinds, a, np.where(there, e, 0), strict=True):
            row = np.where(np.isfinite(row), row, 0)
            largest = max(np.abs(expected_row).max(), 0.1)
            # The other backends round z at every chunk, here of some 300.
            tolerance = 2e-5 if set(names) == {"native_cpu"} else 1e-4
            assert np.abs(row - expected_row).max() <= tolerance * largest, kind


@needs_compiler
def test_more_heads_than_threads_and_nan_stays_in_its_head():
    case = Case((3, 20, 5, 16, 16, 1), gated=True)
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(case)]
    clean = jax.tree.leaves(computed(case, inputs))
    inputs[3] = inputs[3].at[1, 4, 0, 2].set(jnp.nan)  # beta of row 1, head 2
    heads = (2, 1, *(2, 3, 3, 3, 2, 1))  # the axis in o, final and the gradients
    spoiled = jax.tree.leaves(computed(case, inputs))
    for before, after, axis in zip(clean, spoiled, heads, strict=True):
        before, after = (np.moveaxis(x, axis, 1) for x in (before, after))
        assert np.isnan(after[1, 2]).any()
        others = np.ones(after.shape[:2], bool)
        others[1, 2] = False
        np.testing.assert_array_equal(after[others], before[others])


@needs_compiler
def test_rows_divided_over_devices():
    """Inside shard_map, which checks over which axes every output varies."""
    case = Case((2, 17, 1, 16, 16, 1), gated=True)
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(case)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "x")
    rows = jax.sharding.PartitionSpec("x")
    scan = functools.partial(native_cpu.forward, scale=1.0, chunk=None, stride=16)
    whole = lambda *inputs: scan(*inputs, None)[:2]
    divided = jax.jit(jax.shard_map(whole, mesh=mesh, in_specs=rows, out_specs=rows))
    for a, e in zip(divided(*inputs), jax.jit(whole)(*inputs), strict=True):
        np.testing.assert_array_equal(a, e)


@needs_compiler
@pytest.mark.parametrize("chunk_size", [1, 4096])
def test_any_chunk_size(chunk_size):
    """Long ones are taken in parts, so that memory does not grow with their square."""
    case = Case((1, 300, 1, 16, 16, 3), gated=True, chunk=chunk_size)
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(case)]
    actual, expected = (
        computed(case, inputs),
        computed(dataclasses.replace(case, chunk=None), inputs),
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5)
    q, k = inputs[0], inputs[1][:, :, 0]
    options = {"segment_ids": jnp.arange(300)[None] // 3, "implementation": "native_cpu"}
    scan = lambda size: kernels.additive_scan(q, k, q, chunk_size=size, **options)
    a, e = jax.device_get((scan(chunk_size), scan(None)))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-6), a, e)


def test_what_the_mesh_does_not_divide_takes_another():
    q = jnp.ones((3, 2, 1, 16))
    arguments = (q, q[:, :, None], q[:, :, None], q[:, :, None, :, 0], None)
    state = jnp.zeros((3, 1, 16, 16))
    supports = api.IMPLEMENTATIONS["native_cpu"].supports
    automatic, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(automatic,))
    with jax.sharding.use_abstract_mesh(mesh):
        reason = supports(*arguments, state, None, scale=1.0, chunk_size=None)
    assert reason == REASON or "3 rows cannot be divided among the 2 devices" in reason
    mesh = jax.sharding.AbstractMesh((3,), ("data",), axis_types=(explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        reason = supports(*arguments, state, None, scale=1.0, chunk_size=None)
    assert reason == REASON or "axes data are explicit" in reason


@pytest.fixture
def another_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._not_loaded.cache_clear()
    yield tmp_path / "cache" / "scanax"
    native._not_loaded.cache_clear()


SOURCE = """
#include "native.h"
using Array = xla::ffi::AnyBuffer;
static xla::ffi::Error twice(Array x, xla::ffi::Result<Array> y) {
  for (size_t i = 0; i < x.element_count(); ++i) {
    y->typed_data<float>()[i] = 2 * x.typed_data<float>()[i];
  }
  return xla::ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(test_twice, twice, xla::ffi::Ffi::Bind().Arg<Array>().Ret<Array>());
"""


@needs_compiler
def test_compiled_once_for_a_source(another_cache, tmp_path):
    source = tmp_path / "twice.cc"
    source.write_text(SOURCE)
    for _ in range(2):
        assert native.why_not(source, ("test_twice",)) is None
        native._not_loaded.cache_clear()
    [library] = another_cache.iterdir()
    modified = library.stat().st_mtime_ns
    assert native.why_not(source, ("test_twice",)) is None
    assert library.stat().st_mtime_ns == modified
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    [y] = native.call("test_twice", [shape], [jnp.arange(3.0)])
    np.testing.assert_array_equal(y, [0, 2, 4])
    source.write_text(SOURCE + "// changed")
    native._not_loaded.cache_clear()
    assert native.why_not(source, ()) is None
    assert len(list(another_cache.iterdir())) == 2


def test_no_compiler(another_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no_such_compiler")
    reason = native.why_not(tmp_path / "x.cc", ())
    assert reason == "there is no C++ compiler (no_such_compiler); CXX can name one"


def test_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    native._not_loaded.cache_clear()
    reason = native.why_not(native_cpu.SOURCE, ())
    assert "no home; set XDG_CACHE_HOME" in reason or reason == REASON
    native._not_loaded.cache_clear()


@needs_compiler
def test_compiler_with_options(another_cache, tmp_path, monkeypatch):
    (tmp_path / "twice.cc").write_text(SOURCE)
    monkeypatch.setenv("CXX", f"{next(filter(None, map(shutil.which, COMPILERS)))} -DNAME=1")
    assert native.why_not(tmp_path / "twice.cc", ()) is None
    assert list(another_cache.glob("*.so"))


@needs_compiler
def test_what_does_not_compile_is_quoted(another_cache, tmp_path):
    source = tmp_path / "broken.cc"
    source.write_text("int x = ;\n")
    assert "did not compile broken.cc" in native.why_not(source, ())
    assert not list(another_cache.glob("*.so"))


@needs_compiler
def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native._not_loaded.cache_clear()
    assert "XDG_CACHE_HOME" in native.why_not(native_cpu.SOURCE, ())
    native._not_loaded.cache_clear()


def test_without_a_compiler_plain_jax_runs():
    code = (
        "import jax.numpy as jnp; from scanax.kernels import delta_product as f;"
        "q = jnp.ones((1, 2, 1, 16)) / 4; k = q[:, :, None]; b = k[..., 0];"
        "print(f(q, k, k, b)[0].shape)\n"
        "try: f(q, k, k, b, implementation='native_cpu')\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "CXX": "no_such_compiler"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "(1, 2, 1, 16)" in done.stdout
    assert "'native_cpu' does not support this call: there is no C++ compiler" in done.stdout
