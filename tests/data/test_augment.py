"""Augmentation: noise per example, statistics, and what each function does to known images."""

import numpy as np
from PIL import Image
import pytest
from scipy.special import betainc

from scanax.train.data import augment

MIX = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "smoothing": 0.1}


def noise_images(count: int, size: int = 16, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def mixed(images, seed, draws):
    floats = augment.to_float(images, False, seed, draws)
    floats.flags.writeable = False
    labels = images[:, 0, 0, 0].astype(np.int32)
    partners, partner_labels = floats[:, ::-1], 255 - labels
    arguments = {**MIX, "seed": seed, "draws": draws}
    pair = augment.mixup_cutmix(floats, labels, partners, partner_labels, 256, **arguments)
    return np.concatenate([part.reshape(len(images), -1) for part in pair], axis=1)


FUNCTIONS = {
    "flip": augment.flip,
    "crop": lambda x, seed, draws: augment.crop(x, 3, seed, draws),
    "resized": lambda x, seed, draws: augment.random_resized_crop(x, 12, seed=seed, draws=draws),
    "rand_augment": lambda x, seed, draws: augment.rand_augment(x, 2, 9.0, seed, draws),
    "erase": lambda x, seed, draws: augment.erase(x, 0.7, seed, draws),
    "mixup_cutmix": mixed,
    "dequantise": lambda x, seed, draws: augment.to_float(x, True, seed, draws),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_depend_on_seed_and_draw_alone(name, channels):
    function, draws = FUNCTIONS[name], np.arange(24) * 7 + 2**40
    images = noise_images(24, channels=channels)[:, :10]
    images.flags.writeable = False
    result = function(images, 5, draws)
    if name not in ("mixup_cutmix", "dequantise"):
        shape = (12, 12) if name == "resized" else (10, 16)
        assert result.dtype == np.uint8 and result.shape == (24, *shape, channels)
    order = np.random.default_rng(1).permutation(24)
    np.testing.assert_array_equal(function(images[order], 5, draws[order]), result[order])
    for i in range(24):
        alone = function(images[i : i + 1], 5, draws[i : i + 1])
        np.testing.assert_array_equal(alone[0], result[i])
    same = function(images[np.zeros(24, int)], 5, draws)
    assert len(np.unique(same, axis=0)) > 1
    assert (function(images, 6, draws) != result).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_flip_mirrors_half_of_the_images(channels):
    images = noise_images(2000, 8, channels)
    result = augment.flip(images, 0, np.arange(2000))
    mirrored = (result != images).any((1, 2, 3))
    np.testing.assert_array_equal(result[mirrored], images[mirrored][:, :, ::-1])
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 2000**0.5


def crop_offsets(images: np.ndarray, padding: int, seed: int) -> np.ndarray:
    """Recognises every crop among all possible ones -> [B, 2]."""
    height, width = images.shape[1:3]
    result = augment.crop(images, padding, seed, np.arange(len(images)))
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = np.full((len(images), 2), -1)
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, top : top + height, left : left + width]
            offsets[(window == result).all((1, 2, 3))] = top, left
    assert (offsets >= 0).all()
    return offsets


def test_crop_offsets_are_uniform():
    offsets = crop_offsets(noise_images(5000, 8), 2, 0)
    counts = np.bincount(offsets[:, 0] * 5 + offsets[:, 1], minlength=25)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 24 + 4 * (2 * 24) ** 0.5


def test_crop_of_grey_images_that_are_not_square():
    images = noise_images(20, 8, 1)[:, :6]
    assert len(np.unique(crop_offsets(images, 1, 0), axis=0)) > 5
    assert (crop_offsets(images, 0, 0) == 0).all()


def test_functions_do_not_share_their_noise():
    images = noise_images(2000, 8)
    mirrored = (augment.flip(images, 0, np.arange(2000)) != images).any((1, 2, 3))
    offsets = crop_offsets(images, 1, 0)
    assert abs(np.corrcoef(mirrored, offsets[:, 0])[0, 1]) < 4 / 2000**0.5
    assert abs(np.corrcoef(*offsets.T)[0, 1]) < 4 / 2000**0.5


def resize(array: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(array).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def test_resized_boxes_have_the_area_and_the_aspect_asked_for():
    row, column = np.meshgrid(np.arange(64) * 4, np.arange(64) * 4, indexing="ij")
    ramp = np.stack([row, column, row], axis=-1).astype(np.uint8)[None]
    draws = np.arange(400)
    result = augment.random_resized_crop(np.repeat(ramp, 400, axis=0), 32, seed=0, draws=draws)
    # A ramp's slope in the result is the box's side over 32; the outermost pixels are blunted.
    values = result.astype(np.float64)
    height = (values[:, 27, 0, 0] - values[:, 4, 0, 0]) / 23 / 4 * 32
    width = (values[:, 0, 27, 1] - values[:, 0, 4, 1]) / 23 / 4 * 32
    area, aspect = height * width / 64**2, width / height
    assert 0.07 < area.min() < 0.11 and 0.85 < area.max() < 1.02
    assert 0.68 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.45
    assert abs(np.log(aspect).mean()) < 0.04
    top, left = values[:, :, 0, 0].min(1) / 4, values[:, 0, :, 1].min(1) / 4
    free = (height < 48) & (width < 48)
    assert abs((top[free] / (64 - height[free])).mean() - 0.5) < 0.08
    assert abs((left[free] / (64 - width[free])).mean() - 0.5) < 0.08


def test_resized_boxes_are_wide_where_ratio_is_and_get_ten_attempts():
    images, draws = np.repeat(noise_images(1, 32), 300, axis=0), np.arange(300)
    wide = augment.random_resized_crop(images, 8, (0.125, 0.125), (2.0, 2.0), seed=0, draws=draws)
    parts = [images[0, y : y + 8, x : x + 16] for y in range(25) for x in range(17)]
    possible = {resize(part, 8).tobytes() for part in parts}
    assert {image.tobytes() for image in wide} < possible
    # About 0.2 of the attempts fit, so 0.8^10 of the images are left whole.
    large = augment.random_resized_crop(images, 32, (0.9, 1.0), seed=0, draws=draws)
    assert 0.05 < (large == images).all((1, 2, 3)).mean() < 0.2


@pytest.mark.parametrize("ratio, box", [((3, 4), (0, 10, 32, 21)), ((0.25, 0.5), (8, 0, 24, 32))])
def test_without_a_box_that_fits_it_is_central(ratio, box):
    images = noise_images(3, 32)
    result = augment.random_resized_crop(images, 16, (1, 1), ratio, seed=0, draws=np.arange(3))
    left, top, right, bottom = box
    for image, got in zip(images, result, strict=True):
        np.testing.assert_array_equal(got, resize(image[top:bottom, left:right], 16))


def operate(name: str, array: np.ndarray, strength: float) -> np.ndarray:
    result = np.asarray(augment.OPERATIONS[name](Image.fromarray(array), strength))
    assert result.dtype == np.uint8 and result.shape == array.shape
    return result


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_grow_from_nothing(name, channels):
    ramp = 3 * np.arange(32)[:, None, None] + 2 * np.arange(32)[:, None] + 20
    image = (ramp + noise_images(1, 32, channels)[0] // 4).astype(np.uint8).squeeze()
    change = [
        np.abs(operate(name, image, strength).astype(int) - image).mean()
        for strength in (0.0, 0.3, 1.0, -1.0)
    ]
    if name in ("autocontrast", "equalize"):
        assert change[0] == change[1] == change[2] == change[3] > 1
    elif name == "identity" or (name == "color" and channels == 1):
        assert change == [0, 0, 0, 0]
    else:
        assert change[0] == 0 and change[3] > 1 and change[2] >= change[1] > 0.1


def test_operations_on_values():
    image = noise_images(1, 32, 1)[0, ..., 0]
    np.testing.assert_array_equal(operate("solarize", image, 1.0), 255 - image)
    half = np.where(image < 128, image, 255 - image)
    np.testing.assert_array_equal(operate("solarize", image, -0.5), half)
    np.testing.assert_array_equal(operate("posterize", image, -1.0), image & 0xF0)
    np.testing.assert_array_equal(operate("posterize", image, 0.5), image & 0xFC)
    np.testing.assert_allclose(operate("brightness", image, -1.0), image * 0.1, atol=1)
    dark, mean = operate("contrast", image, -1.0), round(image.mean())
    np.testing.assert_allclose(dark, mean + 0.1 * (image.astype(int) - mean), atol=1)
    assert np.diff(operate("sharpness", image, -1.0).astype(int)).std() < np.diff(image).std()
    stretched = operate("autocontrast", image // 4 + 90, 0.0)
    assert stretched.min() <= 1 and stretched.max() >= 254
    squared = (np.linspace(0, 1, 4096) ** 2 * 255).astype(np.uint8).reshape(64, 64)
    assert abs(operate("equalize", squared, 0.0).mean() - 127.5) < 5 < abs(squared.mean() - 127.5)
    coloured = noise_images(1, 32)[0]
    grey, vivid = operate("color", coloured, -1.0), operate("color", coloured, 1.0)
    assert 5 * grey.std(-1).mean() < coloured.std(-1).mean() < 0.9 * vivid.std(-1).mean()


def test_operations_on_places():
    image = noise_images(1, 331)[0]
    moved = operate("translate_x", image, 0.1)
    np.testing.assert_array_equal(moved[:, :-15], image[:, 15:])
    assert (moved[:, -15:] == 128).all()
    moved = operate("translate_y", image, -0.1)
    np.testing.assert_array_equal(moved[15:], image[:-15])
    assert (moved[:15] == 128).all()
    step = np.zeros((100, 100), np.uint8)
    step[:, 50:] = 255
    sheared = operate("shear_x", step, 1.0)  # row y is shifted to the left by 0.3 y
    assert sheared[10, 45] == 0 and sheared[10, 48] == 255
    assert sheared[90, 21] == 0 and sheared[90, 24] == 255 and sheared[90, 99] == 128
    np.testing.assert_array_equal(operate("shear_y", step.T.copy(), 1.0), sheared.T)
    turned = operate("rotate", step, 1.0)  # counter-clockwise: the edge leans to the left
    offset = round(40 * np.tan(np.pi / 6))
    assert turned[10, 47 - offset] == 0 and turned[10, 53 - offset] == 255
    assert turned[0, 0] == turned[99, 99] == 128


def test_rand_augment_draws_operations_strengths_and_signs(monkeypatch):
    calls, names = [], list(augment.OPERATIONS)
    record = lambda name: lambda image, strength: (calls.append((name, strength)), image)[1]
    monkeypatch.setattr(augment, "OPERATIONS", {name: record(name) for name in names})
    images, draws = noise_images(2800, 4), np.arange(2800)
    np.testing.assert_array_equal(augment.rand_augment(images, 2, 5.0, 0, draws), images)
    counts = np.asarray([sum(name == call for call, _ in calls) for name in names])
    assert len(names) == 14 and counts.sum() == 5600
    assert ((counts - 400) ** 2 / 400).sum() < 13 + 4 * (2 * 13) ** 0.5
    strength = np.asarray([strength for _, strength in calls])
    assert abs((strength > 0).mean() - 0.5) < 4 * 0.5 / 5600**0.5
    assert abs(np.abs(strength).mean() - 0.5) < 4 * 0.05 / 5600**0.5
    assert abs(np.abs(strength).std() - 0.05) < 0.003
    calls.clear()
    augment.rand_augment(images, 1, 10.0, 0, draws, magnitude_std=0.0)
    assert len(calls) == 2800 and {abs(strength) for _, strength in calls} == {1.0}
    calls.clear()
    augment.rand_augment(images, 1, 10.0, 0, draws)
    assert max(abs(strength) for _, strength in calls) == 1.0


def test_erase_fills_boxes_with_noise():
    images = np.full((1000, 32, 32, 3), 200, np.uint8)
    result = augment.erase(images, 0.4, 0, np.arange(1000))
    changed = (result != images).any(-1)
    erased = changed.any((1, 2))
    assert abs(erased.mean() - 0.4) < 4 * (0.24 / 1000) ** 0.5
    rows, columns = changed.any(2), changed.any(1)
    boxes = rows[:, :, None] & columns[:, None, :]
    assert (boxes == changed).mean() > 0.99999  # a whole pixel of noise may be 200 by chance
    for sides in (rows, columns):
        assert (np.abs(np.diff(sides.astype(int), axis=1)).sum(1) <= 2).all()
    height, width = rows.sum(1)[erased], columns.sum(1)[erased]
    share, aspect = height * width / 1024, width / height
    assert 0.012 < share.min() < 0.04 and 0.28 < share.max() < 0.36
    assert abs(share.mean() - 0.175) < 0.02
    assert 0.2 < aspect.min() < 0.45 and 2.2 < aspect.max() < 5
    noise = result[boxes]
    assert noise.min() == 0 and noise.max() == 255
    assert abs(noise.mean() - 127.5) < 4 * 73.9 / noise.size**0.5
    assert (augment.erase(images, 0.0, 0, np.arange(1000)) == images).all()
    assert (augment.erase(images, 1.0, 0, np.arange(1000)) != images).any((1, 2, 3)).mean() > 0.99


def mix_white_with_black(count: int, smoothing: float = 0.0, **changes):
    """Images of ones and class 0 with partners of zeros and class 1."""
    shape = (count, 16, 16, 3)
    arguments = {**MIX, "smoothing": smoothing, "seed": 0, "draws": np.arange(count), **changes}
    zero, one = np.zeros(count, np.int32), np.ones(count, np.int32)
    images, partners = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    images, targets = augment.mixup_cutmix(images, zero, partners, one, 4, **arguments)
    assert images.dtype == targets.dtype == np.float32
    assert images.shape == shape and targets.shape == (count, 4)
    return images, targets


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_mixup_weights_have_a_beta_distribution(alpha):
    images, targets = mix_white_with_black(4000, mixup=alpha, cutmix=0.0)
    weight = images[:, 0, 0, 0]
    np.testing.assert_array_equal(
        images, np.broadcast_to(weight[:, None, None, None], images.shape)
    )
    np.testing.assert_allclose(targets[:, 0], weight, atol=1e-6)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(weight.mean() - 0.5) < 4 * (variance / 4000) ** 0.5
    assert abs(weight.var() / variance - 1) < 0.1
    cumulative = np.sort(betainc(alpha, alpha, weight.astype(np.float64)))
    assert np.abs(cumulative - np.arange(4000) / 4000).max() < 2 / 4000**0.5


def test_cutmix_targets_are_the_share_of_pixels():
    images, targets = mix_white_with_black(3000, mixup=0.0)
    np.testing.assert_allclose(targets[:, 0], images.mean((1, 2, 3)), atol=1e-6)
    pasted = images == 0
    assert (pasted | (images == 1)).all() and (pasted.all(-1) == pasted.any(-1)).all()
    rows, columns = pasted.any((2, 3)), pasted.any((1, 3))
    np.testing.assert_array_equal(rows[:, :, None] & columns[:, None, :], pasted.any(-1))
    # Boxes that the edges do not cut are squares of even sides on this square image.
    inner = ~(rows[:, [0, -1]].any(1) | columns[:, [0, -1]].any(1))
    np.testing.assert_array_equal(rows[inner].sum(1), columns[inner].sum(1))
    assert (rows[inner].sum(1) % 2 == 0).all() and rows.sum(1).max() > 10
    density = pasted.any(-1).mean(0)
    assert np.abs(density - density.T).max() < 0.05 and 0.35 < density[8, 8] < 0.65
    # With r^2 = 1 - lambda uniform, a side covers r - r^2 / 4 of an axis on average, and
    # E[(r - r^2 / 4)^2] = 0.32; even sides of whole pixels are a pixel smaller on average.
    assert 0.24 < targets[:, 1].mean() < 0.32


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_switch_is_the_share_of_cutmix(switch):
    images, _ = mix_white_with_black(2000, switch=switch)
    cut = ((images == 0) | (images == 1)).all((1, 2, 3))
    assert abs(cut.mean() - switch) <= 4 * (switch * (1 - switch) / 2000) ** 0.5


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_targets_are_smoothed_and_sum_to_one(mixup, cutmix):
    images, targets = mix_white_with_black(500, 0.1, mixup=mixup, cutmix=cutmix)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(targets[:, 2:], 0.025)
    assert targets.min() >= np.float32(0.025) and targets.max() <= 0.925 + 1e-6
    if mixup or cutmix:
        assert targets[:, 0].std() > 0.1
    else:
        np.testing.assert_allclose(targets[:, :2], [[0.925, 0.025]] * 500)
        assert (images == 1).all()


def test_partners_of_the_same_class_add_up():
    images, labels = np.ones((50, 8, 8, 1), np.float32), np.full(50, 2, np.int32)
    pair = images, labels
    result, targets = augment.mixup_cutmix(*pair, *pair, 3, **MIX, seed=0, draws=np.arange(50))
    np.testing.assert_allclose(result, images, atol=1e-6)
    np.testing.assert_allclose(targets, [[0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]] * 50, atol=1e-6)


def test_to_float_without_noise():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    result = augment.to_float(images, False, 0, np.zeros(1, np.int64))
    assert result.dtype == np.float32 and result.min() == -1 and result.max() == 1
    np.testing.assert_allclose(result, images / 127.5 - 1, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_dequantised_values_fall_back_to_the_pixels(channels):
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = np.tile(values, (500, 1, 1, channels))
    result = augment.to_float(images, True, 0, np.arange(500))
    assert result.dtype == np.float32 and result.min() >= -1 and result.max() < 1
    scaled = (result + np.float32(1)) * np.float32(128)
    np.testing.assert_array_equal(np.floor(scaled), images)
    noise = (scaled - images).astype(np.float64)
    assert abs(noise.mean() - 0.5) < 4 / (12 * noise.size) ** 0.5
    assert abs(noise.var() * 12 - 1) < 0.02
    flat = noise.reshape(500, -1)
    neighbours = np.corrcoef(flat[:, :-1].ravel(), flat[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / flat.size**0.5
    assert len(np.unique(flat[0])) > 0.9 * flat.shape[1] or channels == 3
