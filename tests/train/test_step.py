"""The pure training step: accumulation, meshes, the finite guard, averages, compilation."""

import dataclasses
import functools
import logging
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepping import train

from scanax.configs import base, lightnet_lm_embedded, lm_embedded, radd_lm_embedded
from scanax.train import mesh as mesh_lib, state as state_lib, tasks
from scanax.train.compilations import CompilationWatch
from scanax.train.config import Config, ConfigError, from_dict
from scanax.train.loop import place, put_local
from scanax.train.optimizer import make_schedule
from scanax.train.step import jit_step, make_step
from scanax.train.task import Aux, Task


def config(**changes) -> Config:
    values = base.get_config("word_problem")
    small = {
        "num_steps": 20,
        "batch_size": 8,
        "mesh.data": 1,
        "model.vocab_size": 16,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.head_dim": 4,
        "model.intermediate_size": 16,
        "data.length": 8,
        "data.eval_lengths": (8,),
        "evaluation.batch_size": 8,
        "optimizer.clip_norm": 1.0,
        "optimizer.ema_decay": 0.9,
    }
    values.update_from_flattened_dict({**small, **changes})
    return from_dict(values.to_dict())


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def baseline():
    return train(config())


VARIANTS = {
    "two microbatches": {"microbatches": 2},
    "four microbatches": {"microbatches": 4},
    "data 4": {"mesh.data": 4},
    "fsdp 4": {"mesh.fsdp": 4},
    "data 2, tensor 2, two microbatches": {"mesh.data": 2, "mesh.tensor": 2, "microbatches": 2},
    "fsdp 2, tensor 2": {"mesh.fsdp": 2, "mesh.tensor": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_same_losses_on_any_mesh_and_accumulation(baseline, changes):
    state, losses = train(config(**changes))
    np.testing.assert_allclose(losses, baseline[1], rtol=2e-6)
    chex.assert_trees_all_close(
        jax.device_get(state.params), jax.device_get(baseline[0].params), rtol=1e-3, atol=2e-6
    )


def test_bitwise_on_the_same_mesh(baseline):
    state, losses = train(config())
    assert losses == baseline[1]
    chex.assert_trees_all_equal(state.params, baseline[0].params)


def program(c: Config) -> str:
    """The optimised program of a training step."""
    task = tasks.build(c)
    mesh, shardings = place(task, c)
    shapes = state_lib.shapes(task, c)
    as_args = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    state = jax.tree.map(as_args, shapes, shardings)
    sharding = mesh_lib.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: as_args(x, sharding), dict(task.batch_spec))
    text = jit_step(make_step(task, c, mesh), shardings, mesh).lower(state, batch, {}).compile()
    return text.as_text()


def test_microbatches_stay_on_their_devices():
    """Cutting a sharded batch into microbatches moves no example between devices."""
    text = program(config(**{"mesh.data": 4, "microbatches": 2}))
    # Per device: 8 examples / 4 devices / 2 microbatches = 1 row of 9 tokens, never more.
    assert re.search(r"s32\[1,9\]", text)
    assert not re.search(r"s32\[[248],9\]\S* all-gather", text)
    assert not re.search(r"all-to-all", text)


@pytest.mark.parametrize(
    "family", [lm_embedded, lightnet_lm_embedded, radd_lm_embedded], ids=lambda x: x.__name__
)
def test_parameters_come_to_the_tokens(family):
    """Divided by fsdp, the weights of products are gathered; tokens stay where they are."""
    values = family.get_config()
    changes = {"mesh.data": 1, "mesh.fsdp": 4, "batch_size": 8, "data.length": 24}
    values.update_from_flattened_dict({**changes, "model.num_hidden_layers": 1})
    text = program(from_dict(values.to_dict()))
    gathered = re.findall(r"\w\[([\d,]*)\]\S* all-gather\(", text)
    assert "128,128" in gathered
    assert not [shape for shape in gathered if re.match(r"(8,24|192),(?!1$)", shape)]
    # What tokens read of the divided embedding, and the gradient of that.
    assert len(re.findall(r" all-to-all\(", text)) <= 2


def test_examples_have_their_own_noise():
    """The loss sees the same key for an example, however the batch is cut."""

    def seen(microbatches: int):
        c = config(microbatches=microbatches)
        task = tasks.build(c)

        def loss(params, extra, batch, keys):
            noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
            value = jnp.sum(noise) * jnp.sum(params["norm"]["scale"])
            weight = jnp.asarray(len(noise), jnp.float32)
            return value, Aux(weight, extra, {"square": (jnp.sum(noise**2), weight)})

        return train(c, 3, dataclasses.replace(task, loss=loss))[1]

    first = seen(1)
    np.testing.assert_allclose(seen(4), first, rtol=1e-5)
    assert len(set(first)) == 3  # new noise every step


def with_loss_factor(c: Config, factor) -> Task:
    """The task with its loss multiplied by factor(batch)."""
    task = tasks.build(c)

    def loss(params, extra, batch, keys):
        value, aux = task.loss(params, extra, batch, keys)
        return value * factor(batch), aux

    return dataclasses.replace(task, loss=loss)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_batch_changes_nothing_but_the_counters(poison):
    c = config()
    task = with_loss_factor(c, lambda batch: jnp.where(batch["ids"][0, 0] < 0, poison, 1.0))
    mesh, shardings = place(task, c)
    state = jax.jit(lambda: state_lib.create(task, c), out_shardings=shardings)()
    step = jit_step(make_step(task, c, mesh), shardings, mesh)
    data, sharding = task.train_data(0, 1), mesh_lib.batch_sharding(mesh)
    state, _ = step(state, put_local(next(data), sharding), {})
    before = jax.device_get(jax.tree.map(jnp.copy, (state.params, state.ema, state.opt_state)))
    bad = {name: np.copy(x) for name, x in next(data).items()}
    bad["ids"][0, 0] = -1
    state, metrics = step(state, put_local(bad, sharding), {})
    chex.assert_trees_all_equal(before, jax.device_get((state.params, state.ema, state.opt_state)))
    assert (int(state.step), int(state.skipped), int(state.bad_steps)) == (2, 1, 1)
    assert not np.isfinite(metrics["loss"])
    state, metrics = step(state, put_local(next(data), sharding), {})
    assert (int(state.skipped), int(state.bad_steps)) == (1, 0)
    assert np.isfinite(metrics["loss"]) and bool(metrics["finite_gradients"].all())


def test_average_is_a_moving_average():
    state, _ = train(config(), steps=1)
    start = state_lib.create(tasks.build(config()), config()).params
    rate = 2 / 11  # warm-up of the average: (1 + n) / (10 + n), n = 1
    expected = jax.tree.map(lambda a, b: rate * a + (1 - rate) * b, start, state.params)
    chex.assert_trees_all_close(state.ema, expected, atol=1e-6)


def test_second_compilation_is_announced(caplog):
    watch = CompilationWatch(jax.jit(lambda batch: batch["ids"] + 1), "the step")
    with caplog.at_level(logging.WARNING, logger="scanax"):
        watch({"ids": jnp.zeros((2, 3), jnp.int32)})
        watch({"ids": jnp.ones((2, 3), jnp.int32)})
        assert not caplog.records and watch.count == 1
        watch({"ids": jnp.zeros((2, 5), jnp.int32)})
    assert watch.count == 2
    assert "compiled again" in caplog.text
    assert "int32[2, 3]" in caplog.text and "int32[2, 5]" in caplog.text


def rate(step: int, **changes) -> float:
    c = config(num_steps=100, **{f"optimizer.{name}": value for name, value in changes.items()})
    return float(make_schedule(c.optimizer, 100)(jnp.asarray(step)))


def test_schedules():
    peak = {"learning_rate": 2.0}
    assert rate(0, schedule="constant", **peak) == 2
    assert rate(0, schedule="constant", warmup_steps=10, **peak) == pytest.approx(0.2)
    assert rate(9, schedule="cosine", warmup_steps=10, **peak) == pytest.approx(2)
    assert rate(55, schedule="cosine", warmup_steps=10, **peak) == pytest.approx(1)
    assert rate(100, schedule="cosine", final_fraction=0.1, **peak) == pytest.approx(0.2)
    wsd = {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 20, **peak}
    assert [rate(s, **wsd) for s in (4, 50, 79, 90, 100)] == pytest.approx([1, 2, 2, 1, 0])


def test_weight_decay_spares_vectors():
    changes = {"optimizer.weight_decay": 0.5, "optimizer.learning_rate": 0.1}
    task = tasks.build(config(**changes))
    still = dataclasses.replace(
        task, loss=lambda *args: (task.loss(*args)[0] * 0, task.loss(*args)[1])
    )
    c = config(**changes, **{"optimizer.schedule": "constant"})
    state, _ = train(c, steps=1, task=still)
    start = state_lib.create(task, c).params
    chex.assert_trees_all_close(
        state.params,
        jax.tree.map(lambda p: p * (0.95 if p.ndim > 1 else 1.0), start),
        rtol=1e-6,
    )


def test_frozen_parameters_stay_from_their_step_on():
    changes = {"optimizer.freeze": ("lm_head", "layers_0/attn"), "optimizer.weight_decay": 0.5}
    start = train(config(**changes), 0)[0].params
    ends = {step: train(config(**changes, **{"optimizer.freeze_from": step}), 3) for step in (0, 3)}
    for path, before in jax.tree.leaves_with_path(start):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        named = name.startswith(("lm_head", "layers_0/attn"))
        for step, (state, _) in ends.items():
            after = functools.reduce(lambda tree, key: tree[key.key], path, state.params)
            assert np.array_equal(before, after) == (named and step == 0), (name, step)


@pytest.mark.parametrize(
    "pattern, message", [("lm_haed", "no parameter has"), ("(", "no regular expression")]
)
def test_wrong_names_to_freeze(pattern, message):
    c = config(**{"optimizer.freeze": (pattern,)})
    with pytest.raises(ConfigError, match=message):
        place(tasks.build(c), c)


def test_unknown_logical_axis_is_an_error():
    c = config()
    task = tasks.build(c)
    axes = jax.tree.map(lambda _: ("nobody", "knows"), state_lib.shapes(task, c).params)
    with pytest.raises(ValueError, match="not in LOGICAL_AXES"):
        place(dataclasses.replace(task, param_axes=axes), c)
