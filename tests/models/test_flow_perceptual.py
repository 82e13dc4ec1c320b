"""Perceptual distances: resizing, the random stand-in, and LPIPS against a plain definition."""

import flow_goldens as goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
import scipy.signal

from scanax.models.rectified_flow import lpips, perceptual


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


WIDTHS = (2, 4, 3, 5, 4)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Small VGG16 weights and heads."""
    draw = np.random.default_rng(seed)
    tensors, before = {}, 3
    for i, (width, block) in enumerate(zip(WIDTHS, lpips.BLOCKS, strict=True)):
        for n in block:
            shape = (width, before, 3, 3)
            tensors[f"features.{n}.weight"] = draw.normal(0, (4.5 * before) ** -0.5, shape)
            tensors[f"features.{n}.bias"] = draw.normal(0, 0.1, width)
            before = width
        tensors[f"lin{i}.model.1.weight"] = draw.uniform(0, 1, (1, width, 1, 1))
    return tensors


def images(seed: int, size: int = 20, count: int = 2):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size, size, 3))


def plain_lpips(tensors, x, y, variant: str) -> float:
    """The definition, for one pair [H, W, C], with scipy's correlation and loops."""

    def features(image):
        if variant == "lpips":
            z = (image - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        else:
            z = ((image + 1) / 2 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        z, layers = z.transpose(2, 0, 1), []
        for i, block in enumerate(lpips.BLOCKS):
            if i:
                height, width = z.shape[1] // 2, z.shape[2] // 2
                cells = z[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2)
                z = cells.max((2, 4)) if variant == "lpips" else cells.mean((2, 4))
            for n in block:
                kernel, bias = tensors[f"features.{n}.weight"], tensors[f"features.{n}.bias"]
                correlate = lambda a, k: scipy.signal.correlate2d(a, k, mode="same")
                z = np.stack(
                    [sum(map(correlate, z, k)) + b for k, b in zip(kernel, bias, strict=True)]
                )
                z = np.maximum(z, 0)
            layers.append(z)
        return layers

    total = 0.0
    assert any(np.any(np.all(f == 0, axis=0)) for f in features(x))  # where norms have no gradient
    for i, (f, g) in enumerate(zip(features(x), features(y), strict=True)):
        unit = lambda a: a / (np.sqrt((a**2).sum(0, keepdims=True)) + 1e-10)
        weight = tensors[f"lin{i}.model.1.weight"][0]
        total += (weight * (unit(f) - unit(g)) ** 2).sum(0).mean()
    return total


@pytest.mark.parametrize("variant", lpips.VARIANTS)
def test_lpips(variant, jit, check):
    """Values in both precisions; an image has no distance from itself."""
    tensors = weights()
    distance = jit(lpips.lpips(tensors, variant))
    x, y = images(0), images(1)
    y[1] = x[1]
    want = [plain_lpips(tensors, x[0], y[0], variant), 0]
    check(variant, distance(x, y), want, 1e-10)
    narrow = distance(jnp.float32(x), jnp.float32(y))
    assert narrow.dtype == jnp.float32
    check("float32", narrow, want, 1e-5)


def test_gradient_of_lpips(jit):
    """Against differences; it is zero, not NaN, for equal images and where features are zero."""
    distance = lpips.lpips(weights())
    x, y = images(0), images(1)
    y[1] = x[1]

    def total(x, y):
        value_B = distance(x, y)
        return jnp.sum(value_B), value_B

    run = jit(jax.value_and_grad(total, has_aux=True))
    gradient = np.asarray(run(x, y)[1])
    step = 1e-5 * np.sign(gradient[:1])
    rise = (run(x + step, y)[0][1] - run(x - step, y)[0][1])[0] / 2
    np.testing.assert_allclose(rise, 1e-5 * np.abs(gradient[0]).sum(), rtol=1e-4)
    assert not np.any(gradient[1])
    zero = jnp.zeros((1, 1, 1, 4))  # a norm has no gradient there
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(lpips._normalise(x)))(zero)))


def test_weights_from_files(tmp_path, jit):
    tensors = {key: x.astype(np.float32) for key, x in weights().items()}
    tensors["classifier.0.weight"] = np.zeros((2, 2), np.float32)  # of VGG16, not of LPIPS
    np.savez(tmp_path / "vgg.npz", **tensors)
    save_file(tensors, tmp_path / "vgg.safetensors")
    x, y = (jnp.float32(images(seed, 16, 1)) for seed in range(2))
    files = [lpips.load_lpips(tmp_path / name) for name in ("vgg.npz", "vgg.safetensors")]
    all_of = jit(lambda x, y: [distance(x, y) for distance in (lpips.lpips(tensors), *files)])
    want, *found = all_of(x, y)
    for value in found:
        np.testing.assert_array_equal(value, want)
    assert want > 0


def test_bad_weights(tmp_path):
    tensors = weights()
    with pytest.raises(ValueError, match=r"there is no file .*none.npz"):
        lpips.load_lpips(tmp_path / "none.npz")
    (tmp_path / "vgg.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"vgg.pth: the name must end in .npz or .safetensors"):
        lpips.load_lpips(tmp_path / "vgg.pth")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text.npz: "):
        lpips.load_lpips(tmp_path / "text.npz")
    (tmp_path / "text.safetensors").write_text("not a header")
    with pytest.raises(ValueError, match=r"text.safetensors: "):
        lpips.load_lpips(tmp_path / "text.safetensors")
    np.savez(tmp_path / "part.npz", **{k: x for k, x in tensors.items() if "lin3" not in k})
    with pytest.raises(ValueError, match=r"part.npz: missing lin3.model.1.weight"):
        lpips.load_lpips(tmp_path / "part.npz")
    with pytest.raises(ValueError, match=r"missing features.0.weight.* and 28 more"):
        lpips.lpips({})
    for name, shape in (
        ("features.0.weight", (2, 1, 3, 3)),
        ("features.5.weight", (4, 2, 5, 5)),
        ("features.5.bias", (3,)),
        ("lin2.model.1.weight", (1, 4, 1, 1)),
    ):
        with pytest.raises(ValueError, match=rf"{name} has shape .*, expected"):
            lpips.lpips({**tensors, name: np.zeros(shape)})
    with pytest.raises(ValueError, match="unknown variant 'alex'; choose one of lpips, piq"):
        lpips.lpips(tensors, "alex")
    distance = lpips.lpips(tensors)
    with pytest.raises(ValueError, match="images of 16 pixels or more"):
        distance(jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"of two \[B, H, W, 3\]"):
        distance(jnp.zeros((1, 32, 32, 1)), jnp.zeros((1, 32, 32, 1)))


def test_resizing(check):
    file = goldens.load("slim_losses")
    x = goldens.last(file["resize64_alignTrue_in"])
    found = perceptual.resize_bilinear(x, 64, align_corners=True)
    check("corners", found[0, :, :, 0], file["resize64_alignTrue_out_b0c0"], 1e-9)
    found = perceptual.resize_bilinear(x, 30, align_corners=False)
    shape = (len(x), 30, 30, 3)
    check("half pixels", found, jax.image.resize(x, shape, "bilinear", antialias=False), 1e-12)
    for align_corners in (False, True):
        same = perceptual.resize_bilinear(x, 8, align_corners=align_corners)
        np.testing.assert_allclose(same, x, rtol=1e-12)
        small = perceptual.resize_bilinear(x, 1, align_corners=align_corners)
        assert small.shape == (len(x), 1, 1, 3)
    with pytest.raises(ValueError, match="to a size >= 1"):
        perceptual.resize_bilinear(x, 0, align_corners=True)


def test_random_distance(jit):
    """The same everywhere, none between equals, symmetric; and a scale sees its own detail."""
    x, y = (jnp.float32(images(seed, 17)) for seed in range(2))
    distance, again, other = (perceptual.random_conv_distance(seed) for seed in (0, 0, 1))
    run = jit(lambda x, y: (distance(x, y), distance(y, x), again(x, y), other(x, y)))
    there, back, same, different = run(x, y)
    assert there.shape == (2,) and there.dtype == jnp.float32 and np.all(there > 0)
    np.testing.assert_array_equal(there, back)
    np.testing.assert_array_equal(there, same)
    assert np.all(different != there) and not np.any(run(x, x)[0])
    fine = np.tile(np.float32([[1, -1], [-1, 1]]), (8, 8))[None, :, :, None].repeat(3, axis=3)
    coarse = jit(perceptual.conv_distance([np.zeros((3, 3, 3, 2)), np.ones((3, 3, 3, 2))]))
    assert coarse(fine, 0 * fine) == 0 and coarse(0 * fine + 0.1, 0 * fine) > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: perceptual.conv_distance([]), "needs kernels"),
        (lambda: perceptual.conv_distance([np.zeros((3, 3))]), "needs kernels"),
        (lambda: perceptual.random_conv_distance(scales=0), "must be positive"),
        (
            lambda: perceptual.random_conv_distance()(*2 * [jnp.zeros((1, 3, 3, 3))]),
            "images of 4 pixels or more",
        ),
        (
            lambda: perceptual.random_conv_distance()(*2 * [jnp.zeros((1, 8, 8, 1))]),
            r"of two \[B, H, W, 3\]",
        ),
    ],
)
def test_bad_distances(call, message):
    with pytest.raises(ValueError, match=message):
        call()
