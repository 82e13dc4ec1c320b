"""Text that runs on from batch to batch: models carry their cache, in training and evaluation."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import base
from scanax.models.rmoe import RMoESeqConfig, RMoESeqLM
from scanax.train import loop, mesh as mesh_lib, state as state_lib, tasks
from scanax.train.config import ConfigError, build as build_part, from_dict
from scanax.train.data.pipeline import DataError
from scanax.train.loop import place, put_local
from scanax.train.step import jit_step, make_step

SEQ = {
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.num_hidden_layers": 2,
    "model.intermediate_size": 12,
    "model.router_dim": 8,
    "model.span": 12,
    "model.balance_coefficient": 0.0,  # of a product of means: not the same in microbatches
}
DELTA = {
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.head_dim": 4,
    "model.num_hidden_layers": 1,
    "model.intermediate_size": 16,
}
LIGHTNET = {
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.num_hidden_layers": 1,
    "model.gate_low_rank_dim": 4,
    "model.intermediate_size": 16,
}
MODELS = {"rmoe_seq": SEQ, "delta_product": DELTA, "lightnet": LIGHTNET}
STREAMS = {
    "batch_size": 4,
    "mesh.data": 1,
    "data.layout": "streams",
    "data.length": 8,
    "data.source": "files",
    "data.path": "a.txt",
    "data.holdout": "tail",
    "data.eval_fraction": 0.4,
    "data.tokenizer": "char",
    "evaluation.batch_size": 2,
    "evaluation.batches": 0,
}


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    letters = np.random.default_rng(0).choice(list("abcdefgh"), 200)
    (tmp_path / "a.txt").write_text("".join(letters))
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))


pytestmark = pytest.mark.usefixtures("standard_promotion")


def config(family: str = "rmoe_seq", **changes):
    values = base.get_config("language_model", family)
    values.update_from_flattened_dict({**STREAMS, **MODELS[family], **changes})
    return from_dict(values.to_dict())


def train(c, steps: int):
    """The losses, the batches and the last state of a few steps."""
    task = tasks.build(c)
    mesh, shardings = place(task, c)
    state = jax.jit(lambda: state_lib.create(task, c), out_shardings=shardings)()
    step = jit_step(make_step(task, c, mesh), shardings, mesh)
    data, losses, batches = task.train_data(0, 1), [], []
    for _ in range(steps):
        batches.append(next(data))
        state, metrics = step(state, put_local(batches[-1], mesh_lib.batch_sharding(mesh)), {})
        losses.append(float(metrics["loss"]))
    return losses, batches, state


def test_rows_run_on_and_begin_anew():
    """With a rate of 0, losses are those of the model on each stream from its beginning."""
    c = config(**{"optimizer.learning_rate": 0.0})
    losses, batches, state = train(c, 5)
    model = build_part(RMoESeqConfig, {**c.model, "vocab_size": 10}, "model")
    began = [bool(batch["reset"].all()) for batch in batches]
    assert began == [True, False, True, False, True]  # 120 tokens: 2 blocks of 8 in each of 4
    for first in (0, 2):
        ids, labels = (
            np.concatenate([b[n] for b in batches[first : first + 2]], axis=1)
            for n in ("ids", "labels")
        )
        logits, _ = RMoESeqLM(model).apply({"params": state.params}, jnp.asarray(ids))
        log_p = np.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], 2)[..., 0]
        want = [-log_p[:, :8].mean(), -log_p[:, 8:].mean()]
        np.testing.assert_allclose(losses[first : first + 2], want, rtol=1e-5)


MESHES = {
    "rmoe_seq": ({"model.dropout": 0.1}, {"mesh.fsdp": 2}, {"mesh.expert": 2}),
    "delta_product": ({}, {"mesh.fsdp": 2}),
    "lightnet": ({}, {"mesh.fsdp": 2}),
}


@pytest.mark.parametrize("family", MESHES)
def test_same_on_any_mesh_and_accumulation(family):
    """Each row keeps its own cache and its own noise, wherever it is computed."""
    common, *meshes = MESHES[family]
    want = train(config(family, **common), 4)
    for changes in ({"microbatches": 2}, *meshes):
        losses, _, state = train(config(family, **common, **changes), 4)
        np.testing.assert_allclose(losses, want[0], rtol=2e-6)
        got, rows = (jax.device_get(s.extra["rows"]) for s in (state, want[2]))
        chex.assert_trees_all_close(got, rows, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("rmoe_seq", {"model.dropout": 0.1, "model.router_balance_rate": 0.05}),
        ("delta_product", {}),
        ("lightnet", {}),
    ],
)
def test_resumed_runs_are_bitwise_the_same(tmp_path, family, changes):
    """Caches of rows and preferences of routers are saved and go on."""
    schedule = {"num_steps": 5, "checkpoint.every_steps": 3, "evaluation.samples": 0}
    c = config(family, **changes, **schedule)
    whole, _ = loop.train(tasks.build(c), c, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")
    again, _ = loop.train(tasks.build(c), c, tmp_path / "run")
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(whole.extra["rows"]))
    chex.assert_trees_all_equal(jax.device_get(again.extra), jax.device_get(whole.extra))
    chex.assert_trees_all_equal(jax.device_get(again.params), jax.device_get(whole.params))


def test_evaluation_carries_the_cache():
    c = config()
    task = tasks.build(c)
    params, extra = task.init(jax.random.key(0))
    batch = task.eval_data(0)
    assert task.eval_data(1) is None and batch is not None
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in task.eval_spec.items()
    }
    assert batch["ids"].shape == (2, 40)  # 80 tokens to predict, in two rows of whole blocks
    value, weight = task.evaluate(params, extra, jax.tree.map(jnp.asarray, batch), None)["loss"]
    model = build_part(RMoESeqConfig, {**c.model, "vocab_size": 10}, "model")
    logits, _ = RMoESeqLM(model).apply({"params": params}, jnp.asarray(batch["ids"]))
    log_p = np.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], 2)
    np.testing.assert_allclose(value / weight, -log_p.mean(), rtol=1e-5)
    (short,) = (t.eval_data(0) for t in [tasks.build(config(**{"evaluation.batches": 3}))])
    np.testing.assert_array_equal(short["ids"], batch["ids"][:, :24])


def test_mistakes():
    with pytest.raises(ConfigError, match="none that could"):
        rmoe = {n: v for n, v in SEQ.items() if n != "model.span"}
        values = base.get_config("language_model", "rmoe")
        values.update_from_flattened_dict({**STREAMS, **rmoe})
        tasks.build(from_dict(values.to_dict()))
    with pytest.raises(ConfigError, match="knows neither segments"):
        tasks.build(config(**{"data.layout": "packed"}))
    with pytest.raises(DataError, match=r"lower evaluation\.batch_size"):
        tasks.build(config(**{"evaluation.batch_size": 64}))
