"""The Pallas TPU kernels of the DeltaProduct scan, interpreted on CPU, against the definition.

The judge is the reference in float64, with gradients by automatic differentiation; the kernels'
forward and backward are called directly, joined by the states that the forward keeps.
"""

import functools

from delta_product_cases import NAMES, Case, arrays, cotangents, defined, runs
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import backends, delta_product
from scanax.kernels.delta_product import api, pallas_tpu
from scanax.kernels.delta_product.contract import CONTRACT

# The machine code is the interpreter's, which is not under test.
pytestmark = pytest.mark.usefixtures("hurried_compiler")

CASES = {
    "one token": Case((1, 1, 1, 32, 32, 1)),
    "ragged, K < V": Case((2, 37, 2, 32, 64, 1), gated=True),
    "strong decay": Case((2, 37, 2, 32, 64, 1), gated=True, decay=40),
    "two steps, K > V, segments": Case(
        (1, 40, 2, 64, 32, 2), gated=True, segments=(5, 16, 17, 31, 32)
    ),
    "a segment starts the row": Case((1, 40, 2, 64, 32, 2), gated=True, segments=(0, 1, 20)),
    "beta 0 and 2": Case((1, 40, 2, 64, 32, 2), gated=True, segments=(33,), beta="ends"),
    "three steps, two chunks per window": Case(
        (1, 50, 3, 32, 32, 3), gated=True, chunk=16, stride=32
    ),
    "groups of two rows and four of twelve heads": Case(
        (4, 17, 12, 32, 32, 1), gated=True, segments=(5,)
    ),
    "four steps, segments": Case((1, 37, 1, 32, 32, 4), segments=(7, 16, 33), stride=32),
}


# On CPU a cast to bfloat16 and back may be dropped; the kernels' rounding is part of the test.
ROUNDED = {"xla_allow_excess_precision": False}


def both_kernels(inputs, run, do, dfinal, **static):
    *tokens, state = inputs
    o, final, starts = pallas_tpu.forward(*tokens, state, run, **static)
    return (o, final), pallas_tpu.backward(*tokens, run, starts, final, do, dfinal, **static)


compiled = jax.jit(
    both_kernels, static_argnames=("scale", "chunk", "stride"), compiler_options=ROUNDED
)


def computed(case: Case, inputs, dtype=jnp.float32):
    *tokens, state = (None if x is None else jnp.asarray(x, jnp.float32) for x in inputs)
    tokens = [None if x is None else x.astype(dtype) for x in tokens]
    do, dfinal = (jnp.asarray(x, jnp.float32) for x in cotangents(case))
    static = {"scale": case.shape[3] ** -0.5, "chunk": case.chunk, "stride": case.stride}
    run = runs(case)
    assert pallas_tpu.supports(*tokens, state, run, **static) is None
    with pltpu.force_tpu_interpret_mode():
        return jax.device_get(compiled((*tokens, state), run, do.astype(dtype), dfinal, **static))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_definition_in_float64(case):
    inputs = arrays(case)
    actual, expected = computed(case, inputs), defined(case, inputs)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == np.float32
        # Gradients by g are differences of terms of order 1, which under a strong decay cancel.
        assert np.abs(a - e).max() <= 2e-5 * max(np.abs(e).max(), 5e-2)


BFLOAT16 = {
    "gated": (Case((1, 70, 1, 32, 32, 1), gated=True, stride=64), 5e-3, 1e-2),
    # Reflections of keys in a cone: to round A would alone cost 2e-2 in o and 3e-2 in gradients.
    "correlated": (Case((1, 130, 1, 32, 32, 1), keys="cone", beta="ends", stride=128), 1e-2, 2e-2),
}


@pytest.mark.parametrize(("case", "of_o", "of_gradients"), BFLOAT16.values(), ids=BFLOAT16.keys())
def test_bfloat16(case, of_o, of_gradients):
    """A float32 state; o and gradients as good as products of rounded factors can be."""
    inputs = arrays(case, jnp.bfloat16)
    (o, final), gradients = computed(case, inputs, jnp.bfloat16)
    (o_expected, final_expected), expected = defined(case, inputs)
    assert o.dtype == jnp.bfloat16 and final.dtype == np.float32
    rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))
    error = lambda a, e: rms(np.asarray(a, np.float64) - e) / rms(e)
    assert error(o, o_expected) <= of_o and error(final, final_expected) <= of_o
    for name, a, e in zip(NAMES, gradients, expected, strict=True):
        assert (a is None) == (e is None) == (name == "g" and not case.gated)
        if a is not None:
            assert a.dtype == (np.float32 if name == "state" else jnp.bfloat16)
            assert error(a, e) <= of_gradients, name


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_races(direction, capfd):
    """Heads on two cores, windows one after another: who writes a block is alone with it."""
    case = Case((1, 33, 2, 32, 32, 1), gated=True, segments=(20,))
    *tokens, state = (jnp.asarray(x, jnp.float32) for x in arrays(case))
    do, dfinal = (jnp.asarray(x, jnp.float32) for x in cotangents(case))
    starts = jnp.stack([state] * 3)
    static = {"scale": 1.0, "chunk": None, "stride": 16}
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    ):
        if direction == "forward":
            outputs = jax.jit(functools.partial(pallas_tpu.forward, **static))(
                *tokens, state, runs(case)
            )
        else:
            outputs = jax.jit(functools.partial(pallas_tpu.backward, **static))(
                *tokens, runs(case), starts, state, do, dfinal
            )
        jax.block_until_ready(outputs)
    printed = "".join(capfd.readouterr())
    assert "RACE DETECTED" not in printed, printed


def test_rows_divided_over_devices():
    """Inside shard_map, which checks over which axes every output varies; traced, not run."""
    case = Case((2, 17, 1, 32, 32, 1), gated=True)
    *tokens, state = (jnp.asarray(x, jnp.float32) for x in arrays(case))
    do, dfinal = (jnp.asarray(x, jnp.float32) for x in cotangents(case))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "x")
    rows = jax.sharding.PartitionSpec("x")
    both = functools.partial(both_kernels, scale=1.0, chunk=None, stride=16)
    whole = lambda *inputs: both(inputs[:6], None, *inputs[6:])
    divided = jax.shard_map(whole, mesh=mesh, in_specs=rows, out_specs=rows)
    inputs = (*tokens, state, do, dfinal)
    assert jax.eval_shape(divided, *inputs) == jax.eval_shape(whole, *inputs)


def test_forward_and_backward_of_different_backends():
    """All backends leave the same residuals; T is neither a stride nor a chunk."""
    inputs = [jnp.asarray(x, jnp.float32) for x in arrays(Case((1, 40, 2, 32, 32, 2), gated=True))]
    reset = jnp.zeros((1, 40), bool).at[0, 21].set(True)

    def loss(inputs, names):
        forward, backward = (api.BACKENDS[name] for name in names)
        options = {"scale": 0.2, "chunk_size": None, "forward": forward, "backward": backward}
        options["contract"] = CONTRACT
        o, final = backends.scan(*inputs, reset, **options)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final))

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = jax.device_get(run(inputs, ("xla", "xla")))
    for names in (("pallas_tpu", "xla"), ("xla", "pallas_tpu")):
        with pltpu.force_tpu_interpret_mode():
            actual = jax.device_get(run(inputs, names))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert np.abs(a - e).max() <= 3e-5 * np.abs(e).max()


def test_the_public_function_takes_the_name():
    q, k, v, beta, g, state = (
        jnp.asarray(x, jnp.float32) for x in arrays(Case((1, 5, 1, 32, 32, 1), gated=True))
    )
    options = {"initial_state": state, "segment_ids": jnp.asarray([[0, 0, 1, 1, 1]])}
    with pltpu.force_tpu_interpret_mode():
        actual = delta_product(q, k, v, beta, g, implementation="pallas_tpu", **options)
    expected = delta_product(q, k, v, beta, g, implementation="reference", **options)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


WRONG = {
    "dtype": ({"dtype": jnp.float16}, {}, "float32 or bfloat16"),
    "steps": ({"steps": 5}, {}, "N must be 1 to 4"),
    "width": ({"width": 48}, {}, "K and V must be among"),
    "chunk": ({}, {"chunk": 24}, "power of two"),
    "small chunk": ({}, {"chunk": 8}, ">= 16"),
    "long chunk": ({"steps": 2}, {"chunk": 128}, "at most 128 micro-steps"),
    "stride": ({}, {"chunk": 16}, "longer than four chunks"),
}


@pytest.mark.parametrize(("changes", "static", "reason"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_supported_has_a_reason(changes, static, reason):
    given = {"dtype": jnp.float32, "steps": 1, "width": 32, **changes}
    q = jax.ShapeDtypeStruct((1, 2, 1, given["width"]), given["dtype"])
    k = jax.ShapeDtypeStruct((1, 2, given["steps"], 1, given["width"]), given["dtype"])
    static = {"scale": 1.0, "chunk": None, "stride": 128, **static}
    assert reason in pallas_tpu.supports(q, k, k, None, None, None, None, **static)
