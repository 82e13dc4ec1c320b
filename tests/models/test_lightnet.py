"""What LightNet's models promise: packing, padding, decoding, places, baselines, shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import params as params_lib
from scanax.models.lightnet import (
    LightNetClassifier,
    LightNetDiT,
    LightNetDiTConfig,
    LightNetGridConfig,
    LightNetLM,
    LightNetLMConfig,
    baselines,
    classifier,
    dit,
    empty_cache,
    lrpe,
)
from scanax.models.lightnet.layer import Mixer

STACK = {
    "mixer": "lightnet",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 6,
    "scale": 0.0,
    "output_gate": "silu",
    "gate_low_rank_dim": 4,
    "elementwise_affine": True,
    "intermediate_size": 24,
    "use_short_conv": False,
    "conv_size": 4,
    "tpe": "causal",
    "tpe_share_axes": False,
    "use_lrpe": True,
    "theta_type": 0,
    "learn_theta": False,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "dtype": "float32",
    "param_dtype": "float32",
    "remat": False,
    "implementation": "auto",
}
LM = LightNetLMConfig(**STACK, vocab_size=17, tie_word_embeddings=False, causal=True)
GRID = LightNetGridConfig(
    **STACK, num_classes=5, patch_size=(2, 2), class_token=False, drop_path=0.0
)
IDS = np.random.default_rng(0).integers(0, LM.vocab_size, (1, 12), np.int32)
LENGTHS = (5, 1, 6)
ROWS = np.split(IDS, np.cumsum(LENGTHS)[:-1], axis=1)
TOLERANCE = 1e-5
VARIANTS = {
    "cosine": {},
    "rotate": {"theta_type": 1, "use_short_conv": True},
    "learned": {"learn_theta": True, "tpe": "none", "output_gate": "sigmoid"},
    "linear": {"mixer": "linear"},
    "gla": {"mixer": "gla", "theta_type": 6},
}


def random_params(module, *inputs):
    """Matrices of size 1 / sqrt(in), vectors around 1: nothing begins at 0."""
    rng = np.random.default_rng(1)
    init = functools.partial(params_lib.initialise, module)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
    draw = lambda x: jnp.asarray(rng.normal(x.ndim == 1, 0.3, x.shape), jnp.float32)
    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module", params=VARIANTS)
def forward(request, jit):
    """(ids, **kwargs) -> logits and cache of a causal model, and its config."""
    config = dataclasses.replace(LM, **VARIANTS[request.param])
    module = LightNetLM(config)
    params = random_params(module, IDS[:, :1])

    @jit
    def run(ids, kwargs):
        return module.apply({"params": params}, ids, **kwargs)

    call = lambda ids, **kwargs: run(ids, kwargs)
    call.config = config
    return call


def check_caches(check, got, want):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        check(f"cache{jax.tree_util.keystr(path)}", x, y, TOLERANCE)


def test_packed_documents_equal_separate_rows(forward, check):
    if forward.config.mixer != "lightnet":
        with pytest.raises(ValueError, match="knows no segments"):
            forward(IDS, segment_ids=np.ones_like(IDS))
        return
    segment_ids = np.repeat([3, 7, 3], LENGTHS)[None]  # the id 3 comes back
    packed, cache = forward(IDS, segment_ids=segment_ids)
    alone = [forward(row) for row in ROWS]
    check("logits", packed, np.concatenate([logits for logits, _ in alone], axis=1), TOLERANCE)
    # Keys of the last document were turned from other places: its state is another, its z not.
    for got, want in zip(cache.layers, alone[-1][1].layers, strict=True):
        check("z", got.z, want.z, TOLERANCE)


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), None])
def test_places_must_be_those_of_the_tokens(grid):
    place = None if grid is None else lrpe.places(grid)
    with pytest.raises(ValueError, match="as many as there are tokens"):
        Mixer(LM, True).init(jax.random.key(0), jnp.zeros((2, 12, 16)), place)


@pytest.mark.parametrize("causal", [False, True])
def test_baselines_are_their_definitions(causal, check):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 40, 2, 4)).astype(np.float32) for _ in range(3))
    ids = np.repeat(np.asarray([[0, 1]], np.int32), 20, axis=1).repeat(2, axis=0)
    mask = np.arange(40)[None] < np.asarray([[40], [30]])
    past = np.tril(np.ones((40, 40), bool)) if causal else np.ones((40, 40), bool)
    allowed = past & mask[:, None] & (ids[:, :, None] == ids[:, None])
    weights = np.exp(0.5 * np.einsum("bihk,bjhk->bhij", q, k)) * allowed[:, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    real = mask[..., None, None]
    options = {"causal": causal, "scale": 0.5, "mask": mask, "segment_ids": ids}
    found = np.asarray(jax.jit(lambda: baselines.softmax_attention(q, k, v, **options))())
    check("softmax", found * real, np.einsum("bhij,bjhv->bihv", weights, v) * real, TOLERANCE)
    feature_q, feature_k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    check("features", baselines.features(jnp.asarray(q)), feature_q, TOLERANCE)
    below, _ = baselines.normaliser(jnp.asarray(feature_q), jnp.asarray(feature_k), causal=causal)
    want = np.einsum("bihk,bjhk,ij->bih", feature_q, feature_k, past.astype(np.float32))
    check("below", below, want, 1e-3)  # sums of up to 200


def test_two_scans_meet_in_every_token(check):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 40, 2, 4)).astype(np.float32) for _ in range(3))
    g = -rng.uniform(0, 0.3, q.shape).astype(np.float32)
    expected = np.zeros_like(v)
    for i in range(40):
        for j in range(40):  # the token itself counts twice
            between = g[:, j + 1 : i + 1] if j <= i else g[:, i:j]
            a = np.einsum("bhk,bhk->bh", q[:, i], k[:, j] * np.exp(between.sum(1)))
            expected[:, i] += (1 + (i == j)) * a[..., None] * v[:, j]
    check("o", jax.jit(lambda: baselines.two_scans(q, k, v, g))(), expected, 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(forward, check, side):
    width = max(LENGTHS)
    pad = lambda row: (width - row.size, 0) if side == "left" else (0, width - row.size)
    ids = np.stack([np.pad(row[0], pad(row), constant_values=5) for row in ROWS])
    mask = np.stack([np.pad(np.ones(row.size, bool), pad(row)) for row in ROWS])
    logits, cache = forward(ids, mask=mask)
    for i, row in enumerate(ROWS):
        alone, alone_cache = forward(row)
        check("logits", logits[i][mask[i]], alone[0], TOLERANCE)
        check_caches(check, jax.tree.map(lambda x, i=i: x[i : i + 1], cache), alone_cache)


def test_decoding_is_the_forward_in_pieces(forward, check):
    whole, end = forward(IDS)
    cache, pieces = empty_cache(forward.config, 1), []
    for size in (5, 1, 1, 4, 1):
        start = sum(piece.shape[1] for piece in pieces)
        logits, cache = forward(IDS[:, start : start + size], cache=cache)
        pieces.append(logits)
    check("logits", np.concatenate(pieces, axis=1), whole, TOLERANCE)
    check_caches(check, cache, end)


def test_the_past_does_not_see_the_future(forward, check):
    other = np.where(np.arange(12)[None] < 7, IDS, 3).astype(np.int32)
    check("logits", forward(IDS)[0][:, :7], forward(other)[0][:, :7], TOLERANCE)
    assert np.abs(forward(IDS)[0] - forward(other)[0])[:, 7:].max() > 1e-3


@pytest.mark.parametrize("mixer", ["lightnet", "softmax", "linear", "gla_two_scans"])
def test_masked_models_see_everything_but_padding(mixer, jit, check):
    config = dataclasses.replace(LM, mixer=mixer, causal=False, tpe="bidirectional")
    module = LightNetLM(config)
    params = random_params(module, IDS)
    run = jit(lambda ids, mask: module.apply({"params": params}, ids, mask=mask)[0])
    alone = run(IDS, None)
    first = np.where(np.arange(12)[None] < 11, IDS, 3).astype(np.int32)
    assert np.abs(alone - run(first, None))[:, 0].max() > 1e-4  # the first token sees the last
    padded = np.pad(IDS, ((0, 0), (0, 3)), constant_values=5)
    mask = np.pad(np.ones(IDS.shape, bool), ((0, 0), (0, 3)))
    check("logits", run(padded, mask)[:, :12], alone, 2 * TOLERANCE)
    assert np.isfinite(run(padded, np.zeros_like(mask))).all()  # no token at all


def test_a_cache_of_another_model_is_named():
    cache = empty_cache(dataclasses.replace(LM, theta_type=1), 1)
    module = LightNetLM(dataclasses.replace(LM, head_dim=4))
    init = functools.partial(jax.eval_shape, module.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"layers\[0\].s has shape \(1, 2, 12, 8\), expected"):
        init(IDS, cache=cache)
    with pytest.raises(ValueError, match=r"layers\[2\]"):
        deeper = LightNetLM(dataclasses.replace(LM, num_hidden_layers=3))
        jax.eval_shape(lambda: deeper.init(jax.random.key(0), IDS, cache=empty_cache(LM, 1)))
    softmax = LightNetLM(dataclasses.replace(LM, mixer="softmax"))
    with pytest.raises(ValueError, match=r"'softmax' .* has no state"):
        jax.eval_shape(lambda: softmax.init(jax.random.key(0), IDS, cache=cache))


def test_remat_changes_nothing(jit, check):
    params = random_params(LightNetLM(LM), IDS)

    def loss(config, params):
        return jnp.sum(LightNetLM(config).apply({"params": params}, IDS)[0] ** 2)

    gradients = [
        jit(jax.grad(functools.partial(loss, dataclasses.replace(LM, remat=remat))))(params)
        for remat in (False, True)
    ]
    jax.tree.map(lambda a, b: check("gradient", a, b, TOLERANCE), *gradients)


@pytest.mark.parametrize("gated", [True, False])
def test_gated_linear_attention_is_its_recurrence(gated, jit, check):
    rng = np.random.default_rng(0)
    shape = (2, 70, 2, 4)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    g = np.maximum(-rng.exponential(1.0, shape), baselines.MIN_LOG_DECAY).astype(np.float32)
    start = rng.normal(size=(2, 2, 4, 4)).astype(np.float32)
    state, expected = start, np.zeros(shape, np.float32)
    for t in range(shape[1]):
        decay = np.exp(g[:, t])[..., None] if gated else 1.0
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None]
        expected[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    run = jit(lambda: baselines.gated_linear_attention(q, k, v, g if gated else None, state=start))
    o, end = run()
    check("o", o, expected, TOLERANCE)
    check("state", end, state, TOLERANCE)


def clip(*grid: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(2, *grid, 3)).astype(np.float32)


@pytest.mark.parametrize("grid", [(8,), (4, 6), (4, 4, 6)])
@pytest.mark.parametrize("class_token", [False, True])
def test_classifier_on_one_to_three_axes(grid, class_token, jit):
    config = dataclasses.replace(GRID, patch_size=(2,) * len(grid), class_token=class_token)
    module = LightNetClassifier(config)
    x = clip(*grid)
    params = random_params(module, x)
    logits = jit(lambda x: module.apply({"params": params}, x))(x)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()
    gradients = jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x) ** 2)))(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("mixer", ["lightnet", "softmax", "linear"])
@pytest.mark.parametrize("tpe, use_lrpe", [("none", False), ("causal", False), ("none", True)])
def test_without_positions_the_order_of_patches_does_not_matter(mixer, tpe, use_lrpe, jit, check):
    config = dataclasses.replace(GRID, mixer=mixer, tpe=tpe, use_lrpe=use_lrpe, patch_size=(1, 1))
    module = LightNetClassifier(config)
    x = clip(3, 4)
    params = random_params(module, x)
    shuffled = x.reshape(2, 12, 3)[:, np.random.default_rng(3).permutation(12)].reshape(x.shape)
    one, other = (jit(lambda x: module.apply({"params": params}, x))(y) for y in (x, shuffled))
    if tpe == "none" and not use_lrpe:
        check("logits", one, other, TOLERANCE)
    else:
        assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


@pytest.mark.parametrize("grid, patch", [((4, 6), (3, 2)), ((4, 6), (2,))])
def test_a_patch_that_does_not_divide_is_named(grid, patch):
    module = LightNetClassifier(dataclasses.replace(GRID, patch_size=patch))
    with pytest.raises(ValueError, match=r"model.patch_size .* does not divide inputs of 4 x 6"):
        module.init(jax.random.key(0), clip(*grid))


def test_stochastic_depth():
    """Nothing in the first layer, the full rate in the last; the mean of the factors is 1."""
    config = dataclasses.replace(GRID, drop_path=0.5, num_hidden_layers=3)
    keep = classifier.survival(config, jax.random.split(jax.random.key(0), 4000))
    assert keep.shape == (3, 2, 4000) and (keep[0] == 1).all()
    np.testing.assert_allclose(np.mean(keep == 0, axis=(1, 2)), [0, 0.25, 0.5], atol=0.02)
    np.testing.assert_allclose(np.mean(keep, axis=(1, 2)), 1, atol=0.05)
    module, x = LightNetClassifier(dataclasses.replace(config, drop_path=0.99)), clip(4, 6)
    params = random_params(module, x)
    noisy = module.apply({"params": params}, x, keys=jax.random.split(jax.random.key(0), 2))
    assert np.abs(noisy - module.apply({"params": params}, x)).max() > 1e-3


DIT = LightNetDiTConfig(**STACK, patch_size=(2, 2), num_classes=10, learn_sigma=False)


@pytest.mark.parametrize("tpe", ["causal", "bidirectional"])
def test_half_precision_on_a_grid(tpe, jit, check):
    """bfloat16 computes what float32 does, to three digits; logits and gradients are float32."""
    x, logits = jnp.asarray(clip(4, 6)), []
    for dtype in ("float32", "bfloat16"):
        module = LightNetClassifier(
            dataclasses.replace(GRID, tpe=tpe, dtype=dtype, initializer_range=0.2)
        )
        params = params_lib.initialise(module, jax.random.key(0), x)

        def loss(params, x, module=module):
            y = module.apply({"params": params}, x)
            return jnp.sum(y * y), y

        (_, y), gradient = jit(jax.value_and_grad(loss, has_aux=True))(params, x)
        assert y.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        logits.append(y)
    check("logits", logits[1], logits[0], 0.03)


def test_image_backbone_begins_at_zero_and_uses_its_conditions(jit):
    module, x = LightNetDiT(DIT), clip(4, 6)
    t, label = np.asarray([0.1, 0.9], np.float32), np.asarray([3, 10])
    params = params_lib.initialise(module, jax.random.key(0), x, t, label)
    y = module.apply({"params": params}, x, t, label)
    assert y.shape == x.shape and not y.any()
    params = random_params(module, x, t, label)
    run = jit(lambda t, label: module.apply({"params": params}, x, t, label))
    for other in (run(t + 0.1, label), run(t, label - 1)):
        assert np.abs(other - run(t, label)).max() > 1e-3
    wide = LightNetDiT(dataclasses.replace(DIT, learn_sigma=True, num_classes=0))
    shape = jax.eval_shape(wide.init_with_output, jax.random.key(0), x, t)[0].shape
    assert shape == (2, 4, 6, 6)
    with pytest.raises(ValueError, match="labels must fit"):
        module.init(jax.random.key(0), x, t)


def test_patches_are_joined_as_they_were_cut():
    x, axes = clip(4, 2, 6), (2, 1, 3)
    cut = x.reshape(2, 2, 2, 2, 1, 2, 3, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(2, 8, -1)
    np.testing.assert_array_equal(dit.join_patches(jnp.asarray(cut), (2, 2, 2), axes), x)


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_of_the_image_backbone(size, millions):
    """Within a twelfth of DiT's own counts (patch 2, latents 32 x 32 x 4, learned variance)."""
    hidden, layers, heads = dit.SIZES[size]
    config = dataclasses.replace(
        DIT,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_heads=heads,
        head_dim=0,
        gate_low_rank_dim=hidden // heads,
        intermediate_size=round(hidden * 8 / 3),
        num_classes=1000,
        learn_sigma=True,
    )
    init = functools.partial(LightNetDiT(config).init, jax.random.key(0))
    x, t, label = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    count = params_lib.count(jax.eval_shape(init, x, t, label)["params"])
    assert abs(count / 1e6 / millions - 1) < 1 / 12, count


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 3}, r"model.num_heads \(3\) must divide model.hidden_size \(16\)"),
        ({"mixer": "lstm"}, "model.mixer must be one of lightnet, softmax"),
        ({"theta_type": 7}, "model.theta_type must be 0 to 6"),
        ({"theta_type": 2, "head_dim": 5}, "turns pairs of channels, but .* width is 5"),
        ({"tpe": "bidirectional"}, "look ahead"),
        ({"use_short_conv": True, "causal": False}, "is for causal language models"),
        ({"scale": -1.0}, "model.scale must be at least 0"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LM, **changes)
