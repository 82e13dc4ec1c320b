"""The Hopper kernels of the DeltaProduct scan: lowered for an H100, and interpreted on CPU.

The judge is the reference in float64, as for the kernels for TPU.
"""

import functools

from delta_product_cases import NAMES, Case, arrays, cotangents, defined, runs
from hopper_lowering import shared_memory
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import backends, delta_product, hopper, hopper_scans
from scanax.kernels.delta_product import api, gpu_layout, pallas_gpu
from scanax.kernels.delta_product.contract import CONTRACT

# The machine code is the interpreter's, which is not under test.
pytestmark = pytest.mark.usefixtures("hurried_compiler")
interpreted = pytest.mark.skipif(
    not hasattr(hopper.plgpu, "InterpretGPUParams"),
    reason="Pallas interprets kernels for GPUs from JAX 0.11 on, which needs Python 3.12",
)
BFLOAT16 = 1.5e-2  # of the largest entry: what factors of 8 bits and chains of them cost

# The longest chunk that a stride of fewer tokens has, and several chunks; and segments of rows.
CASES = {
    "one token": Case((1, 1, 1, 64, 64, 1), stride=16),
    "ragged, K < V, segments": Case(
        (2, 150, 1, 64, 128, 1), gated=True, segments=(0, 5, 16, 63, 64, 129), stride=128
    ),
    "two steps, K > V": Case((1, 70, 2, 128, 64, 2), gated=True, stride=64),
    "three steps, strong decay": Case((1, 40, 1, 64, 64, 3), gated=True, decay=40, stride=32),
    "four steps, keys in a cone, beta 0 and 2": Case(
        (1, 37, 1, 64, 64, 4), segments=(7, 33), keys="cone", beta="ends", stride=32
    ),
}


def interpreter():
    return hopper.interpreted(hopper.plgpu.InterpretGPUParams(detect_races=True))


def computed(case: Case):
    """(o, state) and the gradients by every input."""
    *tokens, state = (None if x is None else jnp.asarray(x, jnp.float32) for x in arrays(case))
    tokens = [x if i > 2 else x.astype(jnp.bfloat16) for i, x in enumerate(tokens)]
    do, dfinal = (jnp.asarray(x, jnp.float32) for x in cotangents(case))
    static = {"scale": case.shape[3] ** -0.5, "chunk": case.chunk, "stride": case.stride}
    run = runs(case)
    run = None if run is None else jnp.asarray(run)
    assert pallas_gpu.supports(*tokens, state, run, **static) is None
    with interpreter():
        o, final, starts = pallas_gpu.forward(*tokens, state, run, **static)
        back = (*tokens, run, starts, final, do.astype(jnp.bfloat16), dfinal)
        return jax.device_get(((o, final), pallas_gpu.backward(*back, **static)))


def check(case: Case, actual):
    inputs = arrays(case)
    rounded = (x.astype(jnp.bfloat16).astype(np.float64) for x in inputs[:3])
    expected = defined(case, (*rounded, *inputs[3:]))
    (o, final), gradients = actual
    assert o.dtype == jnp.bfloat16 and final.dtype == np.float32
    dtypes = (jnp.bfloat16,) * 3 + (np.float32,) * 3
    for name, a, e, dtype in zip(NAMES, gradients, expected[1], dtypes, strict=True):
        assert (a is None) == (e is None) == (name == "g" and not case.gated)
        if a is not None:
            assert a.dtype == dtype, name
            # Sums of terms of order 1 that cancel; by g, and under a strong decay, many of them.
            size = max(np.abs(e).max(), 2 if name == "g" else 0.3)
            assert np.abs(a.astype(np.float64) - e).max() <= BFLOAT16 * size, name
    for a, e in zip((o, final), expected[0], strict=True):
        assert np.abs(a.astype(np.float64) - e).max() <= BFLOAT16 * np.abs(e).max()


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_definition_in_float64_without_races(case, capfd):
    check(case, computed(case))
    printed = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in printed, printed


@interpreted
def test_segments_of_rows_are_exact(monkeypatch):
    """Four strides in two segments: forward and backward compose their transitions."""
    case = Case((1, 200, 1, 64, 64, 2), gated=True, segments=(80,), stride=64)
    monkeypatch.setattr(gpu_layout, "segments_of", lambda *sizes: 2)
    check(case, computed(case))


@interpreted
@pytest.mark.parametrize(("ahead", "back"), [("pallas_gpu", "xla"), ("xla", "pallas_gpu")])
def test_forward_and_backward_of_different_backends(ahead, back):
    """All backends leave the same residuals; T is neither a stride nor a chunk."""
    case = Case((1, 40, 1, 64, 64, 2), gated=True)
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(case)]
    inputs[:3] = [x.astype(jnp.bfloat16) for x in inputs[:3]]
    reset = jnp.zeros((1, 40), bool).at[0, 21].set(True)

    def loss(inputs, names):
        forward, backward = (api.BACKENDS[name] for name in names)
        options = {"scale": 0.2, "chunk_size": None, "forward": forward, "backward": backward}
        options["contract"] = CONTRACT
        o, final = backends.scan(*inputs, reset, **options)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.cos(final))

    run = jax.jit(jax.grad(loss), static_argnums=1)
    expected = jax.device_get(run(inputs, ("xla", "xla")))
    with interpreter():
        actual = jax.device_get(run(inputs, (ahead, back)))
    for a, e in zip(actual, expected, strict=True):
        a, e = (x.astype(np.float64) for x in (a, e))
        assert np.abs(a - e).max() <= 2 * BFLOAT16 * np.abs(e).max()


SIZES = [
    (2, 300, 2, 128, 128, 1),
    (1, 256, 2, 128, 128, 2),
    (1, 100, 2, 64, 128, 3),
    (1, 100, 1, 128, 64, 4),
    (1, 10, 1, 64, 64, 1),
]


@pytest.mark.parametrize("size", SIZES)
def test_lowers_for_an_h100(size):
    """What a program needs fits; twice what the gradients need, so that two run side by side."""
    batch, tokens, heads, key, value, steps = size
    shape = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    rows, float32 = (batch, tokens, heads), jnp.float32
    inputs = (
        shape(*rows, key),
        shape(batch, tokens, steps, heads, key),
        shape(batch, tokens, steps, heads, value),
        shape(batch, tokens, steps, heads, dtype=float32),
        shape(*rows, dtype=float32),
        shape(batch, heads, key, value, dtype=float32),
        shape(batch, tokens, dtype=jnp.int32),
    )

    def step(q, k, v, beta, g, state, segments):
        options = {"implementation": "pallas_gpu", "segment_ids": segments}
        o, final = delta_product(q, k, v, beta, g, initial_state=state, **options)
        return jnp.sum(o.astype(float32)) + jnp.sum(final)

    needed = shared_memory(jax.grad(step, argnums=range(6)), *inputs)
    kernels = {"prepare", "forward", "replay", "backward", "gradients"}
    if hopper_scans.segments_of(batch * heads, value, key, -(-tokens // strides(steps)), 132) > 1:
        kernels.add("transitions")
    assert {name.removeprefix("delta_product_") for name in needed} == kernels
    assert max(needed.values()) <= hopper.SHARED_BYTES
    assert 2 * (needed["delta_product_gradients"] + 1024) <= hopper.SHARED_BYTES + 1024


def strides(steps: int) -> int:
    return {1: 128, 2: 64}.get(steps, 32)


def test_rows_are_divided_where_programs_are_few():
    many = hopper_scans.segments_of(64, 128, 128, 32, 132)
    one = hopper_scans.segments_of(1, 128, 128, 256, 132)
    assert (many, one) == (1, 16)
    assert hopper_scans.segments_of(1, 128, 128, 1, 132) == 1


WRONG = {
    "dtype": ({"dtype": jnp.float32}, {}, "must be bfloat16"),
    "steps": ({"steps": 5}, {}, "N must be 1 to 4"),
    "width": ({"width": 32}, {}, "K and V must be among"),
    "chunk": ({"steps": 2}, {"chunk": 64}, "at most 64 micro-steps"),
    "programs": ({"rows": 70_000}, {}, "at most 65535 rows times heads"),
}


@pytest.mark.parametrize(("changes", "static", "reason"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_supported_has_a_reason(changes, static, reason):
    given = {"dtype": jnp.bfloat16, "rows": 1, "steps": 1, "width": 64, **changes}
    rows = (given["rows"], 2)
    q = jax.ShapeDtypeStruct((*rows, 1, given["width"]), given["dtype"])
    k = jax.ShapeDtypeStruct((*rows, given["steps"], 1, given["width"]), given["dtype"])
    static = {"scale": 1.0, "chunk": None, "stride": 128, **static}
    assert reason in pallas_gpu.supports(q, k, k, None, None, None, None, **static)


def test_float32_is_told_to_take_another_implementation():
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(CASES["one token"])[:4]]
    with pytest.raises(ValueError, match=r"must be bfloat16.*Usable here: \[.*'xla'"):
        delta_product(*inputs, implementation="pallas_gpu")


def test_other_gpus_are_named(monkeypatch):
    device = type("Device", (), {"compute_capability": "8.0"})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert "compute capability 9.0 (Hopper), not 8.0" in hopper.unavailable()


def test_without_the_compiler_the_reason_is_known(monkeypatch):
    monkeypatch.setattr(hopper, "MISSING", "no Mosaic GPU")
    q = jax.ShapeDtypeStruct((1, 2, 1, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, 1, 1, 64), jnp.bfloat16)
    supports = functools.partial(pallas_gpu.supports, scale=1.0, chunk=None, stride=16)
    assert supports(q, k, k, None, None, None, None) == "no Mosaic GPU"
