"""The small models' language model against the published one, over two blocks with a cache."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import interop as checkpoints, layout, params as params_lib
from scanax.models.rmoe import (
    ROUTING,
    STATISTICS,
    RMoESeqConfig,
    RMoESeqLM,
    empty_seq_cache,
    interop,
    losses,
)

CONFIG = RMoESeqConfig(
    vocab_size=19,
    hidden_size=16,
    num_hidden_layers=3,
    num_heads=2,
    intermediate_size=20,
    num_experts=16,
    experts_per_token=2,
    router_cell="gru",
    router_memory="full",
    router_projector=True,
    router_dim=8,
    router_head="linear",
    router_head_dim=8,
    router_residual=0.0,
    router_residual_detach=False,
    router_residual_cumulative=False,
    router_bias=True,
    router_normalise=True,
    capacity_factor=0.0,
    capacity_policy="score",
    balance_form="layer_sum",
    balance_coefficient=0.01,
    z_coefficient=0.0,
    router_balance_rate=0.0,
    norm_eps=1e-5,
    dtype="float64",
    param_dtype="float64",
    remat=False,
    implementation="block",
    span=8,
    dropout=0.0,
)
CONFIGS = {"seq_rmoe": CONFIG, "seq_smoe": dataclasses.replace(CONFIG, router_cell="none")}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def published(c: RMoESeqConfig, file, prefix: str):
    """A published checkpoint's tensors (or gradients) as our parameters."""
    tensors = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
    return layout.load(interop.seq_table(c), tensors)


def loss_of(c: RMoESeqConfig, ids, labels):
    model = RMoESeqLM(c)

    def loss(params, cache):
        (logits, cache), found = model.apply(
            {"params": params}, ids, cache=cache, mutable=[STATISTICS, ROUTING]
        )
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=2))
        (sums,) = found[STATISTICS]["layers"]["moe"]["sums"]
        aux = losses.balance(sums, c.balance_form, c.experts_per_token)
        value = nll + c.balance_coefficient * aux
        return value, (log_p, nll, aux, cache, found[ROUTING]["layers"])

    return loss


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("name", CONFIGS)
def test_published_model(golden, check, jit, name, remat):
    file = dict(np.load(golden / "rmoe" / f"{name}.npz"))
    c = dataclasses.replace(CONFIGS[name], remat=remat)
    params = published(c, file, "param.")
    own = params_lib.initialise(RMoESeqLM(c), jax.random.key(0), jnp.asarray(file["blk0.X"]))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    cache = empty_seq_cache(c, 2)
    for number in (0, 1):
        block = {k.removeprefix(f"blk{number}."): v for k, v in file.items()}
        check("cache", cache.swapaxes(0, 1), block["cache_in"], 1e-11)
        x, y = jnp.asarray(block["X"]), jnp.asarray(block["Y"])
        run = jit(jax.value_and_grad(loss_of(c, x, y), has_aux=True))
        (value, (log_p, nll, aux, cache, routing)), gradients = run(params, cache)
        check("log p", log_p, block["logprobs"], 1e-11)
        for what, got in (("loss", value), ("nll", nll), ("balance_sum", aux)):
            check(what, got, block[what], 1e-11)
        check("router", routing["moe"]["logits"][0], block["router_logits"], 1e-11)
        check("experts", routing["output"][0], block["smoe_out"], 1e-11)
        np.testing.assert_array_equal(routing["moe"]["index"][0], block["topk_idx"])
        if number == 0:
            wanted = published(c, file, "blk0.grad.")
            for (path, got), want in zip(
                jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
            ):
                check(jax.tree_util.keystr(path), got, want, 1e-10)
    check("cache", cache.swapaxes(0, 1), file["cache_out"], 1e-11)


@pytest.mark.parametrize("saved", [True, False])
def test_layers_are_recomputed_without_choosing_again(saved, monkeypatch):
    """In the whole gradient experts are chosen once, and places given: in the forward (twice if
    nothing is saved)."""
    c = dataclasses.replace(CONFIG, remat=True, capacity_factor=1.0, implementation="capacity")
    if not saved:
        policies = types.SimpleNamespace(save_only_these_names=lambda *names: None)
        monkeypatch.setattr(jax, "checkpoint_policies", policies)
    ids = jnp.zeros((1, 3), jnp.int32)
    params = params_lib.initialise(RMoESeqLM(c), jax.random.key(0), ids)
    loss = lambda params: loss_of(c, ids, ids)(params, empty_seq_cache(c, 1))[0]
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert program.count("top_k[") == (1 if saved else 2)
    assert program.count("sort[") == (1 if saved else 2)


def test_cut_anywhere_the_logits_are_the_same(jit, check):
    """Blocks of any length, shorter and longer than the span, down to single tokens."""
    model = RMoESeqLM(CONFIG)
    ids = jax.random.randint(jax.random.key(0), (2, 25), 0, 19)
    params = params_lib.initialise(model, jax.random.key(1), ids[:, :2])
    apply = jit(lambda ids, cache: model.apply({"params": params}, ids, cache=cache))
    logits, last = apply(ids, empty_seq_cache(CONFIG, 2))
    cache, found = empty_seq_cache(CONFIG, 2), []
    for start, end in ((0, 11), (11, 14), *((i, i + 1) for i in range(14, 25))):
        part, cache = apply(ids[:, start:end], cache)
        found.append(part)
    check("logits", jnp.concatenate(found, axis=1), logits, 1e-11)
    check("cache", cache, last, 1e-11)


def test_padding_before_a_text_changes_nothing(jit, check):
    """Prompts of several lengths, padded on the left and read in pieces, as generation does."""
    model = RMoESeqLM(CONFIG)
    ids = jax.random.randint(jax.random.key(0), (2, 12), 0, 19)
    params = params_lib.initialise(model, jax.random.key(1), ids[:, :2])
    apply = jit(
        lambda ids, mask, cache: model.apply({"params": params}, ids, mask=mask, cache=cache)
    )
    mask = jnp.arange(12)[None] >= jnp.asarray([0, 7])[:, None]
    cache, found = empty_seq_cache(CONFIG, 2), []
    for part in (slice(0, 6), slice(6, 12)):
        logits, cache = apply(ids[:, part], mask[:, part], cache)
        found.append(logits)
    found = jnp.concatenate(found, axis=1)
    for row, start in ((0, 0), (1, 7)):
        alone, last = model.apply({"params": params}, ids[row : row + 1, start:])
        check("logits", found[row, start:], alone[0], 1e-11)
        check("cache", cache[row], last[0], 1e-11)


def test_a_token_sees_the_span_before_it_and_not_itself():
    """One layer: what a token is made of, by its logits' derivatives (itself by the residual)."""
    c = dataclasses.replace(CONFIG, num_hidden_layers=1, span=3)
    model = RMoESeqLM(c)
    ids = jax.random.randint(jax.random.key(0), (1, 9), 0, 19)
    params = params_lib.initialise(model, jax.random.key(1), ids)
    embedded = params["embeddings"]

    def output(scale_S):
        changed = {**params, "embeddings": embedded * scale_S[:, None]}
        return model.apply({"params": changed}, jnp.arange(9)[None])[0][0]

    seen = np.asarray(jax.jacobian(output)(jnp.ones(19)))[..., :9]
    seen = np.abs(seen).sum(axis=1) > 1e-12
    places = np.arange(9)
    ahead = places[:, None] - places[None]
    np.testing.assert_array_equal(seen, (ahead >= 0) & (ahead <= 3))


def test_dropout_belongs_to_the_row():
    c = dataclasses.replace(CONFIG, dropout=0.5)
    model = RMoESeqLM(c)
    ids = jax.random.randint(jax.random.key(0), (3, 6), 0, 19)
    params = params_lib.initialise(model, jax.random.key(1), ids)
    apply = lambda ids, keys: np.asarray(model.apply({"params": params}, ids, keys=keys)[0])
    keys = jax.random.split(jax.random.key(2), 3)
    noisy, other = apply(ids, keys), apply(ids, jax.random.split(jax.random.key(3), 3))
    np.testing.assert_allclose(apply(ids[1:], keys[1:]), noisy[1:], atol=1e-10)
    plain = apply(ids, None)
    assert np.abs(noisy - plain).max() > 1e-3 and np.abs(noisy - other).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"span": 0}, "span must be positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_heads": 3}, "must divide hidden_size"),
    ],
)
def test_wrong_configs_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_both_ways(golden, check, name):
    file = dict(np.load(golden / "rmoe" / f"{name}.npz"))
    public = json.loads(str(file["__meta__"]))
    tensors = {k.removeprefix("param."): v for k, v in file.items() if k.startswith("param.")}
    module, params = checkpoints.from_torch("rmoe_seq", tensors, public)
    logits, _ = module.apply({"params": params}, jnp.asarray(file["blk0.X"]))
    check("logits", jax.nn.log_softmax(logits), file["blk0.logprobs"], 1e-11)
    back = checkpoints.to_torch("rmoe_seq", params, public)
    assert back.keys() == tensors.keys()
    assert all(
        np.array_equal(back[k], v) and back[k].flags.c_contiguous for k, v in tensors.items()
    )
    assert interop.seq_config(interop.seq_public(module.config), "float64") == module.config
    with pytest.raises(ValueError, match="config lacks span"):
        checkpoints.from_torch(
            "rmoe_seq", tensors, {k: v for k, v in public.items() if k != "span"}
        )
    with pytest.raises(ValueError, match="kind='xmoe'"):
        checkpoints.from_torch("rmoe_seq", tensors, {**public, "kind": "xmoe"})


# millions of parameters, as the paper prints them; hidden size, layers, changes
COUNTS = {
    "SMoE, medium": ("36.08", 352, 8, {"router_cell": "none"}),
    "RMoE, medium": ("36.51", 352, 8, {}),
    "RNN, medium": ("36.44", 352, 8, {"router_cell": "rnn"}),
    "LSTM, medium": ("36.54", 352, 8, {"router_cell": "lstm"}),
    "S-proj, medium": ("36.23", 352, 8, {"router_projector": False}),
    "MLP, medium": (
        "36.79",
        352,
        8,
        {"router_cell": "none", "router_head": "mlp", "router_head_dim": 256},
    ),
    "Hyper, medium": (
        "48.41",
        352,
        8,
        {"router_cell": "none", "router_head": "hyper", "router_head_dim": 256},
    ),
    "SMoE, small": ("15.32", 264, 6, {"router_cell": "none"}),
    "RMoE, small": ("15.61", 264, 6, {}),
    "MLP, small": (
        "15.73",
        264,
        6,
        {"router_cell": "none", "router_head": "mlp", "router_head_dim": 256},
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name):
    printed, hidden, layers, changes = COUNTS[name]
    c = dataclasses.replace(
        CONFIG,
        **{"vocab_size": 205, "hidden_size": hidden, "num_hidden_layers": layers},
        **{"num_heads": 8, "intermediate_size": hidden, "router_dim": 128, "span": 2048},
        **changes,
    )
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(RMoESeqLM(c).init, jax.random.key(0), ids)["params"]
    # Public code of HyperMoE keeps an ordinary router that it does not use, and counts it.
    unused = layers * (hidden * 16 + 16) if c.router_head == "hyper" else 0
    assert f"{(params_lib.count(shapes) + unused) / 1e6:.2f}" == printed
