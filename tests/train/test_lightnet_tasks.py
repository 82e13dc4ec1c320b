"""LightNet on the tasks: masked text, classes of images and clips, causal text, and mistakes."""

import itertools
import json

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepping import train

from scanax.configs import base
from scanax.models import params as params_lib
from scanax.models.generation import Sampling
from scanax.models.lightnet import LightNetClassifier, LightNetGridConfig
from scanax.train import saturation, tasks
from scanax.train.config import ConfigError, build as build_part, from_dict
from scanax.train.data import image_sources
from scanax.train.data.pipeline import IGNORE
from scanax.train.tasks.masked_language_model import mask_tokens

MODEL = {
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.num_hidden_layers": 2,
    "model.intermediate_size": 16,
    "model.gate_low_rank_dim": 4,
    "model.initializer_range": 0.3,
    "mesh.data": 1,
}
TEXT = {"batch_size": 4, "data.source": "files", "data.path": "*.txt", "data.length": 32}
TEXT |= {"data.eval_fraction": 0.3, "evaluation.batch_size": 5}
IMAGES = {"batch_size": 4, "data.channels": 1, "evaluation.batch_size": 4}


@pytest.fixture
def text(tmp_path, monkeypatch):
    for i in range(24):
        (tmp_path / f"{i:02d}.txt").write_text(f"number {i} " + "ab" * (i % 5))
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))


def config(task: str, **changes):
    values = base.get_config(task, "lightnet")
    part = IMAGES if task == "image_classification" else TEXT
    values.update_from_flattened_dict({**MODEL, **part, **changes})
    return from_dict(values.to_dict())


def build(task: str, **changes):
    built = tasks.build(config(task, **changes))
    return built, *built.init(jax.random.key(0))


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    "task, changes", [("masked_language_model", {}), ("image_classification", {"drop_path": 0.5})]
)
def test_same_losses_on_any_mesh_and_accumulation(text, task, changes):
    """Their noise (what is masked, which branches are left out) belongs to the examples."""
    options = {"batch_size": 8, "model.vocab_size": 260, "evaluation.batch_size": 4}
    options = {
        k: v for k, v in options.items() if task != "image_classification" or "vocab" not in k
    }
    options |= {f"model.{name}": value for name, value in changes.items()}
    with jax.numpy_dtype_promotion("standard"):  # inside of optax
        _, losses = train(config(task, **options), 3)
        for variant in ({"microbatches": 2}, {"mesh.data": 2, "mesh.tensor": 2}):
            _, found = train(config(task, **options, **variant), 3)
            np.testing.assert_allclose(found, losses, rtol=1e-5)


def test_masked_tokens():
    """A seventh is chosen; 80 % of it hidden, 10 % random, 10 % shown; a row depends on its key."""
    ids = jnp.arange(40 * 500, dtype=jnp.int32).reshape(40, 500) % 50
    real = jnp.arange(500) < 400
    real = jnp.broadcast_to(real, ids.shape)
    noisy, labels = mask_tokens(ids, real, keys(40), 0.15, 50, 50)
    chosen = np.asarray(labels != IGNORE)
    assert not chosen[:, 400:].any() and abs(chosen[:, :400].mean() - 0.15) < 0.01
    np.testing.assert_array_equal(np.asarray(noisy)[~chosen], np.asarray(ids)[~chosen])
    np.testing.assert_array_equal(np.asarray(labels)[chosen], np.asarray(ids)[chosen])
    inside = np.asarray(noisy)[chosen]
    assert abs((inside == 50).mean() - 0.8) < 0.03
    assert abs((inside == np.asarray(ids)[chosen]).mean() - 0.102) < 0.02
    assert inside.max() == 50
    other, _ = mask_tokens(ids[3:4], real[3:4], keys(40)[3:4], 0.15, 50, 50)
    np.testing.assert_array_equal(other[0], noisy[3])


def test_accuracies_are_counted():
    task, params, extra = build("image_classification", **{"evaluation.batch_size": 64})
    batch = dict(task.eval_data(0))
    batch["labels"] = np.where(np.arange(64) < 50, batch["labels"], IGNORE).astype(np.int32)
    values = base.get_config("image_classification", "lightnet").model.to_dict()
    values |= {k.removeprefix("model."): v for k, v in MODEL.items() if k.startswith("model.")}
    model = build_part(LightNetGridConfig, {**values, "num_classes": 10}, "model")
    logits = LightNetClassifier(model).apply({"params": params}, jnp.asarray(batch["images"]))
    right = np.argsort(-np.asarray(logits), axis=1)[:50] == batch["labels"][:50, None]
    found = jax.jit(task.evaluate)(params, extra, batch, keys(64))
    assert [float(x) for x in found["accuracy"]] == [right[:, 0].sum(), 50]
    assert [float(x) for x in found["top5_accuracy"]] == [right[:, :5].sum(), 50]


def test_masked_text_does_not_see_padding(text):
    """What stands behind a document changes nothing, and the bytes of all of it are predicted."""
    task, params, extra = build("masked_language_model", **{"data.mask_rate": 1.0})
    batch = task.eval_data(0)
    lengths = (batch["segments"] > 0).sum(axis=1)
    assert lengths.min() < 32 and len(set(lengths)) > 1, "no padding is tested"
    evaluate = jax.jit(task.evaluate)
    found = evaluate(params, extra, batch, keys(5))
    dirty = {**batch, "ids": np.where(batch["segments"] > 0, batch["ids"], 77)}
    again = evaluate(params, extra, dirty, keys(5))
    np.testing.assert_allclose(found["loss"], again["loss"], rtol=1e-6)
    assert float(found["loss"][1]) == lengths.sum()
    total, weight = task.loss(params, extra, batch, keys(5))
    np.testing.assert_allclose(total, found["loss"][0], rtol=1e-6)
    assert weight.weight == found["loss"][1] and weight.extra == extra


def test_rows_that_fill_a_batch_up_do_not_count(text):
    task, params, extra = build("masked_language_model", **{"evaluation.batch_size": 64})
    batch = task.eval_data(0)
    filler = (batch["labels"] == IGNORE).all(axis=1)
    assert 0 < filler.sum() < 64
    weight = task.evaluate(params, extra, batch, keys(64))["loss"][1]
    without = {**batch, "segments": np.where(filler[:, None], 0, batch["segments"])}
    assert weight == task.evaluate(params, extra, without, keys(64))["loss"][1]


def test_filled_in_text_is_shown(text):
    task, params, extra = build("masked_language_model")
    samples = task.sample(params, extra, jax.random.key(1), 3)
    shown = task.render(samples)
    assert shown.count("---") == 6 and " for " in shown
    assert shown.count("[") == (samples["labels"] != IGNORE).sum() > 0
    plain = task.render({**samples, "labels": np.full_like(samples["labels"], IGNORE)})
    assert "[" not in plain and "_" in plain and "ab" in plain


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_stochastic_depth_takes_the_examples_keys(drop_path):
    task, params, extra = build("image_classification", **{"model.drop_path": drop_path})
    batch = {name: jnp.asarray(x) for name, x in next(task.train_data(0, 1)).items()}
    loss = jax.jit(lambda seeds: task.loss(params, extra, batch, seeds)[0])
    one, same, other = (float(loss(keys(4, seed))) for seed in (0, 0, 1))
    assert one == same and (one != other) == (drop_path > 0)
    evaluated = task.evaluate(params, extra, task.eval_data(0), keys(4))
    assert evaluated["loss"][1] == 4


def test_without_positions_shuffled_patches_are_the_same_image():
    """On 256 digits, classes and accuracy: to the last one."""
    images, labels = image_sources.embedded.digits()
    x = np.asarray(images[:256], np.float32) / 127.5 - 1
    patches = x.reshape(256, 4, 2, 4, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(256, 16, 2, 2, 1)
    order = np.random.default_rng(0).permutation(16)
    mixed = patches[:, order].reshape(256, 4, 4, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5)
    mixed = mixed.reshape(256, 8, 8, 1)
    same = {}
    for tpe, use_lrpe in (("none", False), ("none", True), ("bidirectional", False)):
        values = base.get_config("image_classification", "lightnet").model.to_dict()
        values |= {k.removeprefix("model."): v for k, v in MODEL.items() if k.startswith("model.")}
        values |= {"tpe": tpe, "use_lrpe": use_lrpe, "num_classes": 10}
        module = LightNetClassifier(build_part(LightNetGridConfig, values, "model"))
        params = params_lib.initialise(module, jax.random.key(0), jnp.asarray(x[:1]))
        classify = jax.jit(lambda p, x, m=module: m.apply({"params": p}, x).argmax(axis=-1))
        a, b = classify(params, x), classify(params, mixed)
        same[tpe, use_lrpe] = bool((a == b).all())
        if tpe == "none" and not use_lrpe:
            assert (a == labels[:256]).mean() == (b == labels[:256]).mean()
    assert same == {("none", False): True, ("none", True): False, ("bidirectional", False): False}


def test_clips_move_as_they_are_labelled():
    task, params, extra = build(
        "image_classification", **{"data.source": "moving_digits", "model.patch_size": (1, 4, 4)}
    )
    assert task.batch_spec["images"].shape == (4, 4, 16, 16, 1)
    assert np.isfinite(task.evaluate(params, extra, task.eval_data(0), keys(4))["loss"][0])
    digits = image_sources.embedded.digits()[0][:5]
    clips, labels = (source := image_sources.MovingDigits(digits)).take(np.arange(len(source)))
    assert clips.shape == (320, 4, 16, 16, 1) and (np.bincount(labels) == 40).all()
    steps = {"N": (-2, 0), "NE": (-2, 2), "E": (0, 2), "SE": (2, 2)}
    steps |= {"S": (2, 0), "SW": (2, -2), "W": (0, -2), "NW": (-2, -2)}
    for clip, label in zip(clips, labels, strict=True):
        step = steps[source.DIRECTIONS[label]]
        for now, after in itertools.pairwise(clip):
            np.testing.assert_array_equal(np.roll(now, step, axis=(0, 1)), after)
    ink = digits.sum(axis=(1, 2, 3), dtype=int)[np.arange(320) % 5]
    assert (clips.sum(axis=(2, 3, 4)) == ink[:, None]).all()
    starts = {tuple(np.argwhere(clip[0, ..., 0])[0]) for clip in clips}
    assert len(starts) > 50


def test_causal_text_with_every_mixer(text):
    """A row's loss is of its past only; softmax has no state to sample from, the others do."""
    for mixer in ("lightnet", "linear", "gla", "softmax"):
        task, params, extra = build("language_model", **{"model.mixer": mixer})
        batch = task.eval_data(0)
        logits = jax.jit(lambda p, b, t=task: t.evaluate(p, {}, b, None))
        early = np.arange(32)[None] < 8
        first = {**batch, "labels": np.where(early, batch["labels"], IGNORE)}
        changed = {**first, "ids": np.where(early, batch["ids"], 7)}
        a, b = (logits(params, x)["loss"] for x in (first, changed))
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert (task.sample is None) == (mixer == "softmax") == (task.complete is None)
        if mixer != "softmax":
            options = {"sampling": Sampling(temperature=0.0), "max_tokens": 3}
            found = task.complete(params, extra, jax.random.key(0), ["number", ""], **options)
            assert [len(tokens) for tokens in found.tokens] == [3, 3]
        assert ("saturation" in task.analyses) == (mixer == "lightnet")
        assert ("long_context" in task.analyses) == (mixer != "softmax")
    np.testing.assert_array_equal(extra, {})


def test_saturation(text, tmp_path):
    """Equal keys keep 1 - 1/t; the analysis reads the keys that the layers use."""
    equal = saturation.kept(jnp.full((1, 6, 2), 300.0))
    np.testing.assert_allclose(equal[0, :, 0], 1 - 1 / np.arange(2, 7), atol=3e-5)
    growing = saturation.kept(jnp.arange(6.0)[None, :, None] * 50)
    np.testing.assert_allclose(growing[0, :, 0], 0, atol=1e-20)
    small = {"model.initializer_range": 1e-4, "model.use_short_conv": True}
    for changes, near in (({}, False), (small, True)):
        task, params, extra = build("language_model", **changes)
        summary = task.analyses["saturation"](params, extra, tmp_path / str(near), 2, 32)
        figures = json.loads((tmp_path / str(near) / "figures.json").read_text())
        assert figures["positions"] == [2, 4, 8, 16, 32] and figures["rows"] == 2
        means = np.asarray(figures["mean_exp_g"])
        assert means.shape == (2, 5) and "layer 1" in summary
        assert np.allclose(means, 1 - 1 / np.asarray([2, 4, 8, 16, 32]), atol=1e-3) == near
        assert (tmp_path / str(near) / "saturation.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("language_model", {"family": "mlp"}, "choose one of delta_product, lightnet"),
        ("language_model", {"model.causal": False}, "needs model.causal=true"),
        ("masked_language_model", {"model.causal": True, "model.tpe": "none"}, "causal=false"),
        ("masked_language_model", {"data.layout": "packed"}, "one text per row"),
        ("masked_language_model", {"data.mask_rate": 0.0}, r"mask_rate must be in \(0, 1\]"),
        ("masked_language_model", {"model.vocab_size": 257}, "258 tokens of data.tokenizer byte"),
        (
            "language_model",
            {"model.mixer": "gla", "data.layout": "packed"},
            "mixer=gla knows no segments",
        ),
        ("image_classification", {"model.patch_size": (3, 3)}, "3 x 3 does not divide .* 8 x 8"),
        ("image_classification", {"model.patch_size": (2,)}, "does not divide"),
        (
            "image_classification",
            {"data.source": "moving_digits", "data.flip": True},
            "data.flip is for pictures",
        ),
        ("word_problem", {"model.mixer": "linear", "data.curriculum_lengths": (8,)}, "segments"),
    ],
)
def test_mistakes(text, task, changes, message):
    part = {"data.curriculum_steps": (0,), "data.length": 8}
    part |= {"data.source": "embedded", "data.path": ""} if task != "word_problem" else {}
    values = base.get_config(task, "lightnet")
    known = values.to_dict()["data"]
    part = {k: v for k, v in part.items() if k.split(".")[1] in known}
    values.update_from_flattened_dict({**MODEL, **part, **changes})
    with pytest.raises(ConfigError, match=message):
        tasks.build(from_dict(values.to_dict()))


def test_word_problems_run_on_lightnet():
    small = {"data.length": 8, "data.eval_lengths": (8,), "evaluation.batch_size": 4}
    values = base.get_config("word_problem", "lightnet")
    values.update_from_flattened_dict({**MODEL, **small})
    task = tasks.build(from_dict(values.to_dict()))
    params, extra = task.init(jax.random.key(0))
    assert np.isfinite(task.evaluate(params, extra, task.eval_data(0), None)["loss"][0])


def test_a_run_is_not_continued_with_other_rates(tmp_path):
    """Of MD-LRPE: they are no parameters, so only the config can tell."""
    flags = [f"--config.{name}={value}" for name, value in MODEL.items()]
    flags += ["--config.num_steps=2", "--config.optimizer.warmup_steps=0"]
    flags += ["--config.evaluation.batches=1", "--config.batch_size=4"]
    where = ("--config=configs/lightnet_digits.py", f"--workdir={tmp_path / 'run'}")
    first = command.run_forked(command.command("main", *where, *flags))
    assert first.returncode == 0, first.stdout
    arguments = ("--config.num_steps=4", "--config.model.theta_type=4")
    second = command.run_forked(command.command("main", *where, *flags, *arguments))
    assert second.returncode == 2 and "model.theta_type: 0 -> 4" in second.stdout, second.stdout
