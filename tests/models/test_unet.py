"""The U-Nets: sizes, beginnings, gradients, dropout by rows, precision, mistakes."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import params as params_lib
from scanax.models.layers import dropout
from scanax.models.rectified_flow.diffusion import edm_label, edm_velocity
from scanax.models.unet import EDMUNet, NCSNpp, NCSNppConfig, preset
from scanax.models.unet.edm_embedding import ADMEmbedding, SongEmbedding
from scanax.models.unet.layers import Init
from scanax.train.mesh import MeshConfig, make_mesh, param_shardings

COUNTS = [
    ("rf_cifar10", {}, 61_804_419),
    ("slimflow_27.9m", {}, 27_906_179),
    ("slimflow_15.7m", {}, 15_707_235),
    ("slimflow_15.7m", {"image_size": 64}, 15_707_235),
    ("slimflow_7.0m", {}, 6_989_891),
    ("slimflow_3.4m", {}, 3_437_123),
    ("slimflow_3.4m", {"image_size": 64}, 3_536_195),
    ("rf_celebahq_256", {}, 65_574_549),
    ("rfpp_cifar10", {}, 56_397_827),
    ("rfpp_ffhq64", {}, 62_761_091),
    ("rfpp_imagenet64", {}, 295_899_267),
    ("edm_cifar10", {}, 55_733_891),
    ("edm_cifar10_conditional", {}, 55_735_299),
    ("slimflow_imagenet64_80.7m", {}, 80_685_315),
    ("slimflow_imagenet64_44.7m", {}, 44_685_827),
]
SMALL = {"image_size": 4, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": ()}
SMALL |= {"dropout": 0.5}
SONG = {"model_channels": 4, "num_classes": 3, "augment_dim": 2}
ADM = {"model_channels": 64, "num_classes": 3}
NETS = {
    "ncsnpp": preset("rf_celebahq_256", **SMALL, model_channels=4, init_scale=1.0),
    "song": preset("rfpp_cifar10", **SMALL, **SONG),
    "adm": preset("rfpp_imagenet64", **SMALL, **ADM),
}
NETS["adm_velocity"] = dataclasses.replace(NETS["adm"], parameterisation="velocity")


def module_of(config):
    return NCSNpp(config) if isinstance(config, NCSNppConfig) else EDMUNet(config)


@functools.cache
def shapes(config, function=params_lib.initialise):
    x = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    if function is params_lib.logical_axes:
        return function(module_of(config), x, t)
    return jax.eval_shape(lambda x, t: function(module_of(config), jax.random.key(0), x, t), x, t)


@functools.cache
def example(name: str, dtype: str):
    """Random parameters, images, times, labels; all rows are different."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal(shape).astype(dtype)
    fan = lambda shape: max(int(np.prod(shape[:-1])), 1) ** -0.5
    params = jax.tree.map(lambda s: draw(s.shape) * fan(s.shape), shapes(NETS[name]))
    x, t = draw((3, 4, 4, 3)), np.asarray([0.1, 0.5, 0.9], dtype)
    return params, x, t, None if name == "ncsnpp" else np.asarray([0, 2, 3])


def check_zero(x):
    assert x.size and not x.any()
    return x


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


@pytest.mark.parametrize("name, changes, count", COUNTS)
def test_published_sizes(name, changes, count):
    """EDM's random rates are no parameters there; NCSN++ counts them."""
    config = preset(name, **changes)
    flat = traverse.flatten_dict(shapes(config), sep="/")
    fixed = 0 if isinstance(config, NCSNppConfig) else flat.pop("map/noise/frequencies", None)
    assert params_lib.count(flat) == count
    assert fixed is None or not fixed or fixed.shape == (128,)


@pytest.mark.parametrize("name", ["ncsnpp", "song", "adm"])
def test_gradients(name, jit):
    """Against differences of the loss in float64, with dropout; two networks recompute blocks."""
    with jax.enable_x64(True):
        params, x, t, label = example(name, "float64")
        weight = np.random.default_rng(1).standard_normal(x.shape)

        def loss(config, params, x, keys):
            module = module_of(dataclasses.replace(config, dtype="float64"))
            v = module.apply({"params": params}, x, t, label, keys=keys)
            return jnp.sum(v * weight)

        config = dataclasses.replace(NETS[name], remat=name != "song")
        both = jit(jax.value_and_grad(functools.partial(loss, config), argnums=(0, 1)))
        _, gradients = both(params, x, keys_of(1, 2, 3))
        rng = np.random.default_rng(2)
        direction = jax.tree.map(lambda y: rng.standard_normal(np.shape(y)), (params, x))
        for tree, fixed in ((direction[0], np.zeros_like), (gradients[0], check_zero)):
            where = {"ncsnpp": ("fourier_0",), "song": ("map", "noise"), "adm": ()}[name]
            for key in where:
                tree = tree[key]
            if where:  # the rates of the Fourier features are not trained
                tree["frequencies"] = fixed(tree["frequencies"])
        step = 1e-5
        moved = lambda sign: jax.tree.map(lambda p, d: p + sign * step * d, (params, x), direction)
        difference = sum(s * both(*moved(s), keys_of(1, 2, 3))[0] for s in (1, -1)) / (2 * step)
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradients, direction)
        assert abs(difference / sum(jax.tree.leaves(products)) - 1) < 1e-6


@pytest.mark.parametrize("name", ["ncsnpp", "song", "adm_velocity"])
def test_rows_and_precision(name, jit):
    """A row's dropout is its own, and bfloat16 drops the same."""
    params, x, t, label = example(name, "float32")

    def apply(config):
        run = lambda params, x, t, label, keys: module_of(config).apply(
            {"params": params}, x, t, label, keys=keys
        )
        return jit(run)

    wide = apply(NETS[name])
    v = wide(params, x, t, label, keys_of(1, 2, 3))
    other_x, other_t = x[::-1].copy(), t[::-1].copy()
    other_x[1], other_t[1] = x[1], t[1]
    w = wide(params, other_x, other_t, label, keys_of(7, 2, 8))
    np.testing.assert_allclose(w[1], v[1], rtol=0, atol=2e-6 * np.abs(v[1]).max())
    assert np.abs(w[0] - v[0]).max() > 0.1 * np.abs(v[0]).max()
    again = wide(params, x, t, label, keys_of(4, 2, 3))
    assert np.abs(again[0] - v[0]).max() > 0.05 * np.abs(v[0]).max()
    if label is not None:
        relabelled = wide(params, x, t, label * 0, keys_of(1, 2, 3))
        assert np.abs(relabelled[1] - v[1]).max() > 1e-2 * np.abs(v).max()
    if name == "ncsnpp":  # a time below the training's, even 0, counts as the least
        at = lambda time: np.asarray([time, *t[1:]], np.float32)
        zero, least, next_ = (
            wide(params, x, at(time), label, keys_of(1, 2, 3)) for time in (0, 1e-3, 2e-3)
        )
        np.testing.assert_array_equal(zero, least)
        assert np.isfinite(zero).all() and np.abs(next_ - zero).max() > 0.1 * np.abs(zero).max()
    half = dataclasses.replace(NETS[name], dtype="bfloat16")
    low = apply(half)(params, x, t, label, keys_of(1, 2, 3))
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - v).max() < 0.1 * np.abs(v).max()


def test_no_class_is_a_vector_of_zeros(jit):
    """As are classes that are not given; those of a row differ."""
    for name, kind in (("song", SongEmbedding), ("adm", ADMEmbedding)):
        module = kind(NETS[name], Init(nn.initializers.normal(0.5)))
        noise_B, classes = jnp.asarray([0.1, 0.1]), jax.nn.one_hot(jnp.asarray([1, 3]), 3)

        def run(noise_B, classes, module=module):
            params = module.init(jax.random.key(0), noise_B, None, None)
            return [module.apply(params, noise_B, given, None) for given in (classes, None)]

        given, none = jit(run)(noise_B, classes)
        np.testing.assert_array_equal(given[1], none[1])
        assert np.abs(given[0] - none[0]).max() > 1e-3


def test_dropout():
    """The share that is dropped, what is left, and rows of odd size."""
    x = jnp.ones((4, 101, 101))
    y = np.asarray(jax.jit(lambda keys: dropout(x, 0.3, keys))(keys_of(1, 1, 2, 3)))
    np.testing.assert_array_equal(y[0], y[1])
    assert (y[0] != y[2]).mean() > 0.3
    assert abs((y == 0).mean() - 0.3) < 0.01 and abs(y.max() - 1 / 0.7) < 1e-4
    assert dropout(x, 0.0, keys_of(1, 2, 3, 4)) is x and dropout(x, 0.3, None) is x


@pytest.mark.parametrize("name", ["ncsnpp", "song", "adm"])
def test_beginning(name, jit):
    """Standard deviations of the published initialisers, and how large the output is."""
    width = 64
    config = dataclasses.replace(NETS[name], model_channels=width, dropout=0.0, channel_mult=(1,))
    config = dataclasses.replace(config, attn_resolutions=(4,))
    if name == "ncsnpp":
        config = dataclasses.replace(config, init_scale=0.0)
    x, t = jnp.ones((1, 4, 4, 3)), jnp.asarray([0.5])
    params = jit(lambda: params_lib.initialise(module_of(config), jax.random.key(0), x, t))()
    flat = traverse.flatten_dict(params, sep="/")
    block = {"ncsnpp": "block_4"}.get(name, "enc_4x4_block0")
    attention = {"ncsnpp": "attention_5"}.get(name, f"{block}/attention")
    xavier = lambda a, b: (2 / (a + b)) ** 0.5
    conv, four = xavier(9 * width, 9 * width), 4 * width
    want = {
        "ncsnpp": {
            "conv0": conv,
            "conv1": 1e-5 * conv,
            "affine": xavier(four, width),
            "qkv": 0.1**0.5 * xavier(width, width),
            "proj": 1e-5 * xavier(width, width),
        },
        "song": {
            "conv0": conv,
            "conv1": 1e-5 * conv,
            "affine": xavier(four, width),
            "qkv": 0.2**0.5 * xavier(width, 3 * width),
            "proj": 1e-5 * xavier(width, width),
        },
        "adm": {
            "conv0": (3 * 9 * width) ** -0.5,
            "conv1": 0.0,
            "affine": (3 * four) ** -0.5,
            "qkv": (3 * width) ** -0.5,
            "proj": 0.0,
        },
    }[name]
    for layer, std in want.items():
        part = f"{attention if layer in ('qkv', 'proj') else block}/{layer}"
        found = np.asarray(flat[f"{part}/kernel"])
        assert abs(found.std() - std) <= 0.05 * std, layer
        assert np.abs(found).max() <= 3**0.5 * std * 1.001, layer
        fan_in = np.prod(found.shape[:-1])
        bias = np.abs(flat[f"{part}/bias"]).max() * fan_in**0.5
        assert 0.8 < bias <= 1 if name == "adm" and std else bias == 0, layer
    if name == "ncsnpp":
        assert 12 < np.std(flat["fourier_0/frequencies"]) < 20
    if name == "adm":
        assert abs(np.std(flat["map/label/kernel"]) - 1) < 0.1
    last = {"ncsnpp": "output_", "song": "aux_conv", "adm": "out_conv"}[name]
    (path,) = [p for p in flat if last in p and p.endswith("/kernel")]
    assert np.abs(flat[path]).max() < 1e-4


def test_every_parameter_can_be_split():
    mesh = make_mesh(MeshConfig(1, 2, 2, 1, 1))
    for name in ("slimflow_3.4m", "rfpp_ffhq64", "slimflow_imagenet64_44.7m"):
        config = preset(name, channel_mult=(1, 2), num_blocks=1)
        axes = shapes(config, params_lib.logical_axes)
        shardings = param_shardings(mesh, shapes(config), axes)
        flat = traverse.flatten_dict(shapes(config), sep="/")
        specs = traverse.flatten_dict(shardings, sep="/")
        whole = sum(leaf.size for p, leaf in flat.items() if not any(specs[p].spec))
        assert whole < 0.01 * params_lib.count(flat), name


def test_preconditioned_velocity(jit):
    """(D - x) / (1 - t) with EDM's denoiser D (Karras et al. 2022, equation 7), and both ends."""
    network = lambda x, noise_B: jnp.sin(3 * x) + noise_B[:, None, None, None] * x
    rng, sigma_data = np.random.default_rng(0), 0.5
    run = jit(lambda x, t_B: edm_velocity(network, x, t_B, sigma_data))
    t = np.asarray([1e-4, 0.01, 0.3, 0.5, 0.8, 0.99, 1 - 1e-4])
    x = rng.standard_normal((len(t), 2, 2, 3))
    t_B, x32 = t[:, None, None, None], jnp.asarray(x, jnp.float32)
    sigma = (1 - t_B) / t_B
    total = np.sqrt(sigma**2 + sigma_data**2)
    raw = np.sin(3 * x / t_B / total) + np.log(sigma) / 4 * x / t_B / total
    denoised = (sigma_data / total) ** 2 * x / t_B + sigma * sigma_data / total * raw
    want = (denoised - x) / (1 - t_B)
    got = run(x32, jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(got, want, 2e-4, 2e-4)  # in float32, 1 - 1e-4 has four digits
    with jax.enable_x64(True):
        got = run(jnp.asarray(x), jnp.asarray(t))
        np.testing.assert_allclose(got, want, 1e-9, 1e-9)
    ends = run(x32, jnp.asarray([0.0, 1.0, *t[2:]], jnp.float32))[:2]
    label = np.log(1e5) / 4
    want = [
        -x[0] + sigma_data * (np.sin(3 * x[0]) + label * x[0]),
        x[1] + np.sin(6 * x[1]) - label * 2 * x[1],
    ]
    np.testing.assert_allclose(ends, want, 2e-3, 2e-3)
    assert abs(edm_label(jnp.asarray([0.5]))[0]) < 1e-7


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("song", {"image_size": 5}, "multiple of 2"),
        ("song", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ("song", {"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ("song", {"channel_mult": ()}, "channel_mult must be positive"),
        ("song", {"model_channels": 6}, "multiple of 4"),
        ("song", {"model_channels": 148}, "multiples of 32"),
        ("song", {"num_blocks": 0}, "num_blocks must be at least 1"),
        ("song", {"resample_filter": (1, 2, 1)}, "resample_filter must be symmetric"),
        ("song", {"encoder_type": "skip"}, "encoder_type must be one of standard, residual"),
        ("song", {"parameterisation": "noise"}, "parameterisation must be one of velocity, edm"),
        ("song", {"sigma_data": 0.0}, "sigma_data must be positive"),
        ("adm", {"num_classes": -1}, "num_classes must be at least 0"),
        ("ncsnpp", {"progressive": "residual"}, "does not run in the published code"),
        ("ncsnpp", {"progressive_input": "residual", "fir": False}, "needs model.fir=true"),
        ("ncsnpp", {"embedding_type": "positional"}, "scale_by_sigma needs"),
        ("ncsnpp", {"embedding_type": "learned"}, "embedding_type must be one of"),
    ],
)
def test_wrong_configurations(name, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NETS[name], **changes)


def test_wrong_inputs():
    x, t, label = jnp.zeros((2, 4, 4, 3)), jnp.zeros(2), jnp.zeros(2, int)
    init = lambda config, *inputs: jax.eval_shape(
        module_of(config).init, jax.random.key(0), *inputs
    )
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 1\), but model.image_size is 4"):
        init(NETS["song"], x[..., :1], t)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 2, 3\), but model.image_size is 4"):
        init(NETS["ncsnpp"], x[:, :, :2], t)
    with pytest.raises(ValueError, match=r"NCSN\+\+ has no classes"):
        init(NETS["ncsnpp"], x, t, label)
    with pytest.raises(ValueError, match="num_classes is 0"):
        init(dataclasses.replace(NETS["adm"], num_classes=0), x, t, label)
    with pytest.raises(ValueError, match=r"unknown preset 'edm'; choose one of rf_cifar10, "):
        preset("edm")
