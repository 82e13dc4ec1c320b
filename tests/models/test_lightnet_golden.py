"""LightNet against the published layer and language model, and the mixer over grids."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import interop, layout
from scanax.models.lightnet import LightNetLMConfig, Mixer, lrpe
from scanax.models.lightnet.interop import config_from_fla, layer_table

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lightnet"
LAYER, LM, GRID = (
    dict(np.load(GOLDEN / f"{name}.npz")) for name in ("fla_layer", "fla_lm", "lna_noncausal_layer")
)
LAYER_META, LM_META, GRID_META = (json.loads(str(file["meta"])) for file in (LAYER, LM, GRID))


def part(file, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): x for key, x in file.items() if key.startswith(prefix)}


def fla_layer(name: str):
    """Our mixer's config and parameters, and the case's inputs and outputs."""
    public = {"num_heads": None, "vocab_size": 1, **LAYER_META[name]["ctor"]}
    config = config_from_fla(public, "float32")
    params = layout.load(layer_table(config), part(LAYER, f"w__{name}__"))
    return config, params, part(LAYER, f"in__{name}__"), part(LAYER, f"out__{name}__")


def both(function):
    """(params, x, dy) -> y and the gradients."""

    def run(params, x, dy):
        y, pull = jax.vjp(function, params, x)
        return y, *pull(dy)

    return run


@pytest.mark.parametrize("name", LAYER_META)
def test_published_layer(name, jit, check):
    config, params, inputs, outputs = fla_layer(name)
    mask = jnp.asarray(inputs["mask"] > 0) if "mask" in inputs else None
    mixer = Mixer(config, causal=True)
    apply = lambda params, x: mixer.apply({"params": params}, x, mask=mask)[0]
    y, gradients, dx = jit(both(apply))(params, inputs["x"], inputs["dy"])
    assert np.abs(y - outputs["y"]).max() <= 2e-5
    check("dx", dx, outputs["dx"], 1e-4)
    for key, gradient in layout.dump(layer_table(config), gradients).items():
        check(key, gradient, outputs[f"grad__{key}"], 1e-4)


@pytest.mark.parametrize("name", [n for n, m in LAYER_META.items() if m["mode"] == "cache"])
def test_published_cache(name, jit, check):
    """Read half, continue in one piece and then token by token; fla keeps its states V first."""
    config, params, inputs, outputs = fla_layer(name)
    mixer = Mixer(config, causal=True)
    apply = jit(lambda x, cache: mixer.apply({"params": params}, x, cache=cache))
    x, cache, ys = jnp.asarray(inputs["x"]), None, []
    tokens = x.shape[1]
    places = [int(key.split("_at")[1]) for key in outputs if key.startswith("ffn_state_at")]
    ends = [*sorted(places), tokens]
    assert ends[1] == tokens - 1 and len(ends) == 3
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        y, cache = apply(x[:, start:end], cache)
        ys.append(y)
        suffix = "_final" if end == tokens else f"_at{end}"
        check("s", np.swapaxes(cache.s, -1, -2), outputs[f"recurrent_state{suffix}"], 2e-5)
        check("z", cache.z[:, None], outputs[f"ffn_state{suffix}"], 2e-5)
    assert np.abs(np.concatenate(ys, axis=1) - outputs["y"]).max() <= 2e-5


def test_published_language_model(jit, check):
    weights = part(LM, "w__")
    module, params = interop.from_torch("fla_lightnet", weights, LM_META["config"])
    ids, labels = jnp.asarray(LM["in__input_ids"]), jnp.asarray(LM["in__labels"])

    def loss(params):
        logits, _ = module.apply({"params": params}, ids)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        real = labels[:, 1:] != -100
        picked = jnp.take_along_axis(log_p, jnp.where(real, labels[:, 1:], 0)[..., None], -1)
        return -jnp.sum(jnp.where(real, picked[..., 0], 0)) / jnp.sum(
            real, dtype=jnp.float32
        ), logits

    (value, logits), gradients = jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.abs(logits - LM["out__logits"]).max() <= 1e-4
    assert abs(value - LM["out__loss"]) <= 1e-5
    for key, gradient in interop.to_torch("fla_lightnet", gradients, LM_META["config"]).items():
        check(key, gradient, LM[f"out__grad__{key}"], 2e-4)


def test_published_language_model_pads_and_decodes(jit):
    module, params = interop.from_torch("fla_lightnet", part(LM, "w__"), LM_META["config"])
    ids, mask = jnp.asarray(LM["in__input_ids"]), jnp.asarray(LM["in__left_pad_mask"] > 0)
    run = jit(
        lambda ids, mask, cache: module.apply({"params": params}, ids, mask=mask, cache=cache)
    )
    padded, _ = run(ids, mask, None)
    found = np.where(np.asarray(mask)[..., None], padded, 0)
    assert np.abs(found - LM["out__logits_left_pad"]).max() <= 1e-4
    logits, cache = run(ids, None, None)
    for expected in LM["out__greedy8"].T:
        token = jnp.argmax(logits[:, -1], axis=-1).astype(ids.dtype)
        np.testing.assert_array_equal(token, expected)
        logits, cache = run(token[:, None], None, cache)


def test_round_trip_is_exact():
    weights = part(LM, "w__")
    module, params = interop.from_torch("fla_lightnet", weights, LM_META["config"])
    back = interop.to_torch("fla_lightnet", params, LM_META["config"])
    assert back.keys() == weights.keys()
    assert all((back[key] == weights[key]).all() for key in weights)
    public = interop.find("fla_lightnet").public_config(module.config)
    assert config_from_fla(public, "float32") == module.config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tpe": "causal"}, "the published model has model.tpe='none'"),
        ({"output_gate": "sigmoid"}, "model.output_gate='silu'; got 'sigmoid'"),
    ],
)
def test_what_the_published_model_lacks_is_not_exported(changes, message):
    config = dataclasses.replace(config_from_fla(LM_META["config"], "float32"), **changes)
    with pytest.raises(ValueError, match=message):
        interop.find("fla_lightnet").public_config(config)


def test_published_configurations():
    """Heads from the ratio or the ratio from the heads; the default has 1.377e9 parameters."""
    default: LightNetLMConfig = config_from_fla({}, "float32")
    assert (default.num_heads, default.key_dim, default.mlp_size) == (16, 128, 5632)
    table = interop.find("fla_lightnet").table(default)
    count = sum(int(np.prod(leaf.shape)) for leaf in table.values())
    assert round(count / 1e6) == 1377
    other = config_from_fla({"hidden_size": 48, "num_heads": 3, "expand_ratio": None}, "float32")
    assert other.key_dim == 16
    with pytest.raises(ValueError, match=r"attn=.* is not supported"):
        config_from_fla({"attn": {"layers": [1]}}, "float32")


@pytest.mark.parametrize("name", GRID_META)
def test_grid_mixer(name, jit, check):
    golden, meta = part(GRID, f"{name}__"), GRID_META[name]
    silu = meta["gate"] == "norm_then_silu"
    hidden, rank = golden["Wu1"].shape
    config = dataclasses.replace(
        config_from_fla({"hidden_size": hidden, "num_heads": meta["heads"]}, "float32"),
        head_dim=hidden // meta["heads"],
        gate_low_rank_dim=rank,
        scale=1.0,
        output_gate="silu" if silu else "sigmoid",
        use_lrpe=True,
        learn_theta=True,
    )
    names = {"q_proj": "Wq", "k_proj": "Wk", "v_proj": "Wv", "o_proj": "Wo"}
    names |= {"g_proj_0": "Wu1", "g_proj_1": "Wu2"}
    tree = lambda prefix: {
        **{ours: {"kernel": jnp.asarray(golden[prefix + key])} for ours, key in names.items()},
        "g_norm": {"scale": jnp.asarray(golden[f"{prefix}norm_w"])},
        "theta": jnp.asarray(golden[f"{prefix}theta"]),
    }
    mixer, places = Mixer(config, causal=False), lrpe.places(meta["grid"])

    def apply(params, x):
        tokens = x.reshape(x.shape[0], -1, hidden)
        return mixer.apply({"params": params}, tokens, places)[0].reshape(x.shape)

    y, gradients, dx = jit(both(apply))(tree(""), golden["x"], golden["dy"])
    assert np.abs(y - golden["y"]).max() <= 2e-5
    check("dx", dx, golden["dx"], 1e-4)
    jax.tree.map(lambda a, b: check("gradient", a, b, 1e-4), gradients, tree("d"))
