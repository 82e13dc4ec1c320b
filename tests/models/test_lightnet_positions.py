"""MD-TPE and MD-LRPE against float64 values of the equations and of the author's code."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import additive_attention, additive_scan
from scanax.models.lightnet import lrpe, tpe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lightnet"
TPE = dict(np.load(GOLDEN / "md_tpe.npz"))
LRPE = dict(np.load(GOLDEN / "md_lrpe.npz"))
TPE_META, LRPE_META = (json.loads(str(file["meta"])) for file in (TPE, LRPE))


def case_of(file, name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}__"
    return {key.removeprefix(prefix): x for key, x in file.items() if key.startswith(prefix)}


def error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual) - expected).max())


@pytest.mark.parametrize("form", tpe.FORMS)
@pytest.mark.parametrize("name", [name for name in TPE_META if name.startswith("d")])
def test_toeplitz_golden(name, form):
    golden, axes = case_of(TPE, name), len(TPE_META[name]["grid"])
    inputs = {"x": golden["x"]}
    kinds = ("b", "loglam", *(("bneg", "loglamneg") if "bneg0" in golden else ()))
    inputs |= {f"{kind}{s}": golden[f"{kind}{s}"] for s in range(axes) for kind in kinds}

    def op(inputs):
        total = jnp.zeros_like(inputs["x"])
        for s in range(axes):
            b, decay = inputs[f"b{s}"], inputs[f"loglam{s}"][None]
            back = None
            if f"bneg{s}" in inputs:
                back = inputs[f"bneg{s}"], inputs[f"loglamneg{s}"][None]
            total += tpe.toeplitz(inputs["x"], b, decay, axis=1 + s, backward=back, form=form)
        return total

    y, pull = jax.vjp(jax.jit(op), {key: jnp.asarray(x) for key, x in inputs.items()})
    assert error(y, golden["y"]) <= (5e-5 if form == "fft" else 2e-5)
    for key, gradient in pull(jnp.asarray(golden["dy"]))[0].items():
        expected = golden[f"d{key}"]
        assert error(gradient, expected) <= 5e-5 * np.abs(expected).max(), key
    for s in range(axes):
        t = tpe.coefficients(golden[f"b{s}"], golden[f"loglam{s}"][None], y.shape[1 + s])
        assert error(t, golden[f"tpos{s}"]) <= 1e-5


def test_recurrence_continues_token_by_token():
    golden = case_of(TPE, "d1_causal")
    b, decay = golden["b0"], golden["loglam0"][None]
    state, step = None, jax.jit(tpe.recurrence)
    for t in range(golden["x"].shape[1]):
        y, state = step(golden["x"][:, t : t + 1], b, decay, state)
        assert error(y, golden["y"][:, t : t + 1]) <= 2e-5


@pytest.mark.parametrize("name", [name for name in TPE_META if name.startswith("layer")])
def test_layer_golden(name):
    golden, meta = case_of(TPE, name), TPE_META[name]
    axes = len(meta["grid"])
    module = layer(axes, meta["heads"])
    names = {"q": "q", "k": "k", "log_decay": "log_decay", "norm_w": "norm", "o_proj": "o_proj"}
    params = {}
    for s in range(axes):
        own = {ours: jnp.asarray(golden[f"{theirs}{s}"]) for theirs, ours in names.items()}
        own |= {"norm": {"scale": own["norm"]}, "o_proj": {"kernel": own["o_proj"].T}}
        params[f"axis_{s}"] = own
    apply = jax.jit(lambda params, x: module.apply({"params": params}, x)[0])
    y, pull = jax.vjp(apply, params, jnp.asarray(golden["x"]))
    assert error(y, golden["y"]) <= 2e-5
    gradients, dx = pull(jnp.asarray(golden["dy"]))
    assert error(dx, golden["dx"]) <= 5e-5 * np.abs(golden["dx"]).max()
    for s in range(axes):
        own = gradients[f"axis_{s}"]
        own |= {"norm": own["norm"]["scale"], "o_proj": own["o_proj"]["kernel"].T}
        for theirs, ours in names.items():
            expected = golden[f"d{theirs}{s}"]
            assert error(own[ours], expected) <= 5e-5 * np.abs(expected).max(), theirs


def layer(axes: int, heads: int, bidirectional=False, share_axes=False) -> tpe.MDTPE:
    init = nn.initializers.normal(0.02)
    return tpe.MDTPE(axes, heads, bidirectional, share_axes, init, "float32", "float32")


def test_bidirectional_layer_sees_both_sides_and_shares_its_axes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 5, 6)), jnp.float32)
    module = layer(2, 3, bidirectional=True, share_axes=True)
    params = module.init(jax.random.key(0), x)["params"]
    assert list(params) == ["axis_0"] and {"back_q", "back_k"} < set(params["axis_0"])
    see = lambda module, params: jax.grad(
        lambda x: jnp.sum(module.apply({"params": params}, x)[0][0, 1, 2] ** 2)
    )(x)[0]
    seen = (see(module, params) != 0).any(axis=-1)
    assert seen[1].all() and seen[:, 2].all() and seen.sum() == 8  # its row and its column
    causal = layer(2, 3)
    seen = see(causal, causal.init(jax.random.key(0), x)["params"]) != 0
    assert not seen[2:].any() and not seen[:, 3:].any()
    with pytest.raises(ValueError, match="4 heads do not divide 6"):
        layer(2, 4).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"takes \[B, 1 axes, C\]"):
        layer(1, 3).init(jax.random.key(0), x)


def test_layer_along_a_sequence_knows_padding_segments_and_states():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 6)), jnp.float32)
    module = layer(1, 3)
    params = {"params": module.init(jax.random.key(0), x)["params"]}
    whole, end = module.apply(params, x)
    first, state = module.apply(params, x[:, :3])
    rest, last = module.apply(params, x[:, 3:], state=state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(last, end, atol=1e-6)
    mask = jnp.asarray([[False, False, True, True, True, True, True, False]])
    padded = jnp.concatenate([x[:, 5:], x[:, :5], x[:, :1]], axis=1)
    y, state = module.apply(params, padded, mask=mask)
    np.testing.assert_allclose(y[:, 2:7], whole[:, :5], atol=1e-6)
    np.testing.assert_allclose(state, module.apply(params, x[:, :5])[1], atol=1e-6)
    y, state = module.apply(params, x, segment_ids=jnp.asarray([[1, 1, 1, 2, 2, 2, 2]]))
    alone, alone_state = module.apply(params, x[:, 3:])
    np.testing.assert_allclose(y[:, 3:], alone, atol=1e-6)
    np.testing.assert_allclose(state, alone_state, atol=1e-6)
    with pytest.raises(ValueError, match="causal product along one axis"):
        layer(1, 3, bidirectional=True).init(jax.random.key(0), x, state=state)


def test_unknown_form():
    with pytest.raises(ValueError, match="choose one of dense"):
        tpe.toeplitz(jnp.zeros((1, 3, 2)), jnp.ones((2, 1)), jnp.zeros((2, 1)), form="dft")


@pytest.mark.parametrize("name", [n for n in LRPE_META if n.startswith(("cos", "rot"))])
def test_lrpe_golden(name):
    golden, meta = case_of(LRPE, name), LRPE_META[name]
    form = lrpe.cosine if name.startswith("cos") else lrpe.rotate
    width = golden["x"].shape[-1] // (1 if form is lrpe.cosine else 2)
    offset = (meta["offset"] or [0])[0]
    swap = lambda x: jnp.swapaxes(jnp.asarray(x), 1, 2)  # [B, H, T, d] <-> [B, T, H, d]

    @jax.jit
    def op(x, theta):
        angles = lrpe.angles(theta, lrpe.places(meta["grid"], meta["extra"]) + offset, width)
        return swap(form(swap(x), angles))

    theta = jnp.asarray(golden["theta"])
    o, pull = jax.vjp(op, jnp.asarray(golden["x"]), theta)
    assert error(o, golden["o"]) <= 1e-5
    for gradient, key in zip(pull(jnp.asarray(golden["do"])), ("dx", "dtheta"), strict=True):
        assert error(gradient, golden[key]) <= 5e-5 * np.abs(golden[key]).max(), key
    scores = jnp.einsum("bhnd,bhmd->bhnm", o, op(jnp.asarray(golden["x2"]), theta))
    assert error(scores, golden["score"]) <= 1e-5


def test_turned_keys_in_the_causal_scan():
    """Normalised first and turned second; every weight serves a cosine and a sine channel."""
    golden = case_of(LRPE, "causal_with_lrpe")
    place = lrpe.places((golden["q"].shape[1],))
    angles = lrpe.angles(jnp.asarray(golden["theta"]), place, 8)

    def op(q, k, v):
        q, k, factor = lrpe.turn_additive(q, k, angles, rotation=False)
        o, (s, _) = additive_scan(q, k, v, k_factor=factor, scale=1.0)
        return o, s

    arrays = [jnp.asarray(golden[key]) for key in "qkv"]
    (o, s), pull = jax.vjp(jax.jit(op), *arrays)
    assert error(o, golden["o"]) <= 1e-5 and error(s, golden["S_T"]) <= 1e-5
    gradients = pull((jnp.asarray(golden["do"]), jnp.zeros_like(s)))
    for gradient, key in zip(gradients, ("dq", "dk", "dv"), strict=True):
        assert error(gradient, golden[key]) <= 5e-5 * np.abs(golden[key]).max(), key


def test_scores_depend_on_the_difference_of_places_alone():
    """Shifting both tokens along both axes leaves every product as it is."""
    theta = jnp.asarray(lrpe.grid_theta(2, 7, 2), jnp.float32)
    angles = lrpe.angles(theta, lrpe.places((5, 6)), 7).reshape(5, 6, 2, 7)
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 2, 7)), jnp.float32) for _ in range(2))
    score = lambda a, b: jnp.sum(
        lrpe.cosine(q, angles[a][None, None]) * lrpe.cosine(k, angles[b][None, None]), axis=-1
    )
    np.testing.assert_allclose(score((0, 1), (2, 0)), score((2, 5), (4, 4)), atol=1e-5)
    assert np.abs(score((0, 1), (2, 0)) - score((0, 1), (2, 3))).max() > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_rotated_weights_of_the_additive_kernels(causal):
    """Both halves of the split rotation together turn the softmax of the keys."""
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in range(3))
    theta = jnp.asarray(lrpe.theta_table(1, 2, 4, 2), jnp.float32)
    angles = lrpe.angles(theta, lrpe.places((2, 3)), 2)
    o = np.zeros(v.shape, np.float32)
    for t in range(6):
        seen = slice(0, t + 1 if causal else 6)
        weights = lrpe.rotate(jax.nn.softmax(k[:, seen], axis=1), angles[:, seen])
        state = jnp.einsum("bthk,bthv->bhkv", weights, v[:, seen])
        o[:, t] = jnp.einsum("bhk,bhkv->bhv", lrpe.rotate(q, angles)[:, t], state)
    q2, k2, factor = lrpe.turn_additive(q, k, angles, rotation=True)
    assert q2.shape == factor.shape == (2, 6, 2, 8) and k2 is k
    if causal:
        found, _ = additive_scan(q2, k2, v, k_factor=factor, scale=1.0)
    else:
        found = additive_attention(q2, k2, v, k_factor=factor, scale=1.0)
    assert error(found, o) <= 1e-5


@pytest.mark.parametrize("kind", lrpe.THETA_TYPES)
def test_every_kind_of_rates_turns_the_additive_kernels(kind):
    """The sum over channels depends on differences of places alone, and is what is turned."""
    rotation = lrpe.is_rotation(kind)
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(3))
    theta = jnp.asarray(lrpe.theta_table(kind, 2, 4, 2), jnp.float32)
    angles = lrpe.angles(theta, lrpe.places((2, 3)), 2 if rotation else 4)
    weights = lrpe.turn(jax.nn.softmax(k, axis=1), angles, rotation)
    state = jnp.einsum("bthk,bthv->bhkv", weights, v)
    want = jnp.einsum("bthk,bhkv->bthv", lrpe.turn(q, angles, rotation), state)
    q, k, factor = lrpe.turn_additive(q, k, angles, rotation=rotation)
    assert error(additive_attention(q, k, v, k_factor=factor, scale=1.0), want) <= 1e-5


@pytest.mark.parametrize("kind", lrpe.THETA_TYPES)
def test_published_rates(kind):
    expected = LRPE[f"theta__theta_type{kind}"]
    np.testing.assert_allclose(lrpe.fixed_theta(kind, 16), expected, rtol=1e-6)


def test_wrong_positions_are_named():
    with pytest.raises(ValueError, match="theta_type must be one of"):
        lrpe.fixed_theta(7, 16)
    with pytest.raises(ValueError, match="width 15 is odd"):
        lrpe.fixed_theta(1, 15)
    with pytest.raises(ValueError, match="over 2 axes needs 4"):
        lrpe.angles(jnp.zeros((1, 3)), lrpe.places((2, 2)), 7)
