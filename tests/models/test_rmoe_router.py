"""Routers and balance losses against the published ones, values and gradients in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels.expert_mlp import Experts, expert_mlp
from scanax.models.rmoe import losses, router
from scanax.models.rmoe.router import RouterConfig

BASE = RouterConfig(
    num_experts=8,
    experts_per_token=2,
    cell="gru",
    memory="full",
    projector=True,
    router_dim=8,
    head="linear",
    head_dim=8,
    residual=0.0,
    residual_detach=False,
    residual_cumulative=False,
    bias=False,
    normalise=True,
)
PLAIN = dataclasses.replace(BASE, cell="none", bias=True)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def load(golden, name: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in np.load(golden / "rmoe" / f"{name}.npz").items() if k != "__meta__"}


def part(file, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}


def gru_params(tensors) -> dict[str, np.ndarray]:
    """Twelve tensors of a GRU side by side."""
    pack = lambda kind, side: np.concatenate([tensors[f"{kind}_{side}{g}"] for g in "rzn"])
    return {
        "input": pack("weight", "i").T,
        "hidden": pack("weight", "h").T,
        "input_bias": pack("bias", "i"),
        "hidden_bias": pack("bias", "h"),
    }


def cell_params(file, name: str) -> dict[str, np.ndarray]:
    tensors = part(file, f"{name}.param.")
    if name == "gru":
        return gru_params(tensors)
    if name == "rnn":
        tensors = {k.replace("_in", "_ih").replace("_hn", "_hh"): v for k, v in tensors.items()}
    return {
        "input": tensors["weight_ih"].T,
        "hidden": tensors["weight_hh"].T,
        "input_bias": tensors["bias_ih"],
        "hidden_bias": tensors["bias_hh"],
    }


@pytest.mark.parametrize("name", ["gru", "rnn", "lstm", "sproj"])
def test_cells(golden, check, name):
    file = load(golden, "gru_cell")
    kind = "gru" if name == "sproj" else name
    c = dataclasses.replace(BASE, cell=kind, projector=False, head="linear")
    own = {"head": np.eye(8)}
    state, second = file[f"{name}.h"], file.get(f"{name}.c")
    carry = router.Carry(*(None if x is None else jnp.asarray(x) for x in (state, second, None)))
    x = jnp.asarray(file[f"{name}.x"])
    run = lambda shared, x, carry: router.route(c, shared, own, x, carry)[1]
    after, pull = jax.vjp(run, jax.tree.map(jnp.asarray, cell_params(file, name)), x, carry)
    check("h", after.state, file[f"{name}.h_new"], 1e-11)
    if name == "lstm":
        check("c", after.cell, file["lstm.c_new"], 1e-11)
    if name in ("gru", "rnn"):
        first = run(cell_params(file, name), x, router.start(c, len(x), x.dtype))
        check("first", first.state, file[f"{name}.h_new_h0none"], 1e-11)
        dshared, dx, dcarry = pull(after._replace(state=jnp.asarray(file[f"{name}.cot"])))
        check("dx", dx, file[f"{name}.grad.x"], 1e-11)
        check("dh", dcarry.state, file[f"{name}.grad.h"], 1e-11)
        grads = {k.replace(".grad.", ".param."): v for k, v in part(file, "").items()}
        grads = {k: file[k.replace(".param.", ".grad.")] for k in grads if f"{name}.param." in k}
        for key, want in cell_params(grads, name).items():
            check(key, dshared[key], want, 1e-11)


VARIANTS = {
    "base": {},
    "np": {"memory": "none"},
    "detach": {"memory": "detach"},
    "np_r0.5": {"memory": "none", "residual": 0.5},
    "np_r1.0": {"memory": "none", "residual": 1.0},
    "np_r0.5_detach": {"memory": "none", "residual": 0.5, "residual_detach": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stack_of_routers(golden, check, jit, variant):
    """Four layers, joined by the router's memory alone, with experts and the balance loss."""
    file = load(golden, "router_stack")
    want = part(file, f"{variant}.")
    c = dataclasses.replace(BASE, **VARIANTS[variant])
    stack = lambda w, prefix="": np.stack(
        [[file[f"{prefix}layer{i}.experts.{e}.{w}.weight"].T for e in range(8)] for i in range(4)]
    )
    experts = Experts(stack("w3"), stack("w2"), stack("w1"))
    own = {
        "projector": np.stack([file[f"layer{i}.weight1"].T for i in range(4)]),
        "head": np.stack([file[f"layer{i}.weight2"].T for i in range(4)]),
    }
    shared = gru_params(part(file, "gru."))
    x = file["X"].reshape(4, 16, 24)

    def loss(x, shared, own, experts):
        def layer(carry, inputs):
            x_TD, own, experts = inputs
            logits, carry = router.route(c, shared, own, x_TD, carry)
            index, weight, score = router.choose(c, logits)
            y = expert_mlp(x_TD, index, weight, experts, implementation="block", block_size=4)
            found = losses.statistics(logits, index)
            return carry, (y, carry.state, logits, index, weight, score, found)

        last, outputs = jax.lax.scan(layer, router.start(c, 16, x.dtype), (x, own, experts))
        found = outputs[-1]
        loss = jnp.sum(outputs[0] * file["cot_y"].reshape(4, 16, 24)) / 16
        loss += jnp.sum(last.state * file["cot_h_last"]) / 16
        return loss + 0.01 * losses.balance(found, "pooled", 2), outputs

    arguments = jax.tree.map(jnp.asarray, (x, shared, own, experts))
    gradient = jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (value, outputs), (dx, dshared, down, dexperts) = gradient(*arguments)
    y, state, logits, index, weight, score, found = outputs
    np.testing.assert_array_equal(index, want["topk_idx"])
    check("y", y, want["y"].reshape(4, 16, 24), 1e-11)
    check("loss", value, want["loss"], 1e-11)
    for name, got in (("h", state), ("logits", logits), ("topk_w", weight), ("topk_p", score)):
        check(name, got, want[name], 1e-11)
    each = [jax.tree.map(lambda x, i=i: x[i : i + 1], found) for i in range(4)]
    for form, name in (("pooled", "aux_hf_per_layer"), ("layer_sum", "balance_fmoe_per_layer")):
        check(name, [losses.balance(s, form, 2) for s in each], want[name], 1e-11)
    check("z", [losses.z_loss(s) for s in each], want["zloss_per_layer"], 1e-11)
    check("pooled", losses.balance(found, "pooled", 2), want["aux_hf_pooled"], 1e-11)
    check("sum", losses.balance(found, "layer_sum", 2), want["balance_fmoe_per_layer"].sum(), 1e-11)
    check("mean", losses.balance(found, "layer_mean", 2), want["aux_hf_per_layer"].mean(), 1e-11)
    check("dX", dx, want["grad.X"].reshape(4, 16, 24), 1e-11)
    for name, gradient in gru_params(part(want, "grad.gru.")).items():
        check(name, dshared[name], gradient, 1e-11)
    if c.memory == "none":
        assert (np.asarray(dshared["hidden"]) == 0).all()
        assert (np.asarray(dshared["hidden_bias"]) != 0).any()
    for i in range(4):
        check("dW1", down["projector"][i], want[f"grad.layer{i}.weight1"].T, 1e-11)
        check("dW2", down["head"][i], want[f"grad.layer{i}.weight2"].T, 1e-11)
    if variant == "base":
        for got, w in ((dexperts.up, "w3"), (dexperts.down, "w2"), (dexperts.gate, "w1")):
            check(w, got, stack(w, "base.grad."), 1e-11)


# router of the golden file -> ours, and the names of its parameters
BASELINES = {
    "smoe": ({"head": "linear"}, {"head": "gate.weight", "head_bias": "gate.bias"}),
    "mlp": (
        {"head": "mlp", "head_dim": 10},
        {"head_in": "w1", "head_in_bias": "b1", "head": "w2", "head_bias": "b2"},
    ),
    "hyper": (
        {"head": "hyper", "head_dim": 12},
        {
            "embedding": "embedding",
            "hyper_in": "hypernet.0.weight",
            "hyper_in_bias": "hypernet.0.bias",
            "hyper_out": "hypernet.2.weight",
            "hyper_out_bias": "hypernet.2.bias",
        },
    ),
    "xmoe": (
        {"head": "xmoe_code"},
        {"embeddings": "expert_embeddings", "reduction": "inp_reduction.weight"},
    ),
    "stable_cos": ({"head": "cosine_code"}, {"embeddings": "expert_embeddings"}),
    "xmoe_paper": (
        {"head": "xmoe"},
        {"reduction": "red", "embeddings": "emb", "temperature": "temp"},
    ),
    "cosine_paper": ({"head": "cosine"}, {"embeddings": "emb", "temperature": "temp"}),
}
TRANSPOSED = ("head", "head_in", "hyper_in", "hyper_out", "reduction")


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(golden, check, jit, name):
    options, names = BASELINES[name]
    file = part(load(golden, "baseline_routers"), f"{name}.")
    both = load(golden, "baseline_routers")
    c = dataclasses.replace(PLAIN, **options)
    ours = lambda key, value: value.T if key in TRANSPOSED else value
    own = {k: jnp.asarray(ours(k, file[f"param.{v}"])) for k, v in names.items()}
    _, wanted = router.parameters(c, 16)
    assert {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in own.items()}

    def loss(own, x):
        logits, _ = router.route(c, {}, own, x, router.start(c, len(x), x.dtype))
        index, weight, _ = router.choose(c, logits)
        found = losses.statistics(logits, index, temperature=router.balance_temperature(c))
        found = jax.tree.map(lambda x: x[None], found)
        balance = losses.balance(found, "layer_sum", 2)
        return jnp.sum(weight * both["cot"]) / 12 + 0.01 * balance, (logits, index, weight, balance)

    run = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, (logits, index, weight, balance)), (down, dx) = run(own, jnp.asarray(both["x"]))
    np.testing.assert_array_equal(index, file["topk_idx"])
    temperature = own.get("temperature", 1.0)
    check("logits", logits * temperature, file["logits"], 1e-11)
    check("weight", weight, file["topk_w"], 1e-11)
    check("balance", balance, file["balance"], 1e-11)
    check("loss", value, file["loss"], 1e-11)
    for key, theirs in names.items():
        want = file.get(f"grad.{theirs}")
        if want is None:  # frozen
            assert key.startswith("hyper_") and not np.asarray(down[key]).any()
        else:
            check(key, down[key], ours(key, want), 1e-11)
    if "grad.x" in file:
        check("x", dx, file["grad.x"], 1e-11)


def test_a_random_router_does_not_learn():
    c = dataclasses.replace(PLAIN, head="random")
    _, specs = router.parameters(c, 6)
    own = {k: jnp.ones(s.shape) for k, s in specs.items()}
    x = jnp.ones((3, 6))
    run = lambda own, x: jnp.sum(router.route(c, {}, own, x, router.start(c, 3, x.dtype))[0] ** 2)
    down, dx = jax.grad(run, argnums=(0, 1))(own, x)
    assert not any(np.asarray(g).any() for g in down.values()) and np.asarray(dx).all()


@pytest.mark.parametrize("head", router.HEADS)
@pytest.mark.parametrize("cell", router.CELLS)
def test_every_head_on_every_cell(head, cell):
    """First values have the right shapes and are finite; the carry keeps its form over layers."""
    c = dataclasses.replace(BASE, cell=cell, head=head, residual=0.5, bias=True)
    parts = []
    for specs in router.parameters(c, 16):
        keys = jax.random.split(jax.random.key(0), len(specs) + 1)
        parts.append(
            {
                name: router.first_value(c, name, spec, key, jnp.float32, None)
                for (name, spec), key in zip(specs.items(), keys[1:], strict=True)
            }
        )
        assert all(parts[-1][name].shape == spec.shape for name, spec in specs.items())
    x = jax.random.normal(jax.random.key(1), (5, 16), jnp.float32)
    carry = router.start(c, 5, x.dtype)
    logits, after = router.route(c, *parts, x, carry)
    assert logits.shape == (5, 8) and logits.dtype == jnp.float32 and np.isfinite(logits).all()
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    again, _ = router.route(c, *parts, x, after)
    assert (np.asarray(again) != np.asarray(logits)).any()  # the layer before is seen


def test_residual_adds_raw_or_summed_logits():
    c = dataclasses.replace(PLAIN, bias=False, residual=0.5)
    own = {"head": jnp.eye(8)}
    x = jnp.arange(8.0)[None]
    for cumulative, third in ((False, 1.5), (True, 1.75)):
        c = dataclasses.replace(c, residual_cumulative=cumulative)
        carry, found = router.start(c, 1, x.dtype), []
        for _ in range(3):
            logits, carry = router.route(c, {}, own, x, carry)
            found.append(np.asarray(logits))
        for logits, factor in zip(found, (1, 1.5, third), strict=True):
            np.testing.assert_allclose(logits, factor * np.asarray(x))


def test_unnormalised_weights_are_probabilities():
    c = dataclasses.replace(PLAIN, normalise=False)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)))
    index, weight, score = router.choose(c, logits)
    probability = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(index), 1)
    np.testing.assert_allclose(weight, probability)
    np.testing.assert_allclose(score, probability)


def test_preferences_count_in_the_choice_alone():
    c = dataclasses.replace(BASE, experts_per_token=2, num_experts=4)
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    index, weight, score = router.choose(c, logits, jnp.asarray([0.0, -0.15, 0.0, 0.05]))
    np.testing.assert_array_equal(index, [[0, 2]])  # of 0.4, 0.15, 0.2, 0.15
    np.testing.assert_allclose(score, [[0.4, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(weight, [[2 / 3, 1 / 3]], rtol=1e-6)


def test_statistics_add_up_and_skip_padding():
    rng = np.random.default_rng(0)
    logits, mask = jnp.asarray(rng.normal(size=(12, 8))), jnp.arange(12) < 9
    index = jax.lax.top_k(logits, 2)[1]
    whole = losses.statistics(logits, index, mask)
    halves = [losses.statistics(logits[s], index[s], mask[s]) for s in (slice(6), slice(6, 12))]
    for a, b, w in zip(*halves, whole, strict=True):
        np.testing.assert_allclose(a + b, w, rtol=1e-12)
    for a, w in zip(losses.statistics(logits[:9], index[:9]), whole, strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-12)
    even = losses.Statistics(
        *(jnp.full((3, 8), x) for x in (2.0, 1.0)), jnp.zeros(3), jnp.full(3, 8.0)
    )
    for form, value in (("pooled", 2), ("layer_mean", 2), ("layer_sum", 3 / 2)):
        np.testing.assert_allclose(losses.balance(even, form, 2), value)
    with pytest.raises(ValueError, match="pooled, layer_mean"):
        losses.balance(even, "mean", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "tree"}, "none, rnn, gru, lstm"),
        ({"head": "cos"}, "must be one of linear"),
        ({"memory": "some"}, "full, none, detach"),
        ({"experts_per_token": 9}, "between 1 and num_experts"),
        ({"router_dim": 0}, "must be positive"),
        ({"cell": "none", "memory": "none"}, "needs a cell"),
        ({"residual_detach": True}, "need a residual"),
    ],
)
def test_wrong_configs_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)
