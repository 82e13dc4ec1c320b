"""Rectified flow on the training loop: losses, teachers, starts from other runs, analyses."""

import dataclasses
import json

from flow_runs import digits, first_loss, make, toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepping import train

from scanax.train import optimizer as optimizer_lib, run as run_lib
from scanax.train.config import ConfigError, from_dict, replaced
from scanax.train.data.pipeline import DataError
from scanax.train.tasks.flow import flow_of
from scanax.train.tasks.flow_loss import make_loss

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run of digits, loaded."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    run_lib.train(digits(), folder)
    return folder, run_lib.load(folder)


def test_loss_is_that_of_the_velocity_on_the_path():
    """With times pinned to one value all that is random is the pair, and that is given."""
    config = toy(**{"objective.times": "fixed:0.25", "objective.eps": 1e-6})
    loss, params, batch, _, _ = first_loss(config)
    flow = flow_of(from_dict(config.to_dict()))
    t = jnp.full(16, 0.25 * (1 - 1e-6) + 1e-6)
    v = flow.velocity(params)(0.25 * batch["x1"] + 0.75 * batch["x0"], t)
    expected = jnp.mean(jnp.square(v - (batch["x1"] - batch["x0"])))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)


@pytest.mark.parametrize("config", [toy, digits])
def test_losses_do_not_depend_on_accumulation_or_mesh(config):
    _, expected = train(from_dict(config().to_dict()), steps=2)
    for change in ({"microbatches": 2}, {"mesh.data": 2, "mesh.fsdp": 2}):
        _, found = train(from_dict(config(**change).to_dict()), steps=2)
        np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_annealing_counts_updates():
    """beta is 1 at first, when the pairs' noise plays no part, and 0 after W updates."""
    config = digits(**{"objective.annealing": "linear:4", "objective.times": "t0"})
    frozen, task = make(config)
    state, _ = train(frozen, steps=3, task=task)
    assert int(state.extra["updates"]) == 3
    params, _ = task.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {n: jnp.asarray(rng.normal(size=(8, 8, 8, 1)), jnp.float32) for n in ("x0", "x1")}
    batch["labels"] = jnp.zeros(8, jnp.int32)
    other = {**batch, "x0": batch["x0"] + 1}
    keys = lambda: jax.random.split(jax.random.key(1), 8)
    loss = lambda n, b: float(task.loss(params, {"updates": jnp.int32(n)}, b, keys())[0])
    assert loss(0, batch) == loss(0, other)
    assert loss(2, batch) != loss(2, other)
    assert loss(4, batch) == loss(9, batch) != loss(2, batch)


def test_evaluation_is_weighted():
    """As training is: a weight of (1 - t)^2 at t = 0.75 makes a sixteenth of the loss."""
    params, found = make(toy())[1].init(jax.random.key(0))[0], []
    for weight in ("uniform", "1mt"):
        pinned = {"objective.times": "fixed:0.75", "objective.eps": 1e-6}
        task = make(toy(**pinned, **{"objective.weight": weight}))[1]
        keys = jax.random.split(jax.random.key(1), 16)
        found.append(float(task.evaluate(params, {}, task.eval_data(0), keys)["loss"][0]))
    np.testing.assert_allclose(found[1], found[0] / 16, rtol=1e-4)


def test_solver_that_does_not_arrive_is_a_warning(teacher, caplog):
    run = run_lib.load(teacher)
    flow = flow_of(run.config)
    x, labels, _ = flow.starts(np.arange(2), jax.random.key(0))
    flow.solve(run.params, x, labels, "rk45:1e-1")
    assert "tolerance" not in caplog.text
    flow.solve(run.params, x, labels, "rk45:1e-12")
    assert "rk45:1e-12 did not reach its tolerance for 2 of 2 samples" in caplog.text


def test_pairs_are_mirrored_as_one():
    """The loss of a velocity that commutes with mirroring is that of the pairs as they are."""
    config = digits(**{"objective.flip": "example", "objective.times": "t0"})
    flow = flow_of(from_dict(config.to_dict()))
    plain = dataclasses.replace(flow, objective=dataclasses.replace(flow.objective, flip="none"))
    rng = np.random.default_rng(0)
    batch = {n: jnp.asarray(rng.normal(size=(8, 8, 8, 1)), jnp.float32) for n in ("x0", "x1")}
    batch["labels"] = jnp.zeros(8, jnp.int32)

    def total(f, velocity):
        object.__setattr__(f, "velocity", lambda *_: velocity)
        keys = jax.random.split(jax.random.key(0), 8)
        return float(make_loss(f, None)({}, {}, batch, keys)[0])

    mean = lambda x, t: jnp.broadcast_to(jnp.mean(x, axis=2, keepdims=True), x.shape)
    np.testing.assert_allclose(total(flow, mean), total(plain, mean), rtol=1e-5)
    first = lambda x, t: jnp.broadcast_to(x[:, :, :1], x.shape)
    assert abs(total(flow, first) / total(plain, first) - 1) > 1e-3


def test_averages_are_the_published_ones(golden):
    with np.load(golden / "rectflow" / "rf_ema.npz") as saved:
        found = {name: saved[name] for name in saved}
    for name, expected in found.items():
        if name == "params":
            continue
        rate = float(name.removeprefix("ema_rate").replace("p", "."))
        average(found["params"], expected, rate, "warmup")
    with np.load(golden / "rectflow" / "rfpp_ema.npz") as saved:
        params, expected = saved["params_after_step"], saved["ema_decay0p99"]
    start = np.concatenate([np.full_like(params[:1], np.nan), params])
    known = ~np.isnan(expected.reshape(len(expected), -1)[:, 0])
    got = averages(start, 0.99, "constant")
    np.testing.assert_allclose(got[known], expected[known], atol=1e-6)


def average(params, expected, rate, start):
    np.testing.assert_allclose(averages(params, rate, start), expected, atol=2e-7)


def averages(params, rate, start):
    """After each update; params[0] are those before the first."""
    config = dataclasses.replace(
        from_dict(toy().to_dict()).optimizer, ema_decay=rate, ema_start=start
    )
    ema, found = params[0], []
    for i, new in enumerate(params[1:]):
        decay = float(optimizer_lib.ema_rate(config, jnp.asarray(i)))
        ema = new if decay == 0 else decay * ema + (1 - decay) * new
        found.append(ema)
    return np.stack(found)


def test_toy_can_be_evaluated_sampled_and_analysed(teacher):
    run = run_lib.load(teacher)
    picture = run.task.render(run.task.sample(run.params, run.extra, jax.random.key(0), 8))
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3
    folder = teacher / "eval" / "x"
    text = run.task.analyses["toy"](run.params, run.extra, folder, 64, 5)
    assert "within_3_sigma_5" in text and (folder / "trajectories.png").is_file()
    run.task.analyses["geometry"](run.params, run.extra, folder, 300, 5)
    found = json.loads((folder / "geometry.json").read_text())
    flow = flow_of(run.config)
    x0, labels, _ = flow.starts(np.arange(300), jax.random.key(17))
    x1 = flow.data.ends(np.arange(300), training=False)[0]
    np.testing.assert_allclose(
        found["squared_pairs"], np.mean(np.sum((x1 - np.asarray(x0)) ** 2, axis=1)), rtol=1e-5
    )
    end = flow.solve(run.params, x0, labels, "euler:5").x
    np.testing.assert_allclose(
        found["squared_flow"], np.mean(np.sum(np.square(end - x0), axis=1)), rtol=1e-4
    )


def test_same_noise_belongs_to_the_same_number(images):
    """Samples of the same key agree, however many are drawn beside them."""
    _, run = images
    key = jax.random.key(5)
    few, more = (run.task.sample(run.params, run.extra, key, n) for n in (4, 8))
    np.testing.assert_allclose(few, more[:4], atol=1e-5)


def test_images_are_evaluated_drawn_and_edited(images):
    folder, run = images
    assert (folder / "eval" / "00000002" / "samples.png").is_file()
    assert (folder / "eval" / "00000002" / "curve.png").is_file()
    where = folder / "eval" / "x"
    call = lambda name, rows: run.task.analyses[name](run.params, run.extra, where, rows, 0)
    text = call("quality", 32)
    reports = json.loads((where / "quality.json").read_text())
    assert "pixels" in text and [r["recipe"] for r in reports] == ["rf_euler:1", "rf_rk45:1e-1"]
    assert reports[0]["nfe"] == 1 and reports[1]["nfe"] >= 8
    assert all("fid" not in report for report in reports)
    found = call("inversion", 8)
    assert "reconstruction_mse" in found
    for name in ("interpolation", "editing"):
        call(name, 2)
        assert (where / f"{name}.png").is_file()
    with pytest.raises(ConfigError, match="start_path"):
        call("transfer", 2)


def test_what_is_no_image_or_class_is_refused(images):
    _, run = images
    flow = flow_of(run.config)
    x, label = jnp.full((2, 8, 8, 1), 127.0), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\]; the largest .* 127"):
        flow.solve(run.params, x, label, "rf_invert_euler:2")
    with pytest.raises(ValueError, match="the largest number of these is nan"):
        flow.solve(run.params, x * jnp.nan, label, "rf_invert_euler:2")
    with pytest.raises(ValueError, match="labels must be 0 to 9"):
        flow.solve(run.params, x, label + 11, "rf_euler:2")
    one = run_lib.load(images[0], sampler={"label": "3"})
    chosen = one.task.sample(one.params, one.extra, jax.random.key(5), 4)
    in_turn = run.task.sample(run.params, run.extra, jax.random.key(5), 4)
    np.testing.assert_array_equal(chosen[3], in_turn[3])
    assert np.any(chosen[0] != in_turn[0])


def test_samplers_may_be_replaced(teacher):
    run = run_lib.load(teacher, sampler={"recipe": "euler:1"})
    assert run.config.sampler["recipe"] == "euler:1"
    with pytest.raises(ConfigError, match=r"did you mean 'sampler.recipe'"):
        run_lib.load(teacher, sampler={"recip": "euler:1"})
    with pytest.raises(ConfigError, match="must be a number"):
        replaced({"steps": 3}, {"steps": "many"}, "sampler")
    assert replaced({"steps": 3}, {"steps": "5"}, "sampler") == {"steps": 5}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objective.loss": "l3"}, "unknown loss 'l3'"),
        ({"objective.times": "cosine"}, "unknown times"),
        ({"objective.weight": "w"}, "unknown weight"),
        ({"objective.annealing": "linear"}, "annealing 'linear'"),
        ({"objective.loss": "lpips"}, "needs a distance"),
        ({"objective.distance": "random_conv"}, "the others none"),
        ({"objective.flip": "both"}, "objective.flip must be one of"),
        ({"objective.flip": "example"}, "mirrors images"),
        ({"objective.guidance": 1.0}, "objective.teacher is the flow"),
        ({"objective.teacher": "x"}, "objective.teacher is the flow"),
        ({"objective.huber_c": "0"}, "huber_c must be positive"),
        ({"sampler.recipe": "euler:0"}, "at least one step"),
        ({"sampler.recipe": "rfpp_heun:4"}, "must be odd"),
        ({"sampler.recipe": "rf_invert_euler:4"}, "goes to noise"),
        ({"sampler.invert": "rf_euler:4"}, "goes to data"),
        ({"data.variance": -1.0}, "data.variance must be positive"),
        ({"objective.annealing": "linear:9"}, "start from noise"),
        ({"objective.guidance": 1.0, "objective.teacher": "x"}, "start from noise"),
        (
            {"objective.online_steps": 2, "objective.teacher": "x", "data.pairs": "x"},
            "reflow without pairs",
        ),
    ],
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        make(toy(**change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.num_classes": 4}, "smaller than the 10 classes"),
        ({"objective.flip": "batch", "microbatches": 2}, "one coin for the batch"),
        (
            {
                "objective.loss": "lpips_divt",
                "objective.distance": "random_conv",
                "objective.times": "t0t1",
            },
            "go up to t = 1",
        ),
        ({"sampler.label": 10}, "one of the 10 classes"),
        ({"data.start_path": "x"}, "start_path needs data.source=files"),
        ({"data.pairs": "x", "data.flip": True}, "set data.flip to 0"),
        ({"data.mixup": 0.5}, "no mixing"),
        ({"objective.distance": "lpips", "objective.loss": "lpips"}, "should be random_conv"),
    ],
)
def test_bad_configs_of_images_are_named(change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make(digits(**change))[1].train_data(0, 1)
