"""RADD's network against the published one, its sizes, dropout, and foreign checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import radd_goldens as goldens

from scanax.models import interop, params as params_lib
from scanax.models.radd import RADD, SIZES, RADDConfig


def config(**changes) -> RADDConfig:
    values = {
        "vocab_size": 13,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "dropout": 0.0,
        "rope_theta": 1e4,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
    }
    return RADDConfig(**(values | changes))


@pytest.fixture(scope="module")
def file():
    return goldens.load("radd_tiny")


@pytest.fixture(scope="module")
def checkpoint(file):
    """Tensors and configuration as published, in float32."""
    tensors = goldens.part(file, "param/")
    model = {"hidden_size": 32, "n_blocks": 2, "n_heads": 4, "dropout": 0.02, "cond_dim": 128}
    return tensors, {"tokens": 12, "model": model}


def test_golden(file, checkpoint, check, jit):
    tensors, public = checkpoint
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in tensors.items()}
        module, params = interop.from_torch("radd", wide, public)
        apply = jit(lambda p, ids: module.apply({"params": p}, ids))
        logits = apply(params, file["ids"])
        check("logits", logits, file["logits_f64"], 1e-12)
        log_cond = jax.nn.log_softmax(logits[..., :-1], axis=-1)
        check("log_cond", log_cond, file["log_cond_f64"][..., :-1], 1e-12)
    module, params = interop.from_torch("radd", tensors, public)
    logits = jit(lambda p, ids: module.apply({"params": p}, ids))(params, jnp.asarray(file["ids"]))
    check("float32", logits, file["logits_f64"], 2e-6)


def test_head_of_some_positions(file, checkpoint, check):
    module, params = interop.from_torch("radd", *checkpoint)
    apply = lambda x, part: module.apply({"params": params}, x, method=part)
    ids = jnp.asarray(file["ids"])
    hidden = apply(ids, "body")
    want = module.apply({"params": params}, ids)[:, [7, 2]]
    check("some", apply(hidden[:, jnp.asarray([7, 2])], "head"), want, 1e-6)


def test_round_trip(checkpoint):
    tensors, public = checkpoint
    module, params = interop.from_torch("radd", tensors, public)
    back = interop.to_torch("radd", params, public)
    assert back.keys() | {"rotary_emb.inv_freq"} == tensors.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, tensors[name], err_msg=name)
    made = jax.eval_shape(
        lambda key: params_lib.initialise(module, key, jnp.zeros((1, 3), int)), key()
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)


def key():
    return jax.random.key(0)


@pytest.mark.parametrize(("size", "count"), [("small", 162_265_682), ("medium", 405_191_762)])
def test_published_sizes(size, count):
    module = RADD(config(vocab_size=50258, **SIZES[size]))
    shapes = jax.eval_shape(
        lambda key: params_lib.initialise(module, key, jnp.zeros((1, 3), jnp.int32)), key()
    )
    assert params_lib.count(shapes) == count


def test_beginning(jit):
    module = RADD(config())
    params = jit(lambda key: params_lib.initialise(module, key, jnp.zeros((1, 3), jnp.int32)))(
        key()
    )
    block = params["layers_0"]
    for norm in (params["norm"], block["attn_norm"], block["mlp_norm"]):
        assert (norm["scale"] == 1).all() and (norm["bias"] == 1).all()
    assert not jnp.any(params["lm_head"]["kernel"]) and not jnp.any(params["lm_head"]["bias"])
    for x, bound in (
        (params["embeddings"], 32**-0.5),
        (block["attn"]["q_proj"]["kernel"], 32**-0.5),
        (block["mlp"]["up_proj"]["bias"], 32**-0.5),
        (block["mlp"]["down_proj"]["kernel"], 128**-0.5),
        (block["mlp"]["down_proj"]["bias"], 128**-0.5),
    ):
        assert 0.8 * bound < jnp.max(jnp.abs(x)) <= bound


def test_dropout_is_a_rows_own(checkpoint, jit):
    params = interop.from_torch("radd", *checkpoint)[1]
    module = RADD(config(dropout=0.3, remat=True))
    ids = jax.random.randint(key(), (3, 8), 0, 13)
    keys = jax.random.split(jax.random.key(1), 3)
    apply = jit(lambda ids, keys: module.apply({"params": params}, ids, keys=keys))
    whole, part = apply(ids, keys), apply(ids[1:], keys[1:])
    np.testing.assert_allclose(part, whole[1:], atol=1e-6)
    assert jnp.max(jnp.abs(whole - apply(ids, None))) > 0.1


def test_bfloat16(checkpoint, file, jit):
    params = interop.from_torch("radd", *checkpoint)[1]
    module = RADD(config(dtype="bfloat16"))
    logits = jit(lambda ids: module.apply({"params": params}, ids))(jnp.asarray(file["ids"]))
    assert logits.dtype == jnp.float32
    error = jnp.max(jnp.abs(logits - file["logits_f32"]))
    assert error < 0.05 * np.abs(file["logits_f32"]).max()


def modulated(tensors, sigma: float, prefix: str, seed: int = 0):
    """A checkpoint of MDLM's or SEDD's form, and its logits at a noise level, in numpy."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: 0.2 * rng.standard_normal(shape)
    own = {name: x.astype(np.float64) for name, x in tensors.items() if "rotary" not in name}
    own = {name: x for name, x in own.items() if not (".norm" in name and name.endswith("bias"))}
    for name, width, inputs in (
        ("sigma_map.mlp.0", 16, 256),
        ("sigma_map.mlp.2", 16, 16),
        ("blocks.0.adaLN_modulation", 192, 16),
        ("blocks.1.adaLN_modulation", 192, 16),
        ("output_layer.adaLN_modulation", 64, 16),
    ):
        own |= {f"{name}.weight": draw(width, inputs), f"{name}.bias": draw(width)}

    def logits(ids):
        dense = lambda name, x: x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0)
        silu = lambda x: x / (1 + np.exp(-x))
        angles = sigma * np.exp(-np.log(10000) * np.arange(128) / 128)
        c = np.concatenate([np.cos(angles), np.sin(angles)])
        c = silu(dense("sigma_map.mlp.2", silu(dense("sigma_map.mlp.0", c))))

        def norm(name, x, shift, scale):
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
            return x * own[f"{name}.weight"] * (1 + scale) + shift

        x = own["vocab_embed.embedding"][ids]
        batch, tokens, _ = x.shape
        theta = np.arange(tokens)[:, None] * 10000.0 ** -(np.arange(4) / 4)[None]
        cos, sin = np.cos(theta)[None, :, None], np.sin(theta)[None, :, None]
        for i in range(2):
            parts = np.split(dense(f"blocks.{i}.adaLN_modulation", c), 6)
            h = norm(f"blocks.{i}.norm1", x, *parts[:2])
            q, k, v = (
                dense(f"blocks.{i}.attn_qkv", h).reshape(batch, tokens, 3, 4, 8).swapaxes(0, 2)
            )
            q, k, v = (y.swapaxes(0, 1) for y in (q, k, v))
            turn = lambda y: np.concatenate(
                [y[..., :4] * cos - y[..., 4:] * sin, y[..., 4:] * cos + y[..., :4] * sin], -1
            )
            weights = np.exp(np.einsum("bihk,bjhk->bhij", turn(q), turn(k)) / 8**0.5)
            weights /= weights.sum(-1, keepdims=True)
            o = np.einsum("bhij,bjhk->bihk", weights, v).reshape(x.shape)
            x = x + parts[2] * dense(f"blocks.{i}.attn_out", o)
            h = dense(f"blocks.{i}.mlp.0", norm(f"blocks.{i}.norm2", x, *parts[3:5]))
            h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
            x = x + parts[5] * dense(f"blocks.{i}.mlp.2", h)
        parts = np.split(dense("output_layer.adaLN_modulation", c), 2)
        return dense("output_layer.linear", norm("output_layer.norm_final", x, *parts))

    return {prefix + name: x for name, x in own.items()}, logits


@pytest.mark.parametrize(("prefix", "sigma"), [("backbone.", 0.0), ("", 0.7)])
def test_modulations_at_one_noise_level_are_folded(file, checkpoint, check, jit, prefix, sigma):
    tensors, logits = modulated(checkpoint[0], sigma, prefix)
    public = {"model": checkpoint[1]["model"]} | ({"sigma": sigma} if sigma else {})
    with jax.enable_x64(True):
        module, params = interop.from_torch("radd", tensors, public)
        got = jit(lambda p, ids: module.apply({"params": p}, ids))(params, file["ids"])
        check("logits", got, logits(file["ids"]), 1e-12)


def test_refusals(checkpoint):
    tensors, public = checkpoint
    sedd, _ = modulated(tensors, 0.7, "")
    narrow = {name: x.astype(np.float32) for name, x in sedd.items()}
    with pytest.raises(ValueError, match="depends on the noise level"):
        interop.from_torch("radd", narrow, public)
    with pytest.raises(ValueError, match="config needs hidden_size"):
        interop.from_torch("radd", tensors, {"tokens": 12})
    with pytest.raises(ValueError, match=r"vocab_embed.embedding has shape \(13, 32\)"):
        interop.from_torch("radd", tensors, {**public, "tokens": 20})
    with pytest.raises(ValueError, match="multiple of twice"):
        config(num_heads=32)
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        config(vocab_size=1)
