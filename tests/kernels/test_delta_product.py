"""Properties of the DeltaProduct scan, on every implementation, against the definition.

The judge is the reference in float64; the table below holds what differs between cases.
"""

import dataclasses
import functools
import itertools

from delta_product_cases import IMPLEMENTATIONS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import delta_product, delta_product_step
from scanax.kernels.delta_product import chunk as chunk_lib


@dataclasses.dataclass(frozen=True)
class Case:
    """B, T, H, K, V, N and what is switched on; chunks hold 4 tokens."""

    shape: tuple[int, int, int, int, int, int]
    gated: bool = False
    state: bool = False
    segments: tuple[int, ...] = ()
    beta: str = "(0, 2)"


CASES = {
    "one token": Case((2, 1, 2, 4, 4, 2), gated=True, state=True),
    "below a chunk": Case((2, 3, 2, 4, 4, 1)),
    "a chunk": Case((2, 4, 2, 4, 4, 2), state=True),
    "above a chunk": Case((2, 5, 2, 4, 4, 2), gated=True),
    "odd length, K < V": Case((1, 23, 2, 4, 6, 3), gated=True, state=True),
    "K > V, four steps": Case((1, 17, 1, 8, 4, 4), state=True),
    "beta 0 and 2": Case((1, 19, 2, 4, 4, 2), beta="ends"),
    "segments at chunk edges": Case((1, 16, 2, 4, 4, 2), segments=(3, 4, 5, 8, 12)),
    "segments, gated, state": Case((1, 19, 2, 4, 4, 2), True, True, segments=(1, 2, 7, 18)),
    "strong decay": Case((1, 20, 1, 4, 4, 1), gated=True, beta="strong"),
}


def arrays(case: Case, dtype="float32"):
    """Inputs of a case; q, k of unit length."""
    batch, tokens, heads, key_dim, value_dim, steps = case.shape
    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.normal(size=shape)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    beta = 2 / (1 + np.exp(-normal(batch, tokens, steps, heads)))
    if case.beta == "ends":
        beta = np.round(beta / 2) * 2
    g = -np.abs(normal(batch, tokens, heads)) * (40 if case.beta == "strong" else 0.3)
    inputs = {
        "q": unit(normal(batch, tokens, heads, key_dim)),
        "k": unit(normal(batch, tokens, steps, heads, key_dim)),
        "v": normal(batch, tokens, steps, heads, value_dim),
        "beta": beta,
        "g": g if case.gated else None,
        "initial_state": normal(batch, heads, key_dim, value_dim) if case.state else None,
    }
    return {k: None if x is None else jnp.asarray(x, dtype) for k, x in inputs.items()}


def segment_ids(case: Case):
    if not case.segments:
        return None
    batch, tokens = case.shape[:2]
    ids = np.searchsorted(case.segments, np.arange(tokens), side="right") % 2  # ids come back
    return jnp.asarray(np.broadcast_to(ids, (batch, tokens)), jnp.int32)


def value_and_gradients(case: Case, implementation: str, dtype="float32", inputs=None):
    """o, state, and gradients of a fixed linear function of both, as numpy arrays."""
    ids = segment_ids(case)

    @jax.jit
    def run(inputs):
        def forward(inputs):
            given = dict(inputs)
            main = [given.pop(name) for name in ("q", "k", "v", "beta", "g")]
            return delta_product(
                *main, segment_ids=ids, implementation=implementation, chunk_size=4, **given
            )

        outputs, pull = jax.vjp(forward, inputs)
        cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), outputs)
        cotangents = jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, outputs)
        return outputs, pull(cotangents)[0]

    return jax.device_get(run(arrays(case, dtype) if inputs is None else inputs))


@functools.cache
def defined(case: Case):
    with jax.enable_x64(True):
        return value_and_gradients(case, "reference", "float64")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_definition_in_float64(case, implementation):
    actual, expected = value_and_gradients(case, implementation), defined(case)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        # Gradients by g are differences of terms of order 1, which under a strong decay cancel.
        assert np.abs(a - e).max() <= 2e-5 * max(np.abs(e).max(), 5e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows_equal_separate_rows(implementation):
    case = CASES["segments at chunk edges"]
    inputs, ids = arrays(case), segment_ids(case)
    packed, _ = run_forward(inputs, implementation, ids)
    bounds = [0, *case.segments, case.shape[1]]
    for a, b in itertools.pairwise(bounds):
        part = {k: None if x is None else x[:, a:b] for k, x in inputs.items()}
        o, state = run_forward(part, implementation)
        np.testing.assert_allclose(packed[:, a:b], o, atol=2e-6)
    np.testing.assert_allclose(run_forward(inputs, implementation, ids)[1], state, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_gradients_equal_those_of_separate_rows(implementation):
    """The initial state belongs to the first segment, the final state to the last."""
    case = Case((1, 7, 2, 4, 4, 2), gated=True, state=True, segments=(3,))
    inputs, ids = arrays(case), segment_ids(case)
    main = {name: inputs[name] for name in ("q", "k", "v", "beta", "g")}
    state = inputs["initial_state"]

    def forward(main, state, ids=None):
        q, k, v, beta, g = (main[name] for name in ("q", "k", "v", "beta", "g"))
        options = {"implementation": implementation, "chunk_size": 4, "initial_state": state}
        return delta_product(q, k, v, beta, g, segment_ids=ids, **options)

    def packed(main, state):
        o, final = forward(main, state, ids)
        return jnp.sum(jnp.sin(o)) + jnp.sum(final**2)

    def separate(main, state):
        first, _ = forward({k: x[:, :3] for k, x in main.items()}, state)
        second, final = forward({k: x[:, 3:] for k, x in main.items()}, None)
        return jnp.sum(jnp.sin(first)) + jnp.sum(jnp.sin(second)) + jnp.sum(final**2)

    actual, expected = (jax.jit(jax.grad(f, (0, 1)))(main, state) for f in (packed, separate))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split_rows_and_single_tokens_continue_the_state(implementation):
    inputs = arrays(Case((2, 9, 2, 4, 6, 2), gated=True))
    whole, final = run_forward(inputs, implementation)
    first = {k: None if x is None else x[:, :5] for k, x in inputs.items()}
    o, state = run_forward(first, implementation)
    np.testing.assert_allclose(o, whole[:, :5], atol=2e-6)
    step = jax.jit(delta_product_step)
    for t in range(5, 9):
        now = [inputs[name][:, t] for name in ("q", "k", "v", "beta", "g")]
        o, state = step(*now, state)
        np.testing.assert_allclose(o, whole[:, t], atol=2e-6)
    np.testing.assert_allclose(state, final, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
def test_chunk_size_does_not_matter(chunk_size, implementation):
    inputs = arrays(Case((1, 13, 2, 4, 4, 3), gated=True))
    expected, actual = (run_forward(inputs, implementation, chunk_size=c) for c in (4, chunk_size))
    np.testing.assert_allclose(actual[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(actual[1], expected[1], atol=2e-6)


def test_known_step_sizes_outside_their_range_are_refused():
    shape = (1, 2, 1, 1)
    x = jnp.ones((*shape, 4))
    for beta in (-0.1, 2.01, float("nan")):
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 2\]"):
            delta_product(x[:, :, 0], x, x, jnp.full(shape, beta))
        step = (x[:, 0, 0], x[:, 0], x[:, 0], jnp.full(shape[:1] + shape[2:], beta))
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 2\]"):
            delta_product_step(*step, None, jnp.zeros((1, 1, 4, 4)))
    jax.jit(delta_product)(x[:, :, 0], x, x, jnp.full(shape, 3.0))  # not known, not checked
    jax.jit(lambda x: delta_product(x[:, :, 0], x, x, jnp.ones(shape)))(x)  # known inside a trace
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 2\], got 3.0"):
        beta = jnp.full(shape, 3.0)
        jax.jit(lambda x: delta_product(x[:, :, 0], x, x, beta))(x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_beta_two_reflects_and_beta_zero_does_nothing(implementation):
    """Two equal reflections cancel; with beta 0 the state stays, bit for bit."""
    key = jnp.asarray([0.6, 0.8, 0.0]).reshape(1, 1, 1, 1, 3)
    state = jnp.arange(6.0).reshape(1, 1, 3, 2)
    k, v = jnp.tile(key, (1, 2, 1, 1, 1)), jnp.zeros((1, 2, 1, 1, 2))
    q = k[:, :, 0]
    for beta, tokens, expected in ((2.0, 2, state), (0.0, 2, state)):
        _, final = delta_product(
            *(q[:, :tokens], k[:, :tokens], v[:, :tokens]),
            jnp.full((1, tokens, 1, 1), beta),
            initial_state=state,
            implementation=implementation,
        )
        np.testing.assert_allclose(final, expected, atol=1e-6)
    _, once = delta_product(
        *(q[:, :1], k[:, :1], v[:, :1], jnp.full((1, 1, 1, 1), 2.0)),
        initial_state=state,
        implementation=implementation,
    )
    reflection = np.eye(3) - 2 * np.outer(key, key)
    np.testing.assert_allclose(once[0, 0], reflection @ state[0, 0], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_a_float32_state(implementation):
    case = Case((2, 33, 2, 16, 16, 2), gated=True)
    inputs = arrays(case, "bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    o, state = run_forward(inputs, implementation)
    expected, expected_state = run_forward(wide, "reference")
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))
    assert rms(o.astype(jnp.float32) - expected) <= 5e-3 * rms(expected)
    assert rms(state - expected_state) <= 5e-3 * rms(expected_state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_gradients(implementation):
    case = Case((2, 33, 2, 16, 16, 2))
    _, gradients = value_and_gradients(case, implementation, "bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), arrays(case, "bfloat16"))
    _, expected = value_and_gradients(case, "reference", "float32", rounded)
    for name, tolerance in {"q": 8e-3, "k": 8e-3, "v": 8e-3, "beta": 2e-2}.items():
        a, e = np.asarray(gradients[name], np.float32), expected[name]
        assert gradients[name].dtype == jnp.bfloat16
        assert np.sqrt(np.mean((a - e) ** 2)) <= tolerance * np.sqrt(np.mean(e**2)), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap(implementation):
    inputs = arrays(Case((3, 7, 2, 4, 4, 2)))
    args = [inputs[name] for name in ("q", "k", "v", "beta")]

    def one(*args):
        return delta_product(*(x[None] for x in args), implementation=implementation)[0][0]

    expected, _ = run_forward(inputs, implementation)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(*args), expected, atol=2e-6)


def test_inverse_is_exact_where_powers_explode():
    """beta = 2 and keys in a plane, 64 micro-steps: the state-tracking regime."""
    generator = np.random.default_rng(0)
    keys = generator.normal(size=(64, 2))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    a = np.tril(2 * keys @ keys.T, -1)
    expected = np.linalg.inv(np.eye(64) + a)
    actual = jax.jit(chunk_lib.unit_lower_inverse)(jnp.asarray(a, jnp.float32))
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


WRONG = {
    "k": ({"k": jnp.zeros((2, 5, 2, 2, 3))}, "k has shape"),
    "rank": ({"q": jnp.zeros((2, 5, 2))}, r"q \[B,T,H,K\]"),
    "beta": ({"beta": jnp.zeros((2, 5, 2))}, "beta has shape"),
    "dtype": ({"v": jnp.zeros((2, 5, 2, 2, 4), jnp.int32)}, "v must be floating"),
    "chunk": ({"chunk_size": 0}, "chunk_size must be positive"),
    "segments": ({"segment_ids": jnp.zeros((2, 5))}, "segment_ids must be integer"),
    "name": ({"implementation": "cuda"}, r"unknown implementation 'cuda'; choose one of .*xla"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(changes, message):
    inputs = {**arrays(Case((2, 5, 2, 4, 4, 2))), **changes}
    main = [inputs.pop(name) for name in ("q", "k", "v", "beta", "g")]
    with pytest.raises(ValueError, match=message):
        delta_product(*main, **inputs)


def run_forward(inputs, implementation, ids=None, chunk_size=4):
    inputs = dict(inputs)
    main = [inputs.pop(name) for name in ("q", "k", "v", "beta", "g")]
    call = jax.jit(
        lambda *main: delta_product(
            *main,
            initial_state=inputs["initial_state"],
            segment_ids=ids,
            implementation=implementation,
            chunk_size=chunk_size,
        )
    )
    return call(*main)
