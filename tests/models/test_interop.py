"""Published checkpoints to parameters and back, and what is refused on the way.

The numbers that come out of the models are in ``test_delta_product_golden.py``.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import interop, params as params_lib
from scanax.models.delta_product.interop import config_from_fla

FAMILY = "fla_delta_product"
MODELS = ("gated_nh2_2layer", "statetracking_nh2_1layer", "ungated_nh3_2layer_tied")


@pytest.fixture
def checkpoint(golden):
    """(name) -> tensors, config of a published model."""

    def load(name=MODELS[0]):
        arrays = np.load(golden / f"deltaproduct/model_{name}.npz")
        names = [key for key in arrays if key.startswith("param.")]
        tensors = {key.removeprefix("param."): arrays[key] for key in names}
        return tensors, json.loads(str(arrays["config"]))

    return load


def check_equal(got, want):
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert array.flags.c_contiguous, name
        assert array.dtype == want[name].dtype, name
        assert array.shape == want[name].shape, name
        assert array.tobytes() == np.ascontiguousarray(want[name]).tobytes(), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(checkpoint, name, dtype):
    tensors, config = checkpoint(name)
    tensors = {key: array.astype(jnp.dtype(dtype)) for key, array in tensors.items()}
    module, params = interop.from_torch(FAMILY, tensors, config)
    assert module.config.dtype == module.config.param_dtype == dtype
    check_equal(interop.to_torch(FAMILY, params, config), tensors)

    ids = np.zeros((1, 3), np.int32)
    init = lambda key: params_lib.initialise(module, key, ids)
    made = jax.eval_shape(init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)
    assert params_lib.count(params) == sum(array.size for array in tensors.values())


def test_round_trip_from_views_and_mixed_dtypes(checkpoint):
    tensors, config = checkpoint()
    tensors = {
        name: np.asfortranarray(array) if array.ndim < 2 else array.astype(jnp.bfloat16).T.copy().T
        for name, array in tensors.items()
    }
    module, params = interop.from_torch(FAMILY, tensors, config)
    assert module.config.dtype == "bfloat16"
    assert params["layers_0"]["attn"]["A_log"].dtype == jnp.float32
    check_equal(interop.to_torch(FAMILY, params, config), tensors)


def test_float64_needs_x64(checkpoint):
    tensors, config = checkpoint()
    tensors = {name: array.astype(np.float64) for name, array in tensors.items()}
    with pytest.raises(ValueError, match=r"model.embeddings.weight is float64.*enable_x64"):
        interop.from_torch(FAMILY, tensors, config)
    with jax.enable_x64(True):
        _, params = interop.from_torch(FAMILY, tensors, config)
        check_equal(interop.to_torch(FAMILY, params, config), tensors)


def test_bad_tensors_are_named(checkpoint):
    tensors, config = checkpoint()
    name = "model.layers.1.attn.k_conv1d.weight"
    load = lambda changed: interop.from_torch(FAMILY, changed, config)
    with pytest.raises(ValueError, match=f"tensor missing: {name}"):
        load({key: array for key, array in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"tensor not expected: extra.weight"):
        load(tensors | {"extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(32, 4\), expected \(32, 1, 4\)"):
        load(tensors | {name: tensors[name][:, 0]})
    with pytest.raises(ValueError, match="is int64; supported are float32"):
        load({key: array.astype(np.int64) for key, array in tensors.items()})
    with pytest.raises(ValueError, match="no tensors"):
        load({})


def test_a_tied_head_is_not_stored_twice(checkpoint):
    tensors, config = checkpoint("ungated_nh3_2layer_tied")
    head = {"lm_head.weight": tensors["model.embeddings.weight"]}
    with pytest.raises(ValueError, match=r"tensor not expected: lm_head.weight"):
        interop.from_torch(FAMILY, tensors | head, config)


def test_bad_parameters_are_named(checkpoint):
    tensors, config = checkpoint()
    _, params = interop.from_torch(FAMILY, tensors, config)
    dump = lambda changed: interop.to_torch(FAMILY, params | changed, config)
    with pytest.raises(ValueError, match="parameter missing: norm/scale"):
        dump({"norm": {}})
    with pytest.raises(ValueError, match="parameter not expected: norm/bias"):
        dump({"norm": params["norm"] | {"bias": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=r"norm/scale has shape \(2,\), expected \(32,\)"):
        dump({"norm": {"scale": jnp.zeros(2)}})


def test_unknown_family():
    with pytest.raises(ValueError, match="unknown family 'mamba'; choose one of fla_delta_product"):
        interop.from_torch("mamba", {}, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn", {"layers": [1], "num_heads": 4}),
        ("attnres_block_size", 4),
        ("hidden_act", "relu"),
        ("use_gate", True),
    ],
)
def test_configurations_that_would_change_the_numbers_are_refused(key, value):
    with pytest.raises(ValueError, match=f"config {key}="):
        config_from_fla({key: value}, "float32")


def test_published_defaults():
    ignored = {"use_cache": True, "model_type": "gated_deltaproduct", "torch_dtype": "bfloat16"}
    nulls = {"attn": None, "hidden_act": "swish", "intermediate_size": None}
    config = config_from_fla(ignored | nulls, "float32")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (32000, 2048, 21)
    assert (config.num_heads, config.head_dim, config.expand_v) == (6, 256, 2)
    assert (config.num_householder, config.conv_size, config.norm_eps) == (1, 4, 1e-6)
    assert config.use_short_conv and config.use_output_gate and not config.use_forget_gate
    assert not config.allow_neg_eigval and not config.tie_word_embeddings
    assert config.mlp_size == 5632
    assert config_from_fla({"hidden_ratio": 3}, "float32").mlp_size == 4096
