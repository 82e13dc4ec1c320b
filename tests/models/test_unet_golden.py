"""The U-Nets against the published code: outputs, names of the tensors, halving and doubling."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import interop
from scanax.models.unet import resample

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "rectflow"
NCSNPP = ("unet_ddpmpp", "unet_ncsnpp_skip_fir", "unet_ncsnpp_resin_fir")
EDM = ("edmnet_songunet_ddpmpp", "edmnet_songunet_ncsnpp", "edmnet_dhariwal")


def load(name: str, dtype: str = "float32"):
    """The file, images NHWC; its tensors in ``dtype``; the public config; the family."""
    file = dict(np.load(GOLDEN / f"{name}.npz"))
    tensors = {k[3:]: x.astype(dtype) for k, x in file.items() if k.startswith(("w::", "b::"))}
    file = {k: np.moveaxis(x, 1, -1) if x.ndim == 4 else x for k, x in file.items()}
    family = "ncsnpp" if name in NCSNPP else name.removesuffix("_ddpmpp").removesuffix("_ncsnpp")
    return file, tensors, json.loads(str(file["config_json"])), family.replace("edmnet", "edm")


@pytest.mark.parametrize("name", [*NCSNPP, *EDM])
def test_velocity(name, jit):
    """By our time: that of NCSN++ is the published one; that of 2-RF++ runs from data to noise."""
    file, tensors, config, family = load(name)
    module, params = interop.from_torch(family, tensors, config)
    classes = file.get("class_onehot")
    label_B = None if classes is None else jnp.asarray(classes.argmax(-1))
    t_B = jnp.asarray(file["t"])
    want, tolerance = (file["y"], 2e-4) if family == "ncsnpp" else (-file["vel"], 1e-4)
    t_B = t_B if family == "ncsnpp" else 1 - t_B
    apply = jit(lambda params, x, t_B: module.apply({"params": params}, x, t_B, label_B))
    got = apply(params, jnp.asarray(file["x"]), t_B)
    assert got.dtype == jnp.float32 and np.abs(got - want).max() <= tolerance


@pytest.mark.parametrize("name", [*NCSNPP, *EDM])
def test_raw_network_in_float64(name, jit):
    """Of the published features of the time, which it has in float32, for NCSN++."""
    with jax.enable_x64(True):
        file, tensors, config, family = load(name, "float64")
        module, params = interop.from_torch(family, tensors, config)
        wide = lambda key: jnp.asarray(file[key].astype("float64")) if key in file else None
        if family == "ncsnpp":
            inputs = wide("x"), wide("label"), jnp.asarray(file["temb_in"])
            want, tolerance = file["y64"], 1e-6
        else:
            inputs = wide("x"), wide("c_noise"), wide("class_onehot")
            want, tolerance = file["y_rawF_f64_attnf32"], 1e-5
        apply = jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method="raw"))
        got = apply(params, *inputs)
        assert got.dtype == jnp.float64 and np.abs(got - want).max() <= tolerance


@pytest.mark.parametrize("name", [NCSNPP[1], EDM[1], EDM[2]])
def test_round_trip_is_exact(name):
    """Fixed values too: the random rates, and what is made anew from the configuration."""
    _, tensors, config, family = load(name)
    module, params = interop.from_torch(family, tensors, config)
    back = interop.to_torch(family, params, config)
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    fixed = back.keys() - tensors.keys()
    if family == "ncsnpp":
        assert fixed == {"sigmas"} and back["sigmas"].shape == (1000,)
        np.testing.assert_allclose(back["sigmas"][[0, -1]], [50, 0.01])
        names = {f"module.{k}": x for k, x in back.items()}  # of torch's DataParallel
        jax.tree.map(np.testing.assert_array_equal, params, from_torch(family, names, config))
    else:
        assert fixed and all(k.endswith(".resample_filter") for k in fixed)
        assert "enc.8x8_down.skip.resample_filter" in fixed
        value = back["dec.16x16_up.conv0.resample_filter"]
        assert abs(value.sum() - 1) < 1e-6 and value.shape[:2] == (1, 1)
    again = from_torch(family, back, config)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    public = interop.find(family).public_config(module.config)
    assert interop.find(family).config(public, "float32") == module.config
    given = {k: v for k, v in config.items() if k in public}
    assert {k: public[k] for k in given} == given and len(given) >= 7


def from_torch(family, tensors, config):
    return interop.from_torch(family, tensors, config)[1]


def test_wrong_tensors_are_named():
    _, tensors, config, family = load("edmnet_songunet_ncsnpp")
    name = "enc.8x8_block0.qkv.weight"
    with pytest.raises(ValueError, match=rf"tensor missing: {name}"):
        from_torch(family, {k: x for k, x in tensors.items() if k != name}, config)
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(47, 16, 1, 1\), expected"):
        from_torch(family, {**tensors, name: tensors[name][:-1]}, config)
    with pytest.raises(ValueError, match="tensor not expected: more"):
        from_torch(family, {**tensors, "more": tensors[name]}, config)
    name = "dec.16x16_up.conv0.resample_filter"
    with pytest.raises(ValueError, match=f"tensor {name} is not what the config says"):
        from_torch(family, {**tensors, name: np.ones((1, 1, 4, 4), np.float32)}, config)
    _, tensors, config, family = load("unet_ddpmpp")
    with pytest.raises(ValueError, match=r"tensor missing: all_modules\.6\.NIN_1\.W"):
        name = "all_modules.6.NIN_1.W"
        from_torch(family, {k: x for k, x in tensors.items() if k != name}, config)
    with pytest.raises(ValueError, match="tensor sigmas is not what the config says"):
        from_torch(family, {**tensors, "sigmas": np.ones(10)}, config)


@pytest.mark.parametrize(
    "family, config, message",
    [
        ("ncsnpp", {"resblock_type": "ddpm"}, "resblock_type='ddpm' is not supported"),
        ("ncsnpp", {"progressive": "residual"}, "does not run in the published code either"),
        ("ncsnpp", {"progressive_combine": "cat"}, "only 'sum' is"),
        ("edm_songunet", {}, "config lacks img_resolution"),
        ("edm_songunet", {"img_resolution": 8, "decoder_type": "skip"}, "only 'standard' is"),
        ("edm_dhariwal", {"img_resolution": 64, "out_channels": 6}, "only 3 is"),
    ],
)
def test_what_is_not_supported(family, config, message):
    with pytest.raises(ValueError, match=message):
        interop.from_torch(family, {"some": np.zeros(1, np.float32)}, config)


def test_families_are_known_by_their_tensors():
    families = {name: load(name) for name in (NCSNPP[0], *EDM)}
    names = json.dumps({name: [*tensors] for name, (_, tensors, _, _) in families.items()})
    code = "import json, sys; from scanax.models.interop.__main__ import guess;"
    code += "print(json.dumps({k: guess(v) for k, v in json.load(sys.stdin).items()}))"
    found = subprocess.check_output([sys.executable, "-c", code], input=names, text=True)
    want = {name: family for name, (_, _, _, family) in families.items()}
    assert json.loads(found.splitlines()[-1]) == want


def test_resampling(jit):
    """Of NCSN++; EDM's shrinking convolution is the same, in the other order."""
    file = {k: np.moveaxis(x, 1, -1) for k, x in np.load(GOLDEN / "resample.npz").items()}
    kernel = jnp.asarray(np.load(GOLDEN / "resample.npz")["w"].transpose(2, 3, 1, 0))
    taps = (1, 3, 3, 1)

    @jit
    def run(x):
        smoothed, dimensions = resample.smooth(x, taps, 2), ("NHWC", "HWIO", "NHWC")
        convolve = jax.lax.conv_general_dilated
        return {
            "up_fir": resample.upsample(x, taps),
            "down_fir": resample.downsample(x, taps),
            "naive_up": resample.upsample(x, resample.NEAREST),
            "naive_down": resample.downsample(x, resample.NEAREST),
            "conv_down_fir": convolve(
                smoothed, kernel, (2, 2), "VALID", dimension_numbers=dimensions
            ),
        }

    for name, got in run(jnp.asarray(file["x"])).items():
        assert got.shape == file[name].shape, name
        assert np.abs(got - file[name]).max() <= 1e-5, name
