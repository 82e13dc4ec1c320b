"""Where paths of flows begin and end: images of two kinds, points, pairs."""

import dataclasses
import json

from flow_runs import digits, make, toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.train import flow_analyses, generate_pairs, run as run_lib
from scanax.train.config import ConfigError, from_dict
from scanax.train.data import pairs as pairs_lib
from scanax.train.tasks.flow import flow_of

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Dark images a.npy; bright ones b.npy, with others to evaluate on and labels for both.

    Their left half is the brighter one; labels are sorted.
    """
    folder = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 128), ("held", 128)):
        images = rng.integers(low, low + 60, (40, 8, 8, 1), np.uint8)
        images[:, :, :4] += 60
        np.save(folder / f"{name}.npy", images)
    np.save(folder / "labels.npy", np.arange(40) // 20)
    return folder


@pytest.fixture
def dark_to_bright(kinds, monkeypatch):
    """The config of a flow from a to b."""
    monkeypatch.setenv("SCANAX_DATA", str(kinds))
    where = {"source": "files", "path": "b.npy", "start_path": "a.npy", "eval_path": "held.npy"}
    where |= {"labels_path": "labels.npy", "eval_labels_path": "labels.npy", "eval_fraction": 0.3}
    changes = {f"data.{name}": value for name, value in where.items()}
    return digits(**changes, **{"model.num_classes": 0, "num_steps": 1})


def flow(config):
    return flow_of(from_dict(config.to_dict()))


def test_image_to_image(dark_to_bright, tmp_path):
    """From dark images to bright ones: pairs are drawn anew in every epoch, and so is noise."""
    dark_to_bright.data.flip = True
    run_lib.train(dark_to_bright, tmp_path / "run")
    run = run_lib.load(tmp_path / "run")
    run.task.analyses["transfer"](run.params, run.extra, tmp_path / "run" / "eval" / "x", 4, 0)
    data = run.task.train_data(0, 1)
    seen, mirrored = {}, []
    for _ in range(12):
        batch = next(data)
        assert batch["x0"].max() < 0 < batch["x1"].min() + 0.01
        for x0, x1 in zip(batch["x0"], batch["x1"], strict=True):
            seen.setdefault(np.sort(x1, axis=None).tobytes(), set()).add(x0.tobytes())
            mirrored.append([x[:, :4].mean() < x[:, 4:].mean() for x in (x0, x1)])
    assert max(len(partners) for partners in seen.values()) > 2
    assert abs(np.corrcoef(np.transpose(mirrored))[0, 1]) < 0.5
    held = run.task.eval_data(0)
    assert held is not None and held["x0"].max() < 0


def test_starts_are_training_images_or_held_out_ones(dark_to_bright, kinds):
    data = flow(dark_to_bright).data
    train, held = data.available(True, True), data.available(False, True)
    assert train + held == 40 and held > 1
    parts = [data.start(np.arange(n), 3, part) for n, part in ((train, True), (held, False))]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 40
    assert np.concatenate(parts).max() < 0


def test_pairs_of_images_begin_at_training_images(dark_to_bright):
    """Each is used once, and no more pairs are made than there are."""
    f = flow(dark_to_bright)
    params, _ = make(dark_to_bright)[1].init(jax.random.key(0))
    number = f.data.available(True, True)
    plan = pairs_plan(number=number, shape=f.data.shape)
    pairs = list(generate_pairs.maker(f, params, plan)(np.arange(number)))
    known = {x.tobytes() for x in f.data.start(np.arange(number), 0, True)}
    assert {x0.tobytes() for x0, *_ in pairs} == known
    with pytest.raises(ConfigError, match=f"there are {number} training images"):
        generate_pairs.maker(f, params, dataclasses.replace(plan, number=number + 1))


def test_reflow_between_images_begins_at_images(dark_to_bright, tmp_path):
    """Pairs decide what is trained on, the images where samples begin."""
    some = np.full((8, 8, 1), 0.5, np.float32)
    plan = pairs_plan(number=8, shape=some.shape)
    pairs_lib.write(plan, tmp_path / "p", lambda n: ((some, -some, 0, 1) for _ in n))
    dark_to_bright.data.pairs = str(tmp_path / "p")
    _, task = make(dark_to_bright)
    for batch in (next(task.train_data(0, 1)), task.eval_data(0)):
        assert np.all(batch["x0"] == 0.5) and np.all(batch["x1"] == -0.5)
    x, *_ = flow(dark_to_bright).starts(np.arange(4), jax.random.key(0))
    assert x.max() < 0


def test_some_of_the_images_are_of_all_classes(dark_to_bright):
    """Though files are sorted by class: a part is neither the first ones nor always another."""
    data = flow(dark_to_bright).data
    for training in (False, True):
        ends, labels = data.ends(np.arange(12), training)
        assert set(labels) == {0, 1}
        whole, _ = data.ends(np.arange(80), training)
        np.testing.assert_array_equal(whole[:12], ends)
        assert len(np.unique(whole[:40], axis=0)) == 40
    real = data.real(12, training=True).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(real, ends, atol=1e-6)


def test_analyses_begin_where_nothing_was_trained(tmp_path):
    """Points, too, are a function of the key; pairs have starts of their own."""
    config = toy()
    f = flow(config)
    starts = lambda seed, **how: np.asarray(f.starts(np.arange(50), jax.random.key(seed), **how)[0])
    np.testing.assert_array_equal(starts(0), starts(0))
    assert not np.any(starts(0) == starts(1))
    params, _ = make(config)[1].init(jax.random.key(0))
    make_pairs = generate_pairs.maker(f, params, pairs_plan(number=50, shape=(2,)))
    pairs = list(make_pairs(np.arange(50)))
    assert not np.any(np.stack([x0 for x0, *_ in pairs]) == starts(0, training=True))

    pairs_lib.write(pairs_plan(number=50, shape=(2,)), tmp_path / "p", lambda _: pairs)
    f = flow(toy(**{"data.pairs": str(tmp_path / "p")}))
    flow_analyses.geometry(f, params, {}, tmp_path, 50, 4)
    found = json.loads((tmp_path / "geometry.json").read_text())
    assert found["samples"] == 5  # the tenth that is held out
    cost = np.mean([np.sum(np.square(x1 - x0)) for x0, x1, *_ in pairs[45:]])
    np.testing.assert_allclose(found["squared_pairs"], cost, rtol=1e-5)


def test_geometry_asks_with_the_labels_of_the_ends(monkeypatch, tmp_path):
    """Not with those that samples would have."""
    f = flow(digits())
    params, _ = make(digits())[1].init(jax.random.key(0))
    asked = []
    velocity = type(f).velocity
    spy = lambda self, p, labels, *keys: asked.append(labels) or velocity(self, p, labels, *keys)
    monkeypatch.setattr(type(f), "velocity", spy)
    flow_analyses.geometry(f, params, {}, tmp_path, 16, 2)
    labels = f.data.ends(np.arange(16), training=False)[1]
    np.testing.assert_array_equal(asked[-1], labels)
    assert np.any(labels != np.arange(16) % 10)


def test_noise_of_analyses_is_of_the_row_and_the_way():
    """Whatever is solved beside it, and not the same there and back."""
    f = flow(digits())
    params, _ = make(digits())[1].init(jax.random.key(0))
    zero = np.zeros((260, 8, 8, 1), np.float32)
    still = jax.tree.map(jnp.zeros_like, params)
    solve = lambda text: flow_analyses._solve(f, still, zero, np.zeros(260), text)[0]
    there, back = solve("cm_stochastic:1"), solve("rfpp_invert_euler:1")
    assert np.all(there == 0) and len(np.unique(back, axis=0)) == 260
    noisy = solve("rf_sde:1:1.0")
    assert len(np.unique(noisy, axis=0)) == 260
    cosine = np.sum(noisy * back) / np.linalg.norm(noisy) / np.linalg.norm(back)
    assert abs(cosine) < 0.1


def pairs_plan(**changes) -> pairs_lib.PairsPlan:
    values = {"teacher": "0" * 16, "run": "runs/x, step 1", "solver": "euler:1", "seed": 0}
    values |= {"batch_size": 8, "per_shard": 64, "from_data": False, "num_classes": 0}
    return pairs_lib.PairsPlan(**{**values, **changes})
