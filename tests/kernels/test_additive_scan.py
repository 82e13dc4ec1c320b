"""Properties of the additive scan, on every implementation, against the definition in float64."""

import dataclasses
import functools

from additive_scan_cases import IMPLEMENTATIONS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import additive_attention, additive_scan, additive_step
from scanax.kernels.additive_scan import attention, quotients

# Programs that run once: most of the time is compilation. The goldens' are compiled in full.
pytestmark = pytest.mark.usefixtures("hurried_compiler")


@dataclasses.dataclass(frozen=True)
class Case:
    """B, T, H, K, V, and what is switched on; chunks hold 8 tokens, leaves 4."""

    shape: tuple[int, int, int, int, int]
    state: str = "none"  # or full, or waiting: S without z
    segments: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()  # masked tokens
    keys: float = 1.0  # their size
    factors: bool = False  # on the weights, of both signs


CASES = {
    "one token": Case((2, 1, 2, 4, 4), state="full"),
    "below a leaf": Case((2, 3, 2, 4, 4)),
    "a chunk": Case((2, 8, 2, 4, 4), state="full"),
    "above a chunk": Case((2, 9, 2, 4, 6)),
    "keys of 300": Case((1, 19, 2, 4, 4), keys=300),
    "nothing at first": Case((1, 20, 2, 4, 4), state="waiting", absent=tuple(range(11))),
    "holes": Case((1, 20, 2, 4, 4), state="full", absent=(0, 5, 8, 9, 19)),
    "no token at all": Case((1, 9, 2, 4, 4), state="waiting", absent=tuple(range(9))),
    "factors": Case((1, 20, 2, 4, 4), state="full", absent=(3,), factors=True),
    "factors, waiting": Case((1, 11, 2, 4, 4), "waiting", (7,), absent=(0, 1), factors=True),
    "segments": Case((1, 27, 2, 4, 4), state="full", segments=(1, 2, 8, 16, 19, 24)),
    "segments and holes": Case((1, 27, 2, 4, 4), "waiting", (3, 9, 22), absent=(0, 3, 4, 9, 10)),
}


def arrays(case: Case, dtype="float32"):
    batch, tokens, heads, key_dim, value_dim = case.shape
    generator = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape).astype(np.float32), dtype)
    q, k = normal(batch, tokens, heads, key_dim), normal(batch, tokens, heads, key_dim)
    inputs = {"q": q, "k": k * case.keys, "v": normal(batch, tokens, heads, value_dim)}
    s, z = normal(batch, heads, key_dim, value_dim), normal(batch, heads, key_dim)
    if case.factors:
        inputs["k_factor"] = jnp.cos(3 * normal(*q.shape))
    if case.state != "none":
        inputs["initial_state"] = (s, z if case.state == "full" else None)
    return inputs


def layout(case: Case):
    """mask and segment_ids."""
    batch, tokens = case.shape[:2]
    ids = mask = None
    if case.segments:
        ids = np.searchsorted(case.segments, np.arange(tokens), side="right") % 2  # come back
        ids = jnp.asarray(np.broadcast_to(ids, (batch, tokens)), jnp.int32)
    if case.absent:
        mask = ~np.isin(np.arange(tokens), case.absent)
        mask = jnp.asarray(np.broadcast_to(mask, (batch, tokens)))
    return {"mask": mask, "segment_ids": ids}


def value_and_gradients(case: Case, implementation: str, dtype="float32"):
    """o, the state, and gradients of a fixed linear function of both."""

    @jax.jit
    def run(inputs):
        options = {"implementation": implementation, "chunk_size": 8, **layout(case)}
        outputs, pull = jax.vjp(lambda inputs: additive_scan(**inputs, **options), inputs)
        cotangents = jax.tree.map(
            lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), outputs
        )
        return outputs, pull(cotangents)[0]

    return jax.device_get(run(arrays(case, dtype)))


@functools.cache
def defined(case: Case):
    with jax.enable_x64(True):
        return value_and_gradients(case, "reference", "float64")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_definition_in_float64(case, implementation):
    actual, expected = value_and_gradients(case, implementation), defined(case)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        there = np.isfinite(e)
        assert (np.isfinite(a) == there).all()  # z alone may be -inf
        a, e = np.where(there, a, 0), np.where(there, e, 0)
        assert np.abs(a - e).max() <= 5e-5 * max(np.abs(e).max(), 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_definition_by_softmax(implementation):
    """The state is a softmax-weighted mean per channel; the outputs read it."""
    q, k, v = (arrays(CASES["above a chunk"])[name] for name in "qkv")
    o, (s, z) = additive_scan(q, k, v, scale=1.0, implementation=implementation, chunk_size=8)
    for t in (0, 4, 8):
        weights = jax.nn.softmax(k[:, : t + 1], axis=1)
        mean = jnp.einsum("bthk,bthv->bhkv", weights, v[:, : t + 1])
        np.testing.assert_allclose(o[:, t], jnp.einsum("bhk,bhkv->bhv", q[:, t], mean), atol=3e-6)
    np.testing.assert_allclose(s, mean, atol=2e-6)
    np.testing.assert_allclose(z, jax.nn.logsumexp(k, axis=1), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows_and_parts_equal_whole_ones(implementation):
    case = Case((1, 19, 2, 4, 4), segments=(5, 11))
    inputs = arrays(case)
    run = jax.jit(
        lambda q, k, v, state=None, ids=None: additive_scan(
            *(q, k, v),
            initial_state=state,
            segment_ids=ids,
            implementation=implementation,
            chunk_size=8,
        )
    )
    packed, state = run(**inputs, ids=layout(case)["segment_ids"])
    for a, b in ((0, 5), (5, 11), (11, 19)):
        alone, end = run(*(x[:, a:b] for x in inputs.values()))
        np.testing.assert_allclose(packed[:, a:b], alone, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state, end)

    whole, end = run(**inputs)
    o, state = run(*(x[:, :11] for x in inputs.values()))
    np.testing.assert_allclose(o, whole[:, :11], atol=2e-6)
    step = jax.jit(additive_step)
    for t in range(11, 19):
        o, state = step(*(x[:, t] for x in inputs.values()), state)
        np.testing.assert_allclose(o, whole[:, t], atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state, end)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 64])
def test_chunk_size_does_not_matter(chunk_size):
    inputs = arrays(Case((1, 37, 2, 4, 4), keys=20))
    expected = additive_scan(**inputs, implementation="reference")
    actual = jax.jit(lambda x: additive_scan(**x, chunk_size=chunk_size))(inputs)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_a_float32_state(implementation):
    inputs = arrays(Case((2, 33, 2, 16, 16)), "bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    o, (s, z) = additive_scan(**inputs, implementation=implementation)
    expected, _ = additive_scan(**wide, implementation="reference")
    assert o.dtype == jnp.bfloat16 and s.dtype == z.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((o.astype(jnp.float32) - expected) ** 2))
    assert error <= 5e-3 * jnp.sqrt(jnp.mean(expected**2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap(implementation):
    inputs = arrays(Case((3, 7, 2, 4, 4)))
    args = [inputs[name] for name in ("q", "k", "v")]
    scan = functools.partial(additive_scan, implementation=implementation)
    expected, _ = jax.jit(scan)(*args)
    one = lambda *args: scan(*(x[None] for x in args))[0][0]
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(*args), expected, atol=2e-6)


@pytest.mark.parametrize("keys", [1.0, 300.0])
def test_attention_is_the_last_state_of_the_scan(keys):
    """With factors on the keys too: values, and gradients in all arguments."""
    inputs = arrays(Case((2, 20, 2, 4, 4), factors=True, keys=keys))

    def scanned(inputs):
        _, (s, _) = additive_scan(**inputs)
        return jnp.einsum("bthk,bhkv->bthv", inputs["q"] / 2, s)

    pairs = []
    for attend in (scanned, lambda inputs: additive_attention(**inputs)):
        o, pull = jax.vjp(attend, inputs)
        pairs.append((o, pull(jnp.cos(jnp.arange(o.size)).reshape(o.shape))[0]))
    atol = 5e-6 if keys == 1 else 1e-4  # a key of 300 has itself a rounding of 3e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), *pairs)


@pytest.mark.parametrize("shape", [(1, 65536, 2, 16), (2, 65000, 2, 16)])
def test_attention_makes_no_second_copy_of_the_keys(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    forward = lambda k, v: attention.summary(k, v, None, jnp.float32)
    backward = jax.grad(lambda k, v: forward(k, v)[0].sum(), argnums=(0, 1))
    for function in (forward, backward):
        memory = jax.jit(function).lower(x, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * x.size / 4


def test_attention_ignores_order_and_absent_tokens():
    q, k, v = (arrays(Case((2, 20, 2, 4, 4), keys=50))[name] for name in "qkv")
    o = additive_attention(q, k, v)
    order = np.random.default_rng(0).permutation(20)
    shuffled = additive_attention(*(x[:, order] for x in (q, k, v)))
    np.testing.assert_allclose(shuffled, o[:, order], atol=2e-6)
    mask = jnp.arange(20)[None] < jnp.asarray([[13], [0]])
    masked = additive_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(
        masked[:1, :13], additive_attention(*(x[:1, :13] for x in (q, k, v))), atol=2e-6
    )
    assert (masked[0, 13:] == 0).all() and (masked[1] == 0).all()
    gradient = jax.grad(lambda k: jnp.sum(additive_attention(q, k, v, mask=mask) ** 2))(k)
    assert jnp.isfinite(gradient).all() and (gradient[1] == 0).all()


@pytest.mark.parametrize("factors", [False, True])
def test_attention_by_blocks(monkeypatch, factors):
    """Long rows go block by block, with the same values and gradients."""
    from scanax.kernels.additive_scan import attention

    inputs = arrays(Case((2, 21, 2, 4, 4), keys=50, factors=factors))

    def run():
        o, pull = jax.vjp(lambda x: additive_attention(**x), inputs)
        return o, pull(jnp.cos(o))[0]

    expected = run()
    monkeypatch.setattr(attention, "BLOCK", 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), run(), expected)


WRONG = {
    "k": ({"k": jnp.zeros((2, 5, 2, 3))}, "k has shape"),
    "rank": ({"q": jnp.zeros((2, 5, 2))}, r"q, k \[B,T,H,K\]"),
    "dtype": ({"v": jnp.zeros((2, 5, 2, 4), jnp.int32)}, "v must be floating"),
    "mask": ({"mask": jnp.zeros((2, 5))}, "mask must be bool"),
    "state": ({"initial_state": (jnp.zeros((2, 2, 4, 3)), None)}, r"initial_state\[0\] has shape"),
    "chunk": ({"chunk_size": 0}, "chunk_size must be positive"),
    "name": ({"implementation": "cuda"}, r"unknown implementation 'cuda'; choose one of .*xla"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        additive_scan(**{**arrays(Case((2, 5, 2, 4, 4))), **changes})


@pytest.mark.parametrize("what", ["scan", "step", "attention"])
def test_several_factors_are_the_same_keys_several_times(what):
    generator = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    rows = (2,) if what == "step" else (2, 9)
    arguments = normal(*rows, 3, 8), normal(*rows, 3, 4), normal(*rows, 3, 5), normal(*rows, 3, 8)
    state = normal(2, 3, 8, 5), normal(2, 3, 8)
    mask = jnp.asarray(np.arange(9) != 4)[None].repeat(2, axis=0)
    functions = {
        "scan": lambda q, k, v, f: additive_scan(q, k, v, k_factor=f, mask=mask)[0],
        "step": lambda q, k, v, f: additive_step(q, k, v, state, k_factor=f)[0],
        "attention": lambda q, k, v, f: additive_attention(q, k, v, k_factor=f, mask=mask),
    }

    def run(repeat):
        def loss(q, k, v, f):
            o = functions[what](q, jnp.concatenate([k, k], axis=-1) if repeat else k, v, f)
            return jnp.sum(jnp.sin(o)), o

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), run(True), run(False))
    with pytest.raises(ValueError, match="k has shape"):
        functions[what](arguments[0], arguments[1][..., :3], *arguments[2:])


@pytest.mark.parametrize("rise", [60.0, 80.0])
def test_one_reference_serves_until_keys_rise_too_far(rise):
    """The cheap form of a chunk says when it has lost keys; the scan is right on both sides."""
    inputs = arrays(Case((1, 16, 1, 4, 4)))
    inputs["k"] = inputs["k"].at[:, 11].add(rise)
    first = [inputs[name][0, :, 0] for name in ("q", "k", "v")]
    part = quotients.prepare(*first, None, jnp.full((4,), -jnp.inf))
    assert bool(part.sound) == (rise < 70)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x), jnp.float64) for name, x in inputs.items()}
        expected, _ = additive_scan(**wide, implementation="reference")
    for implementation in IMPLEMENTATIONS[1:]:
        o, _ = additive_scan(**inputs, implementation=implementation, chunk_size=16)
        np.testing.assert_allclose(o, expected, atol=2e-6)
