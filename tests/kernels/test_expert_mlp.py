"""Experts of a mixture against a loop over the tokens, and against the published layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from scanax.kernels.expert_mlp import Experts, api, capacity, expert_mlp, implementations, kept
from scanax.kernels.expert_mlp.api import IMPLEMENTATIONS

# Hundreds of small programs that run once: nearly all of the time is compilation.
pytestmark = pytest.mark.usefixtures("hurried_compiler")

DROPLESS = ("dense", "block", "ragged")
# name -> tokens, choices, experts, who gets what
CASES = {
    "random": (37, 2, 8, "random"),
    "one token": (1, 2, 8, "random"),
    "more experts than assignments": (3, 1, 8, "random"),
    "experts without tokens": (37, 2, 8, "few"),
    "one expert gets all": (37, 1, 8, "one"),
    "all experts": (11, 4, 4, "random"),
    "one expert": (11, 1, 1, "random"),
}


def inputs(name: str, gated: bool, dtype="float64"):
    tokens, choices, number, how = CASES[name]
    rng = np.random.default_rng(len(name))
    logits = rng.normal(size=(tokens, number))
    if how == "few":
        logits[:, 3:] = -1e9
    index = np.argsort(-logits, axis=1)[:, :choices]
    if how == "one":
        index[:] = 5
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    gate, up_bias, down_bias = None, None, None
    if gated:
        gate = normal(number, 6, 5)
    else:
        up_bias, down_bias = normal(number, 5), normal(number, 6)
    experts = Experts(normal(number, 6, 5), normal(number, 5, 6), gate, up_bias, down_bias)
    return normal(tokens, 6), jnp.asarray(index), normal(tokens, choices), experts


def loop(x, index, weight, experts, mask=None, keep=None, kept_TJ=None):
    """The definition: a token, a choice, after the other, in numpy."""
    x, index, weight, experts = jax.device_get((x, index, weight, experts))
    y = np.zeros_like(x)
    for t, j in np.ndindex(index.shape):
        if (mask is not None and not mask[t]) or (kept_TJ is not None and not kept_TJ[t, j]):
            continue
        e = index[t, j]
        hidden = x[t] @ experts.up[e]
        if experts.gate is None:
            hidden = np.maximum(hidden + experts.up_bias[e], 0)
        else:
            gate = x[t] @ experts.gate[e]
            hidden = gate / (1 + np.exp(-gate)) * hidden
        if keep is not None:
            hidden = hidden * keep[t, j]
        out = hidden @ experts.down[e]
        y[t] += weight[t, j] * (out if experts.down_bias is None else out + experts.down_bias[e])
    return y


def outputs(x, index, weight, experts, **options):
    """y and the gradients by x, weight and experts, of a fixed function of y."""

    @jax.jit
    def run(x, weight, experts):
        f = lambda x, weight, experts: expert_mlp(x, index, weight, experts, **options)
        y, pull = jax.vjp(f, x, weight, experts)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.device_get(run(x, weight, experts))


def agree(a, b, tolerance=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x - y).max() <= tolerance * max(1, np.abs(y).max())


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "biases"])
@pytest.mark.parametrize("name", CASES)
def test_dropless_implementations_agree_with_the_definition(name, gated):
    with jax.enable_x64(True):
        given = inputs(name, gated)
        rng = np.random.default_rng(0)
        mask = rng.random(len(given[0])) < 0.8
        keep = 2.0 * (rng.random((*given[1].shape, 5)) < 0.5)
        for options in ({}, {"mask": jnp.asarray(mask), "keep": jnp.asarray(keep)}):
            expected = outputs(*given, implementation="dense", **options)
            agree(expected[0], loop(*given, **{k: np.asarray(v) for k, v in options.items()}))
            for implementation in DROPLESS[1:]:
                sizes = (1, 4, 64) if implementation == "block" else (None,)
                for size in sizes:
                    chosen = {"implementation": implementation, "block_size": size}
                    agree(outputs(*given, **chosen, **options), expected)


def test_gradients_of_the_definition():
    """The gradients that all agree on are those of finite differences."""
    with jax.enable_x64(True):
        x, index, weight, experts = inputs("random", gated=True)
        f = lambda *a: expert_mlp(a[0], index, a[1], a[2], implementation="block")
        check_grads(jax.jit(f), (x, weight, experts), order=1, modes=["rev"])


@pytest.mark.parametrize("policy", ["score", "position"])
@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0, 4.0])
def test_capacity_drops_what_the_policy_says(policy, factor):
    with jax.enable_x64(True):
        x, index, weight, experts = inputs("random", gated=True)
        weight = jax.nn.softmax(weight)
        places = capacity(*index.shape, 8, factor)
        keeps = np.zeros(index.shape, bool)
        for e in range(8):
            mine = np.argwhere(np.asarray(index) == e)
            if policy == "score":
                mine = mine[np.argsort(-np.asarray(weight)[tuple(mine.T)], kind="stable")]
            else:
                mine = mine[np.lexsort((mine[:, 0], mine[:, 1]))]
            keeps[tuple(mine[:places].T)] = True
        score = weight if policy == "score" else None
        np.testing.assert_array_equal(kept(index, 8, factor, score), keeps)
        options = {"capacity_factor": factor, "policy": policy}
        y, (dx, dweight, _) = outputs(x, index, weight, experts, **options)
        agree(y, loop(x, index, weight, experts, kept_TJ=keeps))
        assert (dweight[~keeps] == 0).all() and (factor == 4.0) == keeps.all()
        assert (dx[~keeps.any(axis=1)] == 0).all()
        if factor == 4.0:
            agree(y, expert_mlp(x, index, weight, experts))


def test_padding_takes_no_place():
    with jax.enable_x64(True):
        x, index, weight, experts = inputs("one expert gets all", gated=True)
        mask = jnp.arange(37) >= 30
        options = {"mask": mask, "capacity_factor": 8 * 7 / 37, "policy": "position"}
        assert capacity(37, 1, 8, options["capacity_factor"]) == 7
        y = expert_mlp(x, index, weight, experts, **options)
        agree(y, loop(x, index, weight, experts, mask=np.asarray(mask)))


def test_grouped_product_of_tpus():
    """In the interpreter; on another machine it says that it needs a TPU."""
    x, index, weight, experts = inputs("experts without tokens", gated=False, dtype="float32")
    expected = outputs(x, index, weight, experts, implementation="dense")
    with pytest.raises(ValueError, match="needs a TPU"):
        expert_mlp(x, index, weight, experts, implementation="gmm")
    run = functools.partial(implementations.gmm, interpret=True)
    index = index.astype(jnp.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # inside of it
        f = jax.jit(lambda x, *others: run(x, index, *others))
        y, pull = jax.vjp(f, x, weight, experts)
        gradients = pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
    agree((y, gradients), expected, 1e-5)


def test_float16_sums_are_wide_and_types_are_kept():
    x, index, weight, experts = inputs("random", gated=True, dtype="float32")
    y = expert_mlp(x.astype(jnp.bfloat16), index, weight, experts, implementation="block")
    assert y.dtype == jnp.bfloat16
    agree(y.astype(jnp.float32), loop(x, index, weight, experts), 0.05)


def test_under_vmap_and_scan():
    x, index, weight, experts = inputs("random", gated=True, dtype="float32")
    y = expert_mlp(x, index, weight, experts)
    twice = jax.vmap(lambda x, i, w: expert_mlp(x, i, w, experts))(
        jnp.stack([x, x]), jnp.stack([index, index]), jnp.stack([weight, weight])
    )
    agree(twice[1], y, 1e-5)


def test_published_layer(golden):
    """Two matrices with biases and ReLU; gradients of experts and input."""
    file = dict(np.load(golden / "rmoe" / "moe_relu_layer.npz"))
    with jax.enable_x64(True):
        part = lambda kind, name: jnp.asarray(file[f"{kind}.experts.{name}"])
        tree = lambda kind: Experts(
            part(kind, "htoh4.weight").swapaxes(1, 2),
            part(kind, "h4toh.weight").swapaxes(1, 2),
            None,
            part(kind, "htoh4.bias"),
            part(kind, "h4toh.bias"),
        )
        x = jnp.asarray(file["x"].reshape(18, 14))
        scale, cot = (jnp.asarray(file[n]) for n in ("param.layer_norm.weight", "cot"))
        index = jnp.asarray(file["topk_idx"])

        def post(x, logits_params, experts, scale, shift):
            weight, bias = logits_params
            logits = x @ weight.T + bias[None]
            w = jax.nn.softmax(jnp.take_along_axis(logits, index, axis=1))
            core = expert_mlp(x, index, w, experts, implementation="block")
            h = x + core
            h = h - h.mean(axis=1, keepdims=True)
            h = h / jnp.sqrt(jnp.mean(h * h, axis=1, keepdims=True) + 1e-5)
            return h * scale[None] + shift[None], core

        gate = tuple(jnp.asarray(file[f"param.gate.gate.{n}"]) for n in ("weight", "bias"))
        arguments = (x, gate, tree("param"), scale, jnp.asarray(file["param.layer_norm.bias"]))
        (y, core), pull = jax.vjp(jax.jit(post), *arguments)
        agree(core, file["moe_core"].reshape(18, 14), 1e-11)
        agree(y, file["y_post_ln"].reshape(18, 14), 1e-11)
        dx, dgate, dexperts, dscale, _ = pull((cot.reshape(18, 14), jnp.zeros_like(core)))
        agree(dx, file["grad.x"].reshape(18, 14), 1e-11)
        agree(dexperts, tree("grad"), 1e-11)
        agree(dgate[0], file["grad.gate.gate.weight"], 1e-11)
        agree(dscale, file["grad.layer_norm.weight"], 1e-11)


def test_published_dropping(golden):
    file = dict(np.load(golden / "rmoe" / "analysis.npz"))
    chosen = np.take_along_axis(file["probs"], file["topk_idx"], axis=-1)
    for factor in (0.5, 1.0, 1.25):
        for policy in ("score", "position"):
            for layer in range(4):
                score = jnp.asarray(chosen[layer], jnp.float32) if policy == "score" else None
                keep = kept(jnp.asarray(file["topk_idx"][layer]), 16, factor, score)
                np.testing.assert_array_equal(keep, file[f"cap{factor}.{policy}.keep"][layer])


def test_flops_of_blocks_stay_near_the_ideal():
    """As the compiler counts them; ragged_dot on CPU computes every expert for every token."""
    tokens, hidden, width, number, choices = 2048, 32, 32, 16, 2
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    experts = Experts(shape(number, hidden, width), shape(number, width, hidden))
    index = jax.ShapeDtypeStruct((tokens, choices), jnp.int32)
    arguments = (shape(tokens, hidden), index, shape(tokens, choices), experts)
    ideal = 4 * tokens * choices * hidden * width
    run = jax.jit(functools.partial(expert_mlp, implementation="block"))
    analysis = run.lower(*arguments).compile().cost_analysis()
    assert 1 <= analysis["flops"] / ideal < 1.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "best"}, "score, position"),
        ({"capacity_factor": 0.0}, "must be positive"),
        ({"block_size": 0}, "must be positive"),
        ({"weight": jnp.ones((37, 3))}, "weight has shape"),
        ({"index": jnp.zeros((37, 2))}, "must be integers"),
        ({"index": jnp.zeros((37, 9), int), "weight": jnp.ones((37, 9))}, "9 choices among 8"),
        ({"implementation": "capacity"}, "needs a capacity_factor"),
        ({"implementation": "block", "capacity_factor": 1.0}, "leave capacity_factor out"),
        ({"implementation": "fast"}, "unknown implementation"),
        ({"mask": jnp.ones((2, 37), bool)}, "mask has shape"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, message):
    x, index, weight, experts = inputs("random", gated=True, dtype="float32")
    given = {"x": x, "index": index, "weight": weight, "experts": experts} | change
    with pytest.raises(ValueError, match=message):
        expert_mlp(**given)


@pytest.mark.parametrize(
    "platform, factor, chosen",
    [
        ("cpu", None, "block"),
        ("cpu", 1.0, "capacity"),
        ("gpu", None, "block"),
        ("tpu", None, "gmm"),
    ],
)
def test_choice_of_the_implementation(platform, factor, chosen, monkeypatch):
    """On TPUs the grouped product on one device; among several the compiler cannot divide it."""
    x, index, weight, experts = inputs("random", gated=True, dtype="float32")
    named = {
        n: dataclasses.replace(i, run=lambda *a, n=n, **k: n) for n, i in IMPLEMENTATIONS.items()
    }
    monkeypatch.setattr(api, "IMPLEMENTATIONS", named)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for devices in (1, 4):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        found = expert_mlp(x, index, weight, experts, capacity_factor=factor)
        assert found == ("block" if chosen == "gmm" and devices > 1 else chosen)


def test_every_implementation_is_tested():
    assert set(IMPLEMENTATIONS) == {*DROPLESS, "capacity", "gmm"}
