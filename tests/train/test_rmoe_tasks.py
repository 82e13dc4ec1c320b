"""RMoE on texts: the loss with its penalties, padding, weight decay, sampling, and mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import base
from scanax.models.generation import Sampling
from scanax.models.rmoe import BALANCE, STATISTICS, RMoEConfig, RMoELM, losses
from scanax.train import loop, mesh as mesh_lib, state as state_lib, tasks
from scanax.train.config import ConfigError, build as build_part, from_dict
from scanax.train.data.pipeline import IGNORE
from scanax.train.optimizer import make_optimizer
from scanax.train.step import jit_step, make_step

MODEL = {
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.num_hidden_layers": 3,
    "model.intermediate_size": 12,
    "model.router_dim": 8,
    "model.initializer_range": 0.3,
    "mesh.data": 1,
}
TEXT = {"batch_size": 4, "data.source": "files", "data.path": "*.txt", "data.length": 32}
TEXT |= {"data.eval_fraction": 0.3, "evaluation.batch_size": 5, "evaluation.samples": 0}


@pytest.fixture
def text(tmp_path, monkeypatch):
    for i in range(24):
        (tmp_path / f"{i:02d}.txt").write_text(f"number {i} " + "ab" * (i % 5))
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))


def values(**changes):
    config = base.get_config("language_model", "rmoe")
    config.update_from_flattened_dict({**MODEL, **TEXT, **changes})
    return from_dict(config.to_dict())


CASES = {"blocks": "attention", "packed": "attention", "padded": "attention"}
CASES |= {"packed, recurrent": "delta_product"}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_its_penalties(text, case):
    layout = case.partition(",")[0]
    changes = {"model.balance_coefficient": 0.5, "model.z_coefficient": 0.25}
    config = values(**{"data.layout": layout, "model.mixer": CASES[case]}, **changes)
    task = tasks.build(config)
    params, extra = task.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(task.train_data(0, 1)))
    keys = jax.random.split(jax.random.key(1), len(batch["ids"]))
    value, aux = jax.jit(task.loss)(params, extra, batch, keys)
    model = build_part(RMoEConfig, {**config.model, "vocab_size": 257}, "model")
    real = batch["segments"] > 0
    assert real.all() == (layout == "blocks")  # packed rows end in padding here
    options = {} if layout == "blocks" else {"mask": real, "segment_ids": batch["segments"]}
    (logits, _), found = RMoELM(model).apply(
        {"params": params}, batch["ids"], **options, mutable=[STATISTICS]
    )
    (sums,) = found[STATISTICS]["layers"]["moe"]["sums"]
    np.testing.assert_allclose(sums.tokens, real.sum())
    np.testing.assert_allclose(sums.chosen.sum(axis=1), 2 * real.sum())
    labels = batch["labels"]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], 2)
    ce = -jnp.mean(log_p[..., 0], where=labels != IGNORE)
    balance, z = losses.balance(sums, "pooled", 2), losses.z_loss(sums)
    np.testing.assert_allclose(value / aux.weight, ce + 0.5 * balance + 0.25 * z, rtol=1e-5)
    for name, want in (("balance_loss", balance), ("z_loss", z)):
        got, weight = aux.metrics[name]
        np.testing.assert_allclose(got / weight, want, rtol=1e-5)
    evaluated = jax.jit(task.evaluate)(params, extra, batch, keys)
    np.testing.assert_allclose(evaluated["loss"][0] / evaluated["loss"][1], ce, rtol=1e-5)


def test_every_router_trains(text):
    """All parameters of the router get a gradient, but for those that are frozen."""
    for changes, frozen in (
        ({}, ()),
        ({"model.router_cell": "lstm", "model.router_residual": 0.5}, ()),
        ({"model.router_cell": "none", "model.router_head": "xmoe"}, ()),
        ({"model.router_cell": "none", "model.router_head": "random"}, ("head",)),
        ({"model.router_cell": "none", "model.router_head": "hyper"}, ("hyper",)),
        ({"model.router_memory": "none", "model.remat": True}, ("router_hidden",)),
    ):
        task = tasks.build(values(**changes))
        params, extra = task.init(jax.random.key(0))
        batch = jax.tree.map(jnp.asarray, next(task.train_data(0, 1)))
        keys = jax.random.split(jax.random.key(1), len(batch["ids"]))
        gradient = jax.jit(jax.grad(lambda p: task.loss(p, extra, batch, keys)[0]))(params)  # noqa: B023
        for path, value in jax.tree.leaves_with_path(gradient):
            name = jax.tree_util.keystr(path)
            if "router" in name and not ("bias" in name and "hidden" in name):
                still = any(part in name for part in frozen)
                assert np.any(np.asarray(value)) != still, (changes, name)


def test_preferences_follow_the_load(text):
    """Once an update, from the counts of all its microbatches; and they decide in evaluation."""
    changes = {"model.router_balance_rate": 0.05, "model.balance_coefficient": 0.0}
    found = {}
    for count in (1, 2):
        task = tasks.build(values(**changes, microbatches=count))
        params, extra = task.init(jax.random.key(0))
        batch = jax.tree.map(jnp.asarray, next(task.train_data(0, 1)))
        keys = jax.random.split(jax.random.key(1), 4)
        chosen = 0
        for i in range(count):
            part = jax.tree.map(lambda x: x[i::count], batch)  # noqa: B023
            _, aux = jax.jit(task.loss)(params, extra, part, keys[i::count])
            extra = aux.extra
        layer = extra[BALANCE]["layers"]["moe"]
        assert not layer["bias"].any()
        chosen = np.asarray(layer["chosen"])
        assert chosen.shape == (3, 8) and (chosen.sum(axis=1) == 4 * 32 * 2).all()
        extra = task.settle(extra)
        layer = extra[BALANCE]["layers"]["moe"]
        np.testing.assert_allclose(layer["bias"], 0.05 * np.sign(32 - chosen), rtol=1e-6)
        assert not layer["chosen"].any()
        found[count] = layer["bias"]
    np.testing.assert_array_equal(found[1], found[2])
    loss = jax.jit(task.evaluate)(params, extra, batch, keys)["loss"][0]
    nothing = jax.tree.map(jnp.zeros_like, extra)
    assert loss != jax.jit(task.evaluate)(params, nothing, batch, keys)["loss"][0]
    assert not tasks.build(values()).init(jax.random.key(0))[1]


def run(config, steps: int):
    """The state before, and after each of some steps."""
    task = tasks.build(config)
    mesh, shardings = loop.place(task, config)
    state = jax.jit(lambda: state_lib.create(task, config), out_shardings=shardings)()
    step = jit_step(make_step(task, config, mesh), shardings, mesh)
    data, found = task.train_data(0, 1), [jax.device_get(state.params)]
    with jax.numpy_dtype_promotion("standard"):  # inside of optax
        for _ in range(steps):
            batch = loop.put_local(next(data), mesh_lib.batch_sharding(mesh))
            state, _ = step(state, batch, {})
            found.append(jax.device_get(state.params))
    return found


def moved(before, after) -> dict[str, bool]:
    flat = lambda tree: jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): not np.array_equal(a, b)
        for (path, a), (_, b) in zip(flat(before), flat(after), strict=True)
    }


def test_a_random_router_stays_as_it_is_under_weight_decay(text):
    changes = {"model.router_cell": "none", "model.router_head": "random"}
    before, after = run(values(**changes, **{"optimizer.weight_decay": 0.5}), 1)
    assert {n for n, change in moved(before, after).items() if not change} == {
        "layers/moe/router_head"
    }


def test_a_router_that_is_frozen_in_the_middle(text):
    """Two stages, as StableMoE trains: from a step on, the router stays and all else goes on."""
    changes = {"model.router_cell": "none", "model.router_head": "cosine_code"}
    changes |= {"optimizer.freeze": ("/router_",), "optimizer.freeze_from": 1}
    start, first, second = run(values(**changes), 2)
    assert all(moved(start, first).values())
    for name, change in moved(first, second).items():
        assert change != ("router" in name), name


def test_weight_decay_spares_vectors_of_stacked_layers(text):
    config = values(**{"optimizer.weight_decay": 0.5, "optimizer.clip_norm": 0.0})
    task = tasks.build(config)
    params, _ = task.init(jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, task.param_axes)
    nothing = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):  # inside of optax
        update, _ = optimizer.update(nothing, optimizer.init(params), params)
    for path, value in jax.tree.leaves_with_path(update):
        name = jax.tree_util.keystr(path)
        vector = "scale" in name or "bias" in name
        assert np.any(np.asarray(value)) != vector, name


def test_mistakes(text):
    wrong = base.get_config("word_problem").to_dict()
    wrong["family"], wrong["model"] = (
        "rmoe",
        base.get_config("language_model", "rmoe").model.to_dict(),
    )
    with pytest.raises(ConfigError, match="keeps the experts busy"):
        tasks.build(from_dict(wrong))
    for changes, message in (
        ({"model.router_cell": "tree"}, "none, rnn, gru, lstm"),
        ({"model.experts_per_token": 9}, "between 1 and num_experts"),
        ({"model.balance_form": "all"}, "pooled, layer_mean, layer_sum"),
        ({"model.vocab_size": 100}, "smaller than the 257 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.build(values(**changes))


def test_sampling(text):
    """From the beginning of a document, and behind prompts of two lengths, each as if alone."""
    task = tasks.build(values())
    params, extra = task.init(jax.random.key(0))
    rows = task.sample(params, extra, jax.random.key(1), 2)
    assert rows.shape == (2, 32) and (rows >= 0).all() and (rows < 257).all()
    assert isinstance(task.render(rows), str) and not np.array_equal(*rows)
    complete = lambda prompts: task.complete(
        params,
        extra,
        jax.random.key(0),
        prompts,
        sampling=Sampling(temperature=0.0),
        max_tokens=5,
        stop_at_end=False,
    )
    found = complete(["number", "ab"])
    assert found.prompt_tokens == 8 and [len(t) for t in found.tokens] == [5, 5]
    for prompt, tokens in zip(["number", "ab"], found.tokens, strict=True):
        np.testing.assert_array_equal(complete([prompt]).tokens[0], tokens)


def test_analyses_of_a_state_need_one(text, tmp_path):
    assert "long_context" not in tasks.build(values()).analyses
    task = tasks.build(values(**{"model.mixer": "delta_product"}))
    params, extra = task.init(jax.random.key(0))
    found = task.analyses["long_context"](params, extra, tmp_path, 1, 64)
    assert "32 to      64" in found
    rank = json.loads((tmp_path / "figures.json").read_text())["rank"]
    assert np.shape(rank) == (3, 2)


@pytest.mark.parametrize("mixer", ["delta_product", "lightnet"])
def test_every_parameter_of_a_mixer_trains(text, mixer):
    task = tasks.build(values(**{"model.mixer": mixer, "model.remat": mixer == "lightnet"}))
    params, extra = task.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(task.train_data(0, 1)))
    keys = jax.random.split(jax.random.key(1), len(batch["ids"]))
    gradient = jax.jit(jax.grad(lambda p: task.loss(p, extra, batch, keys)[0]))(params)
    mixing = [gradient["layers"]["attn"], *([gradient["tpe"]] if mixer == "lightnet" else [])]
    for path, value in jax.tree.leaves_with_path(mixing):
        assert np.any(np.asarray(value)), jax.tree_util.keystr(path)
