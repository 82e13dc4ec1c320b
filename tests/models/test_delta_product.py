"""What the DeltaProduct language model promises: packing, padding, decoding, dtypes, sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import lm_fineweb
from scanax.models import params as params_lib
from scanax.models.delta_product import DeltaProductConfig, DeltaProductLM

PUBLISHED_SIZES = {
    "213m,1": 213_802_752,
    "213m,2": 214_095_072,
    "213m,3": 213_925_632,
    "392m,1": 392_171_520,
    "392m,2": 392_318_976,
    "392m,3": 392_392_704,
    "805m,1": 805_384_704,
    "805m,2": 806_262_780,
    "805m,3": 805_777_920,
}
CONFIG = DeltaProductConfig(
    vocab_size=17,
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=2,
    num_v_heads=4,
    head_dim=4,
    expand_v=1.5,
    num_householder=2,
    intermediate_size=24,
    use_short_conv=True,
    conv_size=4,
    activation="silu",
    use_forget_gate=True,
    use_output_gate=True,
    allow_neg_eigval=True,
    tie_word_embeddings=False,
    norm_eps=1e-6,
    initializer_range=0.02,
    dtype="float32",
    param_dtype="float32",
    remat=False,
    implementation="auto",
)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 12), np.int32)
LENGTHS = (5, 1, 6)
ROWS = np.split(IDS, np.cumsum(LENGTHS)[:-1], axis=1)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def params():
    """Random matrices, and vectors around 1."""
    rng = np.random.default_rng(1)
    init = lambda key: params_lib.initialise(DeltaProductLM(CONFIG), key, IDS[:, :1])
    shapes = jax.eval_shape(init, jax.random.key(0))
    draw = lambda x: rng.normal(x.ndim == 1, 0.2, x.shape).astype(np.float32)
    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def forward(jit, params):
    """(ids, **kwargs) -> logits and cache, compiled once per form of the arguments."""

    @jit
    def run(params, ids, kwargs):
        return DeltaProductLM(CONFIG).apply({"params": params}, ids, **kwargs)

    return lambda ids, **kwargs: run(params, ids, kwargs)


@pytest.fixture(scope="module")
def one_layer(params):
    """The configuration and the parameters of the first layer alone."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    return config, {name: value for name, value in params.items() if name != "layers_1"}


def check_caches(check, got, want):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        check(f"cache{jax.tree_util.keystr(path)}", x, y, TOLERANCE)


def test_packed_documents_equal_separate_rows(forward, check):
    segment_ids = np.repeat([3, 7, 3], LENGTHS)[None]  # the id 3 comes back
    packed, cache = forward(IDS, segment_ids=segment_ids)
    alone = [forward(row) for row in ROWS]
    check("logits", packed, np.concatenate([logits for logits, _ in alone], axis=1), TOLERANCE)
    check_caches(check, cache, alone[-1][1])


def test_cache_of_a_short_last_document_forgets_the_one_before(forward, check):
    order = (0, 2, 1)  # the document of one token last: shorter than the convolution
    ids = np.concatenate([ROWS[i] for i in order], axis=1)
    segment_ids = np.repeat(np.arange(3), [LENGTHS[i] for i in order])[None]
    _, cache = forward(ids, segment_ids=segment_ids)
    check_caches(check, cache, forward(ROWS[1])[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(forward, check, side):
    width = max(LENGTHS)
    pad = lambda row: (width - row.size, 0) if side == "left" else (0, width - row.size)
    ids = np.stack([np.pad(row[0], pad(row), constant_values=5) for row in ROWS])
    mask = np.stack([np.pad(np.ones(row.size, bool), pad(row)) for row in ROWS])
    logits, cache = forward(ids, mask=mask)
    for i, row in enumerate(ROWS):
        want, want_cache = forward(row)
        check("logits", logits[i, mask[i]], want[0], TOLERANCE)
        check_caches(check, jax.tree.map(lambda x, i=i: x[i : i + 1], cache), want_cache)


def test_padding_between_packed_documents(forward, check):
    ids = np.insert(IDS, [5, 12], 0, axis=1)
    mask = np.insert(np.ones(12, bool), [5, 12], False)[None]
    segment_ids = np.insert(np.repeat([0, 1, 2], LENGTHS), [5, 12], [1, 9])[None]
    logits, cache = forward(ids, mask=mask, segment_ids=segment_ids)
    alone = [forward(row) for row in ROWS]
    want = np.concatenate([logits for logits, _ in alone], axis=1)
    check("logits", logits[mask], want[0], TOLERANCE)
    check_caches(check, cache, alone[-1][1])


@pytest.mark.parametrize("split", [(1, 1, 1, 1, 1, 1), (5, 1), (1, 5)])
def test_decoding_equals_the_full_forward(forward, check, split):
    want, want_cache = forward(ROWS[2])
    cache, parts = None, []
    for ids in np.split(ROWS[2], np.cumsum(split)[:-1], axis=1):
        logits, cache = forward(ids, cache=cache)
        parts.append(logits)
    check("logits", np.concatenate(parts, axis=1), want, TOLERANCE)
    check_caches(check, cache, want_cache)


def test_bfloat16_computation_has_float32_logits_and_states(jit, one_layer, check):
    config, params = one_layer
    run = lambda config: jit(lambda p: DeltaProductLM(config).apply({"params": p}, IDS))(params)
    logits, (cache,) = run(dataclasses.replace(config, dtype="bfloat16"))
    assert logits.dtype == jnp.float32
    assert cache.state.dtype == jnp.float32 and cache.conv_k.dtype == jnp.bfloat16
    check("logits", logits, run(config)[0], 0.05)
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.any(rounded != logits), "logits went through bfloat16"


def test_remat_changes_no_gradient(jit, one_layer, check):
    config, params = one_layer

    def gradients(remat):
        module = DeltaProductLM(dataclasses.replace(config, remat=remat))
        loss = lambda p: jnp.sum(module.apply({"params": p}, IDS)[0] ** 2)
        return jit(jax.grad(loss))(params)

    jax.tree.map(lambda x, y: check("gradient", x, y, 1e-4), gradients(True), gradients(False))


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_dtype_and_axes(tied):
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", tie_word_embeddings=tied)
    shapes = jax.eval_shape(
        lambda key: params_lib.initialise(DeltaProductLM(config), key, IDS), jax.random.key(0)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        wide = path[-1].key in ("A_log", "dt_bias")
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), path
    axes = params_lib.logical_axes(DeltaProductLM(config), IDS)
    jax.tree.map(lambda leaf, names: leaf.ndim == len(names) or pytest.fail(), shapes, axes)
    assert ("lm_head" in shapes) != tied


def test_initial_values(jit):
    heads = 512
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_heads=heads, num_v_heads=0)
    module = DeltaProductLM(config)
    init = jit(lambda key: params_lib.initialise(module, key, IDS[:, :1]))
    layer = init(jax.random.key(1))["layers_0"]["attn"]
    for name in ("q_proj", "k_conv1d", "o_proj"):
        np.testing.assert_allclose(np.std(layer[name]["kernel"]), 0.02, rtol=0.05)
    rate, step = np.exp(layer["A_log"]), np.log1p(np.exp(layer["dt_bias"]))
    assert 0 < rate.min() < 0.5 and 15.5 < rate.max() <= 16
    np.testing.assert_allclose(rate.mean(), 8, rtol=0.1)
    assert 9e-4 < step.min() < 1.2e-3 and 0.08 < step.max() < 0.11
    np.testing.assert_allclose(np.log(step).mean(), np.log(1e-2), rtol=0.05)
    assert np.all(np.asarray(layer["o_norm"]["scale"]) == 1)


@pytest.mark.parametrize(("preset", "count"), PUBLISHED_SIZES.items())
def test_parameter_count_of_published_sizes(preset, count):
    """The paper's language models, counted by hand; each within 1 % of the name it goes by."""
    config = DeltaProductConfig(**lm_fineweb.get_config(preset).model)
    init = lambda key: params_lib.initialise(DeltaProductLM(config), key, IDS[:, :1])
    assert params_lib.count(jax.eval_shape(init, jax.random.key(0))) == count == by_hand(config)
    assert count == pytest.approx(int(preset[:3]) * 1e6, rel=0.01)


def by_hand(c: DeltaProductConfig) -> int:
    """Tensors of section 3 of the published layer, without gates, head tied."""
    hidden, key, n, mlp = c.hidden_size, c.num_heads * c.head_dim, c.num_householder, c.mlp_size
    projections = hidden * (key + 2 * n * key + n * c.num_heads + key)  # q, k and v, b, o
    convolutions = c.conv_size * (key + 2 * n * key)
    block = projections + convolutions + c.head_dim + 3 * hidden * mlp + 2 * hidden
    return c.vocab_size * hidden + c.num_hidden_layers * block + hidden


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_householder", 0, "num_householder must be at least 1"),
        ("vocab_size", 0, "vocab_size must be at least 1"),
        ("num_v_heads", 3, "num_v_heads .3. must be a multiple of model.num_heads .2."),
        ("num_v_heads", -2, "num_v_heads"),
        ("expand_v", 1.3, "head_dim . model.expand_v must be a whole number"),
        ("expand_v", 0.0, "expand_v"),
        ("intermediate_size", -1, "intermediate_size must be at least 0"),
        ("dtype", "float16", "model.dtype must be one of float32, bfloat16, float64"),
        ("param_dtype", "int8", "model.param_dtype must be one of"),
        ("activation", "relu", "model.activation must be one of silu, identity"),
        ("implementation", "cuda", "model.implementation must be one of auto, .*xla"),
    ],
)
def test_invalid_configurations(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})
