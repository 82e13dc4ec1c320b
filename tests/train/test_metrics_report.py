"""Feature extractors and their names, the report, grey levels, grids of images."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import scipy.signal

from scanax.configs import base
from scanax.train import load, metrics, train
from scanax.train.data import embedded
from scanax.train.grid import image_grid, write_png
from scanax.train.metrics import batches, random_conv
from scanax.train.quantise import quantise

DIGITS = embedded.digits()[0]
REAL, OTHERS = DIGITS[:300], DIGITS[300:600]
NOISE = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A classifier of digits after a few updates."""
    config = base.get_config("image_classification", "convnet")
    config.update_from_flattened_dict(
        {
            "num_steps": 30,
            "mesh.data": 1,
            "model.stages": (8, 16),
            "model.convs_per_stage": 1,
            "model.feature_size": 16,
            "data.channels": 1,
            "optimizer.learning_rate": 1e-2,
            "evaluation.batches": 0,
            "checkpoint.asynchronous": False,
        }
    )
    folder = tmp_path_factory.mktemp("classifier")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train(config, folder)
    return folder


def test_pixels():
    found = metrics.make_extractor("pixels")
    features = found(REAL[:2])
    assert (found.name, features.shape, features.dtype) == ("pixels-v1", (2, 64), np.float64)
    np.testing.assert_allclose(features[1], REAL[1].ravel() / 127.5 - 1)


@pytest.mark.parametrize("number", [300, 40])
def test_pca(number):
    """Variances are the largest eigenvalues; the name is that of the images fitted to."""
    images = REAL[:number]
    found = metrics.make_extractor("pca:6", images)
    x = images.reshape(number, -1) / 127.5 - 1
    covariance = np.cov(found(images), rowvar=False)
    largest = np.linalg.eigvalsh(np.cov(x, rowvar=False))[::-1][:6]
    np.testing.assert_allclose(covariance, np.diag(largest), atol=1e-10)
    np.testing.assert_allclose(found(images).mean(0), 0, atol=1e-10)
    assert found.name == metrics.make_extractor("pca:6", images.copy()).name
    assert found.name != metrics.make_extractor("pca:6", OTHERS[:number]).name


def test_random_convolutions():
    """A function of the seed and of each image alone; grey is equal red, green and blue."""
    first, again, other = (metrics.make_extractor(f"random_conv:{i}") for i in (0, 0, 1))
    images = np.random.default_rng(1).integers(0, 256, (batches.BATCH + 3, 6, 7, 3), np.uint8)
    features = first(images)
    assert features.shape == (len(images), 448) and features.dtype == np.float64
    np.testing.assert_array_equal(features, again(images))
    np.testing.assert_array_equal(features[-2:], first(images[-2:]))
    assert np.abs(features - other(images)).max() > 0.1
    assert first.name == again.name == metrics.make_extractor("random_conv").name != other.name
    assert "seed 1" in other.name
    grey = images[:4, ..., :1]
    np.testing.assert_array_equal(first(grey), first(np.repeat(grey, 3, axis=-1)))


def test_random_convolutions_by_definition():
    """In float64, one channel at a time."""
    kernels = random_conv.weights(7)
    image = np.random.default_rng(0).integers(0, 256, (1, 6, 7, 3), np.uint8)
    maps, want = np.moveaxis(image[0] / 127.5 - 1, -1, 0), []
    for i, kernel in enumerate(kernels):
        if i:  # means of 2 x 2
            rows, columns = maps.shape[1] // 2 * 2, maps.shape[2] // 2 * 2
            maps = sum(maps[:, a:rows:2, b:columns:2] for a in (0, 1) for b in (0, 1)) / 4
        convolve = lambda f, kernel=kernel, maps=maps: sum(
            scipy.signal.correlate2d(maps[c], kernel[:, :, c, f], "same") for c in range(len(maps))
        )
        maps = np.maximum([convolve(f) for f in range(kernel.shape[-1])], 0)
        want += [maps.mean(axis=(1, 2)), maps.std(axis=(1, 2))]
    found = metrics.make_extractor("random_conv:7")(image)[0]
    np.testing.assert_allclose(found, np.concatenate(want), atol=1e-5)


def test_classifier(workdir):
    """Features are what the head sees; the name knows data, accuracy and parameters."""
    found = metrics.make_extractor(f"classifier:{workdir}")
    classifier = metrics.load_classifier(workdir)
    run = load(workdir)
    accuracy = json.loads((workdir / "eval/00000030/metrics.json").read_text())["accuracy"]
    assert f"convnet, data embedded {run.task.train_data(0, 1).identity['fingerprint']}" in (
        found.name
    )
    assert f"step 30, accuracy {accuracy:.4f}, parameters " in found.name
    features, p = classifier.features_and_probabilities(REAL)
    np.testing.assert_array_equal(features, found(REAL).astype(np.float32))
    assert features.shape == (300, 16) and p.shape == (300, 10)
    batch = jnp.asarray(run.task.eval_data(0)["images"])  # floats, as in the evaluation
    want, logits = run.task.features(run.params, run.extra, batch)
    features, p = classifier.features_and_probabilities(quantise(batch).images)
    np.testing.assert_allclose(features, want, atol=1e-5)
    np.testing.assert_allclose(p, jax.nn.softmax(logits), atol=1e-5)
    assert 1 <= metrics.class_score(p).mean <= 10
    with pytest.raises(ValueError, match=r"images of shape \(8, 9, 1\), but the classifier"):
        found(np.zeros((2, 8, 9, 1), np.uint8))
    (workdir / "eval/00000030/metrics.json").rename(workdir / "moved.json")
    assert "accuracy unknown" in metrics.classifier_features(workdir).name
    (workdir / "moved.json").rename(workdir / "eval/00000030/metrics.json")


def test_extractor_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def corners(images):\n    return images[:, 0, 0].astype('float32')\n"
        "def named(images):\n    return images[:, 0, 0]\n"
        "named.name = 'inception-v3 of mine'\n"
        "def wrong(images):\n    return images\n"
    )
    corners = metrics.make_extractor(f"{file}:corners")
    np.testing.assert_array_equal(corners(REAL), REAL[:, 0, 0].astype(np.float64))
    assert corners.name.startswith("mine.py:corners, file ")
    assert metrics.make_extractor(f"{file}:named").name == "inception-v3 of mine"
    with pytest.raises(ValueError, match=r"shape \(300, 8, 8, 1\) of 300 images"):
        metrics.make_extractor(f"{file}:wrong")(REAL)
    with pytest.raises(ValueError, match="has no function 'absent'"):
        metrics.make_extractor(f"{file}:absent")
    with pytest.raises(ValueError, match=r"there is no Python file .*other\.py"):
        metrics.make_extractor(f"{tmp_path / 'other.py'}:f")


@pytest.mark.parametrize("kind", ["pixel", "pca", "pca:x", "random_conv:-1", "classifier", "f.py"])
def test_unknown_features(kind):
    with pytest.raises(ValueError, match=r"unknown features .* choose one of pixels, pca:D"):
        metrics.make_extractor(kind, REAL)


SETTINGS = {"kid_subsets": 10, "kid_subset_size": 100, "projections": 32}


def test_report():
    """Digits against other digits and against noise; JSON; other rows of the same images."""
    extractor = metrics.make_extractor("random_conv")
    same, noise = (metrics.evaluate(REAL, x, extractor, **SETTINGS) for x in (OTHERS, NOISE))
    assert json.loads(json.dumps(same)) == same
    assert (noise["real_count"], noise["generated_count"]) == (300, 200)
    assert same["extractor"] == extractor.name and "fid" not in same
    for name in ("frechet_distance", "kid", "energy_distance", "sliced_wasserstein"):
        assert noise[name] > 5 * abs(same[name]), name
    for name in ("precision", "recall", "density", "coverage"):
        assert noise[name] < 0.1 < 0.4 < same[name], name
    a, b = extractor(REAL), extractor(OTHERS)
    assert same["frechet_distance"] == metrics.frechet_distance(a, b)
    assert same["recall"] == metrics.neighbour_metrics(a, b, k=3).recall
    flat = (x.reshape(len(x), -1) / 127.5 - 1 for x in (REAL, OTHERS))
    sliced = metrics.sliced_wasserstein(*flat, order=2, projections=32)
    assert abs(same["sliced_wasserstein"] / sliced - 1) <= 1e-10
    text = metrics.table([same, noise], ["digits", "noise"])
    assert f"features: {extractor.name}" in text and "FID" not in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    with pytest.raises(ValueError, match="1 labels for 2 reports"):
        metrics.table([same, noise], ["digits"])


def test_report_of_statistics_and_limits():
    """The Frechet distance of all real images, pairs of the first ones only."""
    pixels = metrics.pixels()
    statistics = metrics.statistics(pixels(DIGITS), pixels.name)
    found = metrics.evaluate(
        REAL, OTHERS, pixels, real_statistics=statistics, pairs_limit=50, k=2, **SETTINGS
    )
    other = metrics.statistics(pixels(OTHERS), pixels.name)
    assert found["frechet_distance"] == metrics.frechet_of_statistics(statistics, other)
    assert (found["statistics_count"], found["real_count"]) == (len(DIGITS), 300)
    a, b = pixels(REAL[:50]), pixels(OTHERS[:50])
    assert found["energy_distance"] == metrics.energy_distance(a, b)
    assert found["coverage"] == metrics.neighbour_metrics(a, b, k=2).coverage
    with pytest.raises(ValueError, match="different features"):
        random = metrics.make_extractor("random_conv")
        metrics.evaluate(REAL, OTHERS, random, real_statistics=statistics, **SETTINGS)


def test_only_inception_features_make_a_fid():
    inception = metrics.Features("inception-v3, weights 0123", lambda x: x.reshape(len(x), -1))
    found = metrics.evaluate(REAL, OTHERS, inception, **SETTINGS)
    assert found["fid"] == found["frechet_distance"]
    assert "FID" in metrics.table([found])


@pytest.mark.parametrize(
    "real, generated, message",
    [
        (REAL / np.float32(255), OTHERS, "the real images are float32; make them uint8"),
        (REAL, OTHERS[..., 0], r"the generated images must be \[N, H, W, C\]"),
        (REAL, OTHERS[:, :4], r"real images are \(8, 8, 1\), generated ones \(4, 8, 1\)"),
        (REAL, OTHERS[:3], "3 generated images; the metrics need 4 at least"),
    ],
)
def test_images_that_cannot_be_compared(real, generated, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(real, generated, metrics.pixels())


def test_other_mistakes(workdir):
    with pytest.raises(ValueError, match=r"pca:0 .* D must be 1 to 64"):
        metrics.make_extractor("pca:0", REAL)
    with pytest.raises(ValueError, match=r"pca:9 .* D must be 1 to 8"):
        metrics.make_extractor("pca:9", REAL[:9])
    with pytest.raises(ValueError, match="fitted to the real images: give them"):
        metrics.make_extractor("pca:4")
    with pytest.raises(ValueError, match="pca was fitted to"):
        metrics.pca(REAL, 4)(np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="1 or 3 channels"):
        metrics.make_extractor("random_conv")(np.zeros((2, 8, 8, 2), np.uint8))


def test_grey_levels():
    """Every level survives; the nearest one is taken; what is far outside is counted."""
    levels = np.arange(256, dtype=np.uint8)
    for dtype in (np.float32, np.float64):
        exact = quantise((levels / 127.5 - 1).astype(dtype))
        np.testing.assert_array_equal(exact.images, levels)
        assert exact.images.dtype == np.uint8 and exact.clipped == 0
    near = (levels + 0.49) / 127.5 - 1, (levels - 0.49) / 127.5 - 1
    np.testing.assert_array_equal([quantise(x).images for x in near], [levels, levels])
    outside = quantise(np.asarray([-1.5, -1.001, 0.0, 1.002, 1.1, 7.0]))
    np.testing.assert_array_equal(outside.images, [0, 0, 128, 255, 255, 255])
    assert outside.clipped == 0.5
    with pytest.raises(ValueError, match="2 of 4 values of the images are NaN or infinite"):
        quantise(np.asarray([0.0, np.nan, -np.inf, 1.0]))
    with pytest.raises(ValueError, match="not uint8"):
        quantise(levels)


def test_grid(tmp_path):
    """Five images in three columns, enlarged; the gaps and the empty place are grey."""
    images = np.arange(5 * 30 * 40 * 3, dtype=np.uint32).reshape(5, 30, 40, 3).astype(np.uint8)
    grid = image_grid(images)
    scale = 3  # 30 * 3 >= 64 > 30 * 2
    assert grid.shape == (2 * 30 * scale + 2, 3 * 40 * scale + 4, 3)
    second_row = grid[30 * scale + 2 :]
    np.testing.assert_array_equal(second_row[::scale, : 40 * scale : scale], images[3])
    third = grid[: 30 * scale, 2 * (40 * scale + 2) :]
    np.testing.assert_array_equal(third[2::scale, 1::scale], images[2])
    assert (second_row[:, -40 * scale :] == 128).all()
    assert (grid[:, 40 * scale : 40 * scale + 2] == 128).all()
    assert image_grid(images, columns=9, scale=1).shape == (30, 5 * 40 + 8, 3)
    floats = REAL[:4].astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(image_grid(floats), image_grid(REAL[:4]))
    for name, shown in (("grey", REAL[:4]), ("colour", images)):
        write_png(tmp_path / f"{name}.png", shown, columns=2)
        read = np.asarray(Image.open(tmp_path / f"{name}.png"))
        np.testing.assert_array_equal(read, np.squeeze(image_grid(shown, columns=2)))


@pytest.mark.parametrize(
    "images, options, message",
    [
        (np.full((1, 2, 2, 1), np.nan, np.float32), {}, "4 of 4 values of the images are NaN"),
        (np.zeros((0, 2, 2, 1), np.uint8), {}, r"needs images \[N, H, W, 1 or 3\]"),
        (np.zeros((2, 2, 2, 2), np.uint8), {}, r"needs images \[N, H, W, 1 or 3\]"),
        (np.zeros((2, 2, 2, 1), np.int32), {}, "must be floats .* not int32"),
        (REAL, {"columns": 0}, "columns and scale must be at least 1"),
        (REAL, {"scale": 0}, "columns and scale must be at least 1"),
    ],
)
def test_images_without_a_grid(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)
