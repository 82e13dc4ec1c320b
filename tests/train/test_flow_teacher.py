"""What a run of a flow takes from others: parameters, teachers, pairs; and what happens without."""

import json
import shutil

from flow_runs import digits, first_loss, make, toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import flow_cifar
from scanax.models.rectified_flow import path
from scanax.train import generate_pairs, loop, run as run_lib, state as state_lib
from scanax.train.checkpoint import CheckpointError, Checkpoints
from scanax.train.checksum import tree_checksums
from scanax.train.config import ConfigError, from_dict
from scanax.train.data import images as images_lib, pairs as pairs_lib
from scanax.train.data.pipeline import DataError
from scanax.train.tasks import flow_loss
from scanax.train.tasks.flow import flow_of

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run of digits."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    run_lib.train(digits(), folder)
    return folder


def guided(teacher, **changes):
    """Flow-guided distillation of digits."""
    return digits(**{"objective.teacher": str(teacher), "objective.guidance": 0.5, **changes})


def test_run_starts_from_another_ones_parameters(teacher, tmp_path):
    """From the parameters themselves, and the average starts there too."""
    saved = Checkpoints(teacher).read_meta()[1]["arrays"]
    config, task = make(toy(**{"init_from": str(teacher)}))
    _, shardings = loop.place(task, config)
    shapes = state_lib.shapes(task, config)
    (tmp_path / "checkpoints" / "1000.orbax-checkpoint-tmp-1").mkdir(parents=True)  # a killed save
    params = loop.starting_params(config, tmp_path, shapes, shardings)
    assert tree_checksums(params) == {name: entry[2] for name, entry in saved["params"].items()}
    assert saved["params"] != saved["ema"]
    state, step = loop._start(task, config, shardings, None, params)
    assert step == 0 and tree_checksums(state.ema) == tree_checksums(state.params)
    (tmp_path / "checkpoints" / "1000").mkdir()
    assert loop.starting_params(config, tmp_path, shapes, shardings) is None


def test_start_from_another_model_is_refused(teacher, tmp_path):
    config = toy(**{"init_from": str(teacher), "model.hidden_size": 12})
    with pytest.raises(CheckpointError, match=r"init_from.*another params"):
        run_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match=r"init_from.*holds no checkpoints"):
        run_lib.train(toy(**{"init_from": str(tmp_path / "none")}), tmp_path / "run")


def test_online_reflow_goes_where_the_teacher_goes(teacher):
    """X_1 is the teacher's Euler end from X_0, by its averaged parameters."""
    config = toy(
        **{
            "objective.teacher": str(teacher),
            "objective.online_steps": 3,
            "objective.times": "t0",
        }
    )
    loss, params, batch, _, _ = first_loss(config)
    run = run_lib.load(teacher)
    flow = flow_of(run.config)
    end = flow.solve(run.params, batch["x0"], batch["labels"], "rf_euler:3").x
    t = jnp.full(16, 1e-3)
    v = flow.velocity(params)(path.interpolate(batch["x0"], end, t), t)
    np.testing.assert_allclose(loss, jnp.mean(jnp.square(v - (end - batch["x0"]))), rtol=1e-4)


def test_teacher_is_neither_saved_nor_trained(images, tmp_path):
    config = guided(images)
    run_lib.train(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    assert "extra" not in checkpoints.read_meta()[1]["arrays"]
    checkpoints.close()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    row = next(json.loads(line) for line in metrics.splitlines() if "two_step_loss" in line)
    np.testing.assert_allclose(
        row["loss"], row["pair_loss"] + 0.5 * row["two_step_loss"], rtol=1e-5
    )


def test_checkpoint_alone_is_enough_to_sample(images, tmp_path, monkeypatch):
    """Once trained, with its teacher, the distance's weights and the data gone."""
    teacher = tmp_path / "teacher"
    shutil.copytree(images, teacher)
    run_lib.train(guided(teacher, **{"data.image_size": 8, "num_steps": 1}), tmp_path / "run")
    shutil.rmtree(teacher)
    gone = lambda config: pytest.fail("the data is read")
    monkeypatch.setattr(images_lib, "read", gone)
    run = run_lib.load(tmp_path / "run")
    assert run.task.sample(run.params, run.extra, jax.random.key(0), 2).shape == (2, 8, 8, 1)
    plan = {"teacher": "", "run": "", "solver": "rf_euler:1", "seed": 0, "batch_size": 2}
    plan |= {"shape": (8, 8, 1), "num_classes": 10, "number": 2, "per_shard": 2}
    make_pairs = generate_pairs.maker(
        flow_of(run.config), run.params, pairs_lib.PairsPlan(**plan, from_data=False)
    )
    assert len(list(make_pairs(np.arange(2)))) == 2


def test_shape_of_a_flow_is_its_models(monkeypatch):
    monkeypatch.setattr(images_lib, "read", lambda config: pytest.fail("the data is read"))
    config = flow_cifar.get_config("3.4m")
    assert flow_of(from_dict(config.to_dict())).shape == (32, 32, 3)


def test_weights_of_a_distance_are_read_in_training():
    changes = {"objective.distance": "lpips:none.npz", "objective.loss": "lpips"}
    _, task = make(digits(**changes))
    with pytest.raises(ConfigError, match=r"none\.npz"):
        task.train_data(0, 1)


def test_run_goes_on_with_the_teacher_that_it_began_with(images, tmp_path):
    """Not with the same run's later parameters."""
    teacher = tmp_path / "teacher"
    shutil.copytree(images, teacher)
    run_lib.train(guided(teacher, **{"num_steps": 1}), tmp_path / "run")
    longer = {"allow_config_change": True}
    run_lib.train(guided(teacher, **{"num_steps": 2}), tmp_path / "run", **longer)
    run_lib.train(digits(num_steps=3), teacher, **longer)
    with pytest.raises(CheckpointError, match=r"objective.teacher: \w{16} -> \w{16}"):
        run_lib.train(guided(teacher, **{"num_steps": 3}), tmp_path / "run", **longer)


def stored(folder, checksum, **changes):
    """Pairs of digits whose labels take turns."""
    plan = {"run": "a run", "solver": "rf_euler:1", "seed": 0, "batch_size": 4, "number": 12}
    plan |= {"shape": (8, 8, 1), "num_classes": 10, "per_shard": 12, "from_data": False}
    rng = np.random.default_rng(0)
    pair = lambda i: (*rng.normal(size=(2, 8, 8, 1)), i % 10, 1)
    pairs_lib.write(
        pairs_lib.PairsPlan(teacher=checksum, **{**plan, **changes}),
        folder,
        lambda numbers: map(pair, numbers.tolist()),
    )
    return str(folder)


def test_pairs_are_checked_when_a_run_begins(images, tmp_path):
    """With any whole step of the teacher; a run that has begun does not need its folder."""
    teacher = tmp_path / "teacher"
    shutil.copytree(images, teacher)
    checkpoints = Checkpoints(teacher)
    pairs = stored(tmp_path / "pairs", checkpoints.fingerprint())
    checkpoints.close()
    (teacher / "checkpoints" / "9" / "meta").mkdir(parents=True)
    changes = {"data.pairs": pairs, "data.teacher": str(teacher)}
    run_lib.train(digits(**changes, num_steps=1), tmp_path / "run")
    shutil.rmtree(teacher)
    run_lib.train(digits(**changes, num_steps=2), tmp_path / "run", allow_config_change=True)
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        run_lib.train(digits(**changes), tmp_path / "other")


def test_labels_of_pairs_are_those_of_the_model(tmp_path):
    pairs = stored(tmp_path / "p", "0" * 16, num_classes=11)
    with pytest.raises(DataError, match=r"with 11 classes, and model.num_classes is 10"):
        make(digits(**{"data.pairs": pairs}))[1].train_data(0, 1)
    make(digits(**{"data.pairs": pairs, "model.num_classes": 0}))[1].train_data(0, 1)
    for classes in (0, 9):  # labels go up to 9
        pairs = stored(tmp_path / f"p{classes}", "0" * 16, num_classes=classes)
        with pytest.raises(DataError, match=f"has label {max(classes, 1)}, and its teacher"):
            make(digits(**{"data.pairs": pairs}))[1].train_data(0, 1)


@pytest.mark.parametrize("classes", [0, 11])
def test_teacher_knows_all_classes_of_the_student(images, classes):
    with pytest.raises(ConfigError, match=f"the student has {classes} classes and .* 10"):
        make(guided(images, **{"model.num_classes": classes}))[1].given()


def test_passes_of_the_student_drop_out_different_units(images, monkeypatch):
    """That on the pairs and that of the two-step term."""
    flow = flow_of(from_dict(guided(images).to_dict()))
    seen = []
    monkeypatch.setattr(flow_loss, "_noisy", lambda flow: True)
    zero = lambda self, params, labels, keys=None: seen.append(keys) or (lambda x, t: 0 * x)
    monkeypatch.setattr(type(flow), "velocity", zero)
    batch = {n: jnp.ones((8, 8, 8, 1)) for n in ("x0", "x1")}
    batch["labels"] = jnp.zeros(8, jnp.int32)
    teacher = flow_loss.Teacher(flow)
    loss = flow_loss.make_loss(flow, teacher)
    loss({}, {"given": {}}, batch, jax.random.split(jax.random.key(0), 8))
    first, second = (np.asarray(jax.random.key_data(keys)) for keys in seen if keys is not None)
    assert not np.any(np.all(first == second, axis=1))
