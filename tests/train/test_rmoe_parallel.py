"""RMoE with experts on several devices: training, evaluation, resumption as on one."""

import shutil

import chex
import jax
import pytest

from scanax.configs import base
from scanax.models.rmoe import moe
from scanax.train import evaluation, loop, mesh as mesh_lib, state as state_lib, tasks
from scanax.train.config import Config, ConfigError, from_dict
from scanax.train.step import jit_step, make_step

SMALL = {
    "num_steps": 4,
    "batch_size": 8,
    "model.vocab_size": 258,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.num_hidden_layers": 2,
    "model.intermediate_size": 12,
    "model.router_dim": 8,
    "model.initializer_range": 0.3,
    "model.balance_coefficient": 0.5,
    "data.source": "files",
    "data.path": "*.txt",
    "data.length": 16,
    "data.eval_fraction": 0.3,
    "evaluation.batch_size": 4,
    "evaluation.batches": 1,
    "evaluation.samples": 0,
    "checkpoint.every_steps": 2,
    "log.every_steps": 1,
    "mesh.data": 1,
}


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(24):
        (folder / f"{i:02d}.txt").write_text(f"number {i} " + "ab" * (i % 5))
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # Optax's
        patch.setenv("SCANAX_DATA", str(folder))
        yield


def config(**changes) -> Config:
    values = base.get_config("language_model", "rmoe")
    values.update_from_flattened_dict({**SMALL, **changes})
    return from_dict(values.to_dict())


def start(c: Config):
    """Task, mesh, compiled step, first state."""
    task = tasks.build(c)
    mesh, shardings = loop.place(task, c)
    state = jax.jit(lambda: state_lib.create(task, c), out_shardings=shardings)()
    return task, mesh, jit_step(make_step(task, c, mesh), shardings, mesh), state


def train(c: Config):
    """Parameters, metrics of each step, and an evaluation."""
    task, mesh, step, state = start(c)
    data, sharding = task.train_data(0, 1), mesh_lib.batch_sharding(mesh)
    found = []
    for _ in range(c.num_steps):
        state, metrics = step(state, loop.put_local(next(data), sharding), {})
        found.append(
            [float(metrics[n]) for n in ("loss", "balance_loss", "grad_norm") if n in metrics]
        )
    means = evaluation.make_evaluator(task, c, mesh)(state.params, state.extra)
    return jax.device_get(state.params), found, means


@pytest.fixture(scope="module")
def one_device():
    return train(config())


# No expert can drop a token if it has a place for each.
ALL_PLACES = {"model.capacity_factor": 4.0}
VARIANTS = {
    "expert 4": {"mesh.expert": 4},
    "data 2, tensor 2": {"mesh.data": 2, "mesh.tensor": 2},
    "data 2, expert 2, remat": {"mesh.data": 2, "mesh.expert": 2, "model.remat": True},
    "fsdp 2, expert 2, places for all": {"mesh.fsdp": 2, "mesh.expert": 2, **ALL_PLACES},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_same_training_and_evaluation(one_device, changes):
    """The balance loss as well: its means are over the tokens of all devices."""
    for got, want in zip(train(config(**changes)), one_device, strict=True):
        chex.assert_trees_all_close(got, want, rtol=5e-6, atol=1e-6)


def test_microbatches_without_the_balance_loss():
    """The balance loss is one of a microbatch; all else does not depend on their number."""
    changes = {"model.balance_coefficient": 0.0, "mesh.expert": 2, "num_steps": 2}
    once, twice = (train(config(microbatches=number, **changes)) for number in (1, 2))
    for got, want in zip(twice, once, strict=True):
        chex.assert_trees_all_close(got, want, rtol=5e-6, atol=1e-6)


def test_training_and_evaluation_never_fall_back(monkeypatch):
    """On a mesh with experts the form for one device is not called."""
    c = config(**{"mesh.expert": 2})
    task, mesh, step, state = start(c)
    batch = loop.put_local(next(task.train_data(0, 1)), mesh_lib.batch_sharding(mesh))

    def forbidden(*args, **options):
        raise AssertionError("experts are not divided")

    monkeypatch.setattr(moe, "expert_mlp", forbidden)
    assert "all_to_all" in step.lower(state, batch, {}).as_text()
    evaluation.make_evaluator(task, c, mesh)(state.params, state.extra)
    with pytest.raises(AssertionError, match="not divided"):
        task.loss(state.params, state.extra, batch, None)  # nothing surrounds it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_experts": 6}, "'experts' of size 6 does not divide over config.mesh.expert"),
        ({"batch_size": 6}, "over the 4 devices of the mesh axes data, fsdp, expert"),
        ({"microbatches": 4}, "gives 2 examples, which does not divide"),
        ({"evaluation.batch_size": 5}, "evaluation.batch_size 5"),
    ],
)
def test_what_does_not_divide(changes, message):
    c = config(**{"mesh.expert": 4, **changes})
    with pytest.raises(ConfigError, match=message):
        loop.place(tasks.build(c), c)


def test_resumption(tmp_path):
    """Bitwise on the same mesh; to float32 rounding where the experts are divided otherwise."""
    c = config(**{"mesh.expert": 2})
    whole, _ = loop.train(tasks.build(c), c, tmp_path / "whole")
    for name, changes in (("same", {"mesh.expert": 2}), ("other", {"mesh.expert": 4})):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "4")
        c = config(**changes)
        state, _ = loop.train(tasks.build(c), c, tmp_path / name)
        equal = chex.assert_trees_all_equal if name == "same" else chex.assert_trees_all_close
        options = {} if name == "same" else {"rtol": 5e-6, "atol": 1e-6}
        equal(jax.device_get(state.params), jax.device_get(whole.params), **options)
