"""The additive scan's TPU kernels, interpreted on CPU, against the definition in float64.

A case is compiled once: the rows of its batch hold keys of all kinds.
"""

import dataclasses
import functools

from additive_scan_cases import KINDS, Case, arrays, definition
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import additive_scan, backends
from scanax.kernels.additive_scan import api, pallas_tpu, reference
from scanax.kernels.additive_scan.contract import CONTRACT

# The machine code is the interpreter's, which is not under test.
pytestmark = pytest.mark.usefixtures("hurried_compiler")

CASES = {
    "plain": Case(45, 1, (32, 32), 16),
    "factors and segments": Case(45, 1, (32, 64), 16, factors=True, segments=True),
    "bfloat16": Case(40, 2, (32, 32), 16, factors=True, segments=True, dtype="bfloat16"),
    "long chunks": Case(70, 1, (64, 32), 64, KINDS[3:], segments=True),
    "three heads of 256": Case(17, 3, (256, 32), 16, ("holes",), factors=True),
}


def run_kernels(inputs, cotangents, stride: int):
    *inputs, state, run = inputs
    options = {"scale": 0.3, "chunk": None, "stride": stride}
    o, final, starts = pallas_tpu.forward(*inputs, state, run, **options)
    gradients = pallas_tpu.backward(*inputs, run, starts, final, *cotangents, **options)
    return (o, final), gradients, starts


@functools.cache
def compiled(name: str):
    case = CASES[name]
    with pltpu.force_tpu_interpret_mode():
        run = functools.partial(run_kernels, stride=case.stride)
        return jax.jit(run).lower(*arrays(case)).compile()


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition_in_float64(name):
    """Outputs, the last state, and all gradients, through the last state too."""
    inputs, cotangents = arrays(CASES[name])
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, x.dtype if x.dtype == jnp.int32 else np.float64)
        expected = jax.device_get(jax.jit(definition)(*jax.tree.map(wide, (inputs, cotangents))))
    *actual, _ = jax.device_get(compiled(name)(inputs, cotangents))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        there = np.isfinite(e)
        assert (np.isfinite(a) == there).all()  # z alone may be -inf
        a, e = np.where(there, a, 0), np.where(there, e, 0)
        if CASES[name].dtype == "bfloat16":
            error, size = (np.sqrt(np.mean(x**2)) for x in (a - e, e))
            assert error <= 1e-2 * size
            continue
        for kind, row, expected_row in zip(CASES[name].kinds, a, e, strict=True):
            largest = max(np.abs(expected_row).max(), 0.1)
            assert np.abs(row - expected_row).max() <= 2e-5 * largest, kind


def test_states_at_the_starts_of_chunks():
    inputs, cotangents = arrays(CASES["plain"])
    *_, starts = compiled("plain")(inputs, cotangents)
    *inputs, (s, z), run = inputs
    np.testing.assert_array_equal(starts[0][0], s)
    np.testing.assert_array_equal(starts[1][0], z)
    for i in (1, 2):
        part = [x if x is None else x[:, : 16 * i] for x in inputs]
        _, expected = jax.jit(
            lambda part: reference.additive_scan_reference(*part, (s, z), run, scale=0.3)
        )(part)
        np.testing.assert_allclose(starts[0][i], expected[0], atol=5e-5)
        np.testing.assert_allclose(starts[1][i], expected[1], rtol=1e-6, atol=1e-5)


def test_dtypes_are_those_of_the_inputs():
    inputs, cotangents = arrays(CASES["bfloat16"])
    run = functools.partial(run_kernels, stride=16)
    (o, final), (*gradients, dstate), starts = jax.eval_shape(run, inputs, cotangents)
    assert {x.dtype for x in (o, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((final, dstate, starts))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_no_races(what, capfd):
    case = Case(20, 2, (32, 32), 16, ("normal", "waiting"), segments=True)
    (*inputs, state, run), (do, dfinal) = arrays(case)
    options = {"scale": 1.0, "chunk": None, "stride": 16}
    if what == "forward":
        function = lambda: pallas_tpu.forward(*inputs, state, run, **options)
    else:
        starts = jax.tree.map(lambda x: jnp.stack([x, x]), state)
        arguments = (*inputs, run, starts, state, do, dfinal)
        function = lambda: pallas_tpu.backward(*arguments, **options)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(jax.jit(function)())
    printed = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in printed, printed


def test_forward_and_backward_of_different_backends():
    """All backends leave the same residuals."""
    (*inputs, state, run), _ = arrays(Case(20, 1, (32, 32), 16, ("normal",), factors=True))
    reset = jnp.zeros((1, 20), bool).at[0, 7].set(True)

    def loss(inputs, names):
        forward, backward = (api.BACKENDS[name] for name in names)
        options = {"scale": 0.2, "chunk_size": None, "forward": forward, "backward": backward}
        options["contract"] = CONTRACT
        o, (s, z) = backends.scan(*inputs, reset, **options)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(s)) + jnp.sum(jnp.sin(z))

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = jax.device_get(run((*inputs, state), ("xla", "xla")))
    for names in (("pallas_tpu", "xla"), ("xla", "pallas_tpu")):
        with pltpu.force_tpu_interpret_mode():
            actual = jax.device_get(run((*inputs, state), names))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, atol=1e-5)


def test_the_public_function_takes_the_name():
    (q, k, v, f, state, _), _ = arrays(Case(5, 1, (32, 32), 16, ("normal",), factors=True))
    options = {"k_factor": f, "initial_state": state, "segment_ids": jnp.asarray([[0, 0, 1, 1, 1]])}
    with pltpu.force_tpu_interpret_mode():
        actual = additive_scan(q, k, v, implementation="pallas_tpu", **options)
    expected = additive_scan(q, k, v, implementation="reference", **options)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


WRONG = {
    "width": ({"dims": (48, 32)}, {}, "K and V must be"),
    "dtype": ({"dtype": "float16"}, {}, "must be float32 or bfloat16"),
    "stride": ({}, {"stride": 8}, "stride must be"),
    "chunk": ({}, {"chunk": 8}, "a chunk must hold the 16 tokens"),
}


@pytest.mark.parametrize(("changes", "options", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_supported_is_named(changes, options, message):
    options = {"scale": 1.0, "chunk": None, "stride": 16, **options}
    supports = functools.partial(pallas_tpu.supports, **options)
    inputs, _ = arrays(dataclasses.replace(CASES["plain"], **changes))
    assert message in (supports(*inputs) or "")
    fitting = {"scale": 1.0, "chunk": None, "stride": 16}
    assert pallas_tpu.supports(*arrays(CASES["plain"])[0], **fitting) is None
