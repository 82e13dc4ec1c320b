"""The large models' language model against the published one: values, gradients, training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import interop as checkpoints, layout, params as params_lib
from scanax.models.rmoe import (
    ROUTING,
    STATISTICS,
    RMoEConfig,
    RMoELM,
    empty_cache,
    interop,
    losses,
)

CONFIG = RMoEConfig(
    vocab_size=29,
    hidden_size=24,
    num_hidden_layers=4,
    num_heads=4,
    mixer="attention",
    num_kv_heads=0,
    rope_theta=1e4,
    num_householder=2,
    use_forget_gate=False,
    use_short_conv=True,
    num_dense_layers=0,
    dense_intermediate_size=0,
    intermediate_size=20,
    num_experts=8,
    experts_per_token=2,
    shared_expert_size=0,
    shared_weight=0.5,
    moe_weight=0.5,
    moe_bias=False,
    router_cell="gru",
    router_memory="full",
    router_projector=True,
    router_dim=8,
    router_head="linear",
    router_head_dim=8,
    router_residual=0.0,
    router_residual_detach=False,
    router_residual_cumulative=False,
    router_bias=False,
    router_normalise=True,
    capacity_factor=0.0,
    capacity_policy="score",
    balance_form="pooled",
    balance_coefficient=0.01,
    z_coefficient=0.0,
    router_balance_rate=0.0,
    tie_word_embeddings=False,
    norm_eps=1e-6,
    initializer_range=0.02,
    dtype="float64",
    param_dtype="float64",
    remat=False,
    implementation="block",
)
CONFIGS = {
    "llama_rmoe": CONFIG,
    "llama_smoe": dataclasses.replace(CONFIG, router_cell="none"),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def published(c: RMoEConfig, file, prefix: str):
    """A published checkpoint's tensors (or gradients) as our parameters."""
    tensors = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
    return layout.load(interop.llama_table(c), tensors)


def loss_of(c: RMoEConfig, ids):
    """(params) -> loss, and what it is made of."""
    model = RMoELM(c)

    def loss(params):
        (logits, _), found = model.apply({"params": params}, ids, mutable=[STATISTICS, ROUTING])
        log_p = jax.nn.log_softmax(logits[:, :-1])
        ce = -jnp.mean(jnp.take_along_axis(log_p, ids[:, 1:, None], axis=2))
        (sums,) = found[STATISTICS]["layers"]["moe"]["sums"]
        aux = losses.balance(sums, c.balance_form, c.experts_per_token)
        routing = found[ROUTING]["layers"]["moe"]
        return ce + c.balance_coefficient * aux, (logits, ce, aux, routing)

    return loss


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("name", CONFIGS)
def test_published_model(golden, check, jit, name, remat):
    file = dict(np.load(golden / "rmoe" / f"{name}.npz"))
    c = dataclasses.replace(CONFIGS[name], remat=remat)
    ids = jnp.asarray(file["input_ids"])
    params = published(c, file, "param.")
    own = params_lib.initialise(RMoELM(c), jax.random.key(0), ids)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    gradient = jit(jax.value_and_grad(loss_of(c, ids), has_aux=True))
    (value, (logits, ce, aux, routing)), gradients = gradient(params)
    check("logits", logits, file["logits"], 1e-11)
    check("router logits", routing["logits"][0], file["router_logits"], 1e-11)
    np.testing.assert_array_equal(routing["index"][0], file["topk_idx"])
    for what, got, want in (
        ("loss", value, "loss"),
        ("ce", ce, "ce"),
        ("aux", aux, "aux_hf_pooled"),
    ):
        check(what, got, file[want], 1e-11)
    wanted = published(c, file, "grad.")
    for (path, got), want in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        check(jax.tree_util.keystr(path), got, want, 1e-10)
    if remat:
        return
    for want in file["sgd_loss"]:
        (value, _), gradients = gradient(params)
        check("training", value, want, 1e-10)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients)


VARIANTS = {
    "dense first, shared expert, bias": {
        "num_dense_layers": 1,
        "dense_intermediate_size": 12,
        "shared_expert_size": 10,
        "moe_bias": True,
    },
    "grouped keys, lstm": {"num_kv_heads": 2, "router_cell": "lstm"},
    "capacity, residual": {
        "capacity_factor": 8.0,
        "router_residual": 0.5,
        "tie_word_embeddings": True,
        "implementation": "auto",
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_needs_no_router_memory(jit, check, name):
    """Token by token, with keys and values alone, the logits are those of the whole row."""
    c = dataclasses.replace(CONFIG, **VARIANTS[name])
    model = RMoELM(c)
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, c.vocab_size)
    params = params_lib.initialise(model, jax.random.key(1), ids)
    params = jax.tree.map(lambda x: 5 * x, params)  # so that positions and experts matter
    logits, none = jit(lambda p: model.apply({"params": p}, ids))(params)
    assert none is None
    step = jit(lambda p, ids, cache: model.apply({"params": p}, ids, cache=cache))
    cache, found = empty_cache(c, 2, 12), []
    assert "router" not in str(jax.tree_util.tree_leaves_with_path(cache))
    for part in (ids[:, :4], *jnp.split(ids[:, 4:], 5, axis=1)):
        got, cache = step(params, part, cache)
        found.append(got)
    check("logits", jnp.concatenate(found, axis=1), logits, 1e-11)


def test_padding_and_segments_change_nothing(jit, check):
    model = RMoELM(CONFIG)
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 29)
    params = params_lib.initialise(model, jax.random.key(1), ids)
    apply = lambda ids, **o: model.apply({"params": params}, ids, mutable=[STATISTICS], **o)
    (logits, _), alone = apply(ids[:, :6])
    (padded, _), masked = apply(ids, mask=jnp.arange(9)[None] + jnp.zeros((2, 1), int) < 6)
    check("padding", padded[:, :6], logits, 1e-11)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(masked), strict=True):
        check("statistics", a, b, 1e-11)
    segments = jnp.asarray([[0] * 6 + [1] * 3] * 2)
    (packed, _), _ = apply(ids, segment_ids=segments)
    check("first segment", packed[:, :6], logits, 1e-11)
    other = ids.at[:, :6].set((ids[:, :6] + 1) % 29)
    (changed, _), _ = apply(other, segment_ids=segments)
    check("second segment", changed[:, 6:], packed[:, 6:], 1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 8}, "even"),
        ({"num_kv_heads": 3}, "must divide num_heads"),
        ({"num_dense_layers": 4}, "must leave a layer"),
        ({"num_dense_layers": 1}, "needs dense_intermediate_size"),
        ({"capacity_factor": -1.0}, "must not be negative"),
        ({"balance_form": "sum"}, "layer_sum"),
        ({"router_cell": "tree"}, "none, rnn, gru, lstm"),
    ],
)
def test_wrong_configs_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_both_ways(golden, check, name):
    """Bitwise, with the published configuration, which comes back as well."""
    file = dict(np.load(golden / "rmoe" / f"{name}.npz"))
    public = json.loads(str(file["__meta__"]))
    tensors = {k.removeprefix("param."): v for k, v in file.items() if k.startswith("param.")}
    module, params = checkpoints.from_torch("rmoe_llama", tensors, public)
    logits, _ = module.apply({"params": params}, jnp.asarray(file["input_ids"]))
    check("logits", logits, file["logits"], 1e-11)
    back = checkpoints.to_torch("rmoe_llama", params, public)
    assert back.keys() == tensors.keys()
    assert all(
        np.array_equal(back[k], v) and back[k].flags.c_contiguous for k, v in tensors.items()
    )
    again = interop.llama_config(interop.llama_public(module.config), "float64")
    assert again == dataclasses.replace(module.config, num_kv_heads=4)
    missing = "model.layers.2.block_sparse_moe.experts.5.w2.weight"
    fewer = {k: v for k, v in tensors.items() if k != missing}
    with pytest.raises(ValueError, match=f"tensor missing: {missing}"):
        checkpoints.from_torch("rmoe_llama", fewer, public)
    with pytest.raises(ValueError, match=f"tensor {missing} has shape"):
        checkpoints.from_torch("rmoe_llama", {**tensors, missing: np.ones((20, 24))}, public)
    with pytest.raises(ValueError, match="moe_router_type='tree'"):
        checkpoints.from_torch("rmoe_llama", tensors, {**public, "moe_router_type": "tree"})
    with pytest.raises(ValueError, match="moe_num_layers=3"):
        checkpoints.from_torch("rmoe_llama", tensors, {**public, "moe_num_layers": 3})
    other = dataclasses.replace(module.config, router_residual=0.5)
    with pytest.raises(ValueError, match="router_residual"):
        interop.llama_public(other)
    other = dataclasses.replace(module.config, num_kv_heads=0, mixer="lightnet")
    with pytest.raises(ValueError, match=r"the published model has model\.mixer='attention'"):
        interop.llama_public(other)
