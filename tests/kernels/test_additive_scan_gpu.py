"""The Hopper kernels of the additive scan: lowered for an H100, and interpreted on CPU.

The judge is the reference in float64, as for the kernels for TPU.
"""

import functools

from additive_scan_cases import Case, arrays, definition
from hopper_lowering import shared_memory
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import additive_scan, backends, hopper
from scanax.kernels.additive_scan import api, pallas_gpu
from scanax.kernels.additive_scan.contract import CONTRACT

# The machine code is the interpreter's, which is not under test.
pytestmark = pytest.mark.usefixtures("hurried_compiler")
interpreted = pytest.mark.skipif(
    not hasattr(hopper.plgpu, "InterpretGPUParams"),
    reason="Pallas interprets kernels for GPUs from JAX 0.11 on, which needs Python 3.12",
)
BFLOAT16 = 1e-2  # of the root mean square: what factors of 8 bits and chains of them cost
SOUND = ("normal", "holes")

CASES = {
    "ragged, K < V, factors and segments": Case(
        150, 1, (64, 128), 64, SOUND, factors=True, segments=True, dtype="bfloat16"
    ),
    "short, two heads, K > V": Case(10, 2, (128, 64), 16, SOUND, dtype="bfloat16"),
    # Keys that rise too much for one reference, and states without a normaliser.
    "computed again": Case(40, 1, (64, 64), 64, ("rising", "waiting"), dtype="bfloat16"),
}


def interpreter():
    return hopper.interpreted(hopper.plgpu.InterpretGPUParams(detect_races=True))


def computed(case: Case):
    """(o, state) and the gradients by every input."""
    (*inputs, state, run), (do, dfinal) = arrays(case)
    if case.factors:  # logits and factors may have more digits
        inputs = [x.astype(jnp.float32) if i in (1, 3) else x for i, x in enumerate(inputs)]
    options = {"scale": 0.3, "chunk": None, "stride": case.stride}
    assert pallas_gpu.supports(*inputs, state, run, **options) is None
    with interpreter():
        o, final, starts = pallas_gpu.forward(*inputs, state, run, **options)
        back = (*inputs, run, starts, final, do, dfinal)
        return jax.device_get(((o, final), pallas_gpu.backward(*back, **options)))


def check(case: Case, actual):
    inputs, cotangents = arrays(case)
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, x.dtype if x.dtype == jnp.int32 else np.float64)
        expected = jax.device_get(jax.jit(definition)(*jax.tree.map(wide, (inputs, cotangents))))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        there = np.isfinite(e)
        assert (np.isfinite(a) == there).all()  # z alone may be -inf
        a, e = (np.where(there, x.astype(np.float64), 0) for x in (a, e))
        error, size = (np.sqrt(np.mean(x**2)) for x in (a - e, e))
        assert error <= BFLOAT16 * size


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_definition_in_float64_without_races(case, capfd):
    check(case, computed(case))
    printed = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in printed, printed


@interpreted
def test_segments_of_rows_are_exact(monkeypatch):
    """Four strides in two segments: forward and backward compose their decays."""
    case = Case(200, 1, (64, 64), 64, ("normal",), segments=True, dtype="bfloat16")
    monkeypatch.setattr(pallas_gpu, "segments_of", lambda *sizes: 2)
    check(case, computed(case))


@interpreted
@pytest.mark.parametrize(("ahead", "back"), [("pallas_gpu", "xla"), ("xla", "pallas_gpu")])
def test_forward_and_backward_of_different_backends(ahead, back):
    """All backends leave the same residuals."""
    case = Case(40, 1, (64, 64), 64, ("normal",), factors=True, dtype="bfloat16")
    (*inputs, state, _), _ = arrays(case)
    reset = jnp.zeros((1, 40), bool).at[0, 21].set(True)

    def loss(inputs, names):
        forward, backward = (api.BACKENDS[name] for name in names)
        options = {"scale": 0.2, "chunk_size": None, "forward": forward, "backward": backward}
        options["contract"] = CONTRACT
        o, (s, z) = backends.scan(*inputs, reset, **options)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.cos(s)) + jnp.sum(jnp.sin(z))

    run = jax.jit(jax.grad(loss), static_argnums=1)
    expected = jax.device_get(run((*inputs, state), ("xla", "xla")))
    with interpreter():
        actual = jax.device_get(run((*inputs, state), (ahead, back)))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (x.astype(np.float64) for x in (a, e))
        assert np.abs(a - e).max() <= 2.5e-2 * np.abs(e).max()


@pytest.mark.parametrize(
    ("tokens", "dims", "factors"),
    [(300, (128, 128), False), (100, (64, 128), True), (10, (128, 64), True)],
)
def test_lowers_for_an_h100(tokens, dims, factors):
    """What a program needs fits."""
    shape = lambda width: jax.ShapeDtypeStruct((2, tokens, 2, width), jnp.bfloat16)
    key, value = dims
    inputs = (shape(key), shape(key), shape(value), shape(key) if factors else None)

    def step(q, k, v, f, segments):
        options = {"implementation": "pallas_gpu", "k_factor": f, "segment_ids": segments}
        o, (s, z) = additive_scan(q, k, v, **options)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(s) + jnp.sum(z)

    segments = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    needed = shared_memory(jax.grad(step, argnums=(0, 1, 2)), *inputs, segments)
    kernels = {"prepare", "forward", "backward", "gradients"}
    assert {name.removeprefix("additive_scan_") for name in needed} == kernels
    assert max(needed.values()) <= hopper.SHARED_BYTES


WRONG = {
    "width": ({"dims": (32, 64)}, {}, "K and V must be"),
    "dtype": ({"dtype": "float32"}, {}, "q and v must be bfloat16"),
    "stride": ({}, {"stride": 128}, "stride must be"),
    "chunk": ({}, {"chunk": 32}, "a chunk must hold the 64 tokens"),
}


@pytest.mark.parametrize(("changes", "options", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_supported_is_named(changes, options, message):
    case = Case(**{"tokens": 5, "heads": 1, "dims": (64, 64), "stride": 64} | changes)
    options = {"scale": 1.0, "chunk": None, "stride": 64, **options}
    inputs, _ = arrays(case)
    if "dtype" not in changes:
        inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    assert message in functools.partial(pallas_gpu.supports, **options)(*inputs)
