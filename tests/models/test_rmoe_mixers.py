"""RMoE's blocks on each token mixer: decoding, padding, segments, and mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.configs import base
from scanax.models import generation, params as params_lib
from scanax.models.rmoe import STATISTICS, RMoEConfig, RMoELM, empty_cache, states

VOCAB = 23
MIXERS = {
    "attention": {"num_kv_heads": 2},
    "delta_product": {"use_forget_gate": True},
    "lightnet": {},
}
PROMPTS = [np.arange(n, dtype=np.int32) * 7 % VOCAB for n in (1, 11, 5)]


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def config(**changes) -> RMoEConfig:
    values = base.get_config("language_model", "rmoe").model.to_dict()
    values |= {"vocab_size": VOCAB + 2, "hidden_size": 16, "num_hidden_layers": 3}
    values |= {"num_dense_layers": 1, "dense_intermediate_size": 12, "intermediate_size": 12}
    values |= {"router_dim": 8, "initializer_range": 0.3, "implementation": "block"}
    return RMoEConfig(**{**values, "dtype": "float64", "param_dtype": "float64", **changes})


@pytest.fixture(scope="module", params=MIXERS)
def model(request, jit):
    """A module with a dense layer and two with experts, and its parameters."""
    with jax.enable_x64(True):
        module = RMoELM(config(mixer=request.param, **MIXERS[request.param]))
        ids = jnp.zeros((1, 2), jnp.int32)
        return module, jit(lambda key: params_lib.initialise(module, key, ids))(jax.random.key(0))


def generate(module, params, prompts, max_tokens):
    apply = lambda p, ids, mask, cache: module.apply(
        {"params": p}, ids, mask=mask, cache=cache, last_only=True
    )
    return generation.generate(
        apply,
        params,
        functools.partial(empty_cache, module.config),
        prompts,
        jax.random.key(0),
        vocab_size=VOCAB,
        max_tokens=max_tokens,
        sampling=generation.Sampling(temperature=0.0),
    ).tokens


def greedy_by_full_forward(forward, prompt, tokens):
    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(prompt)], n = prompt, len(prompt)
    for _ in range(tokens):  # the model is causal: what stands behind does not matter
        ids[0, n] = np.argmax(forward(ids)[0, n - 1, :VOCAB])
        n += 1
    return ids[0, len(prompt) : n]


def test_greedy_tokens_are_those_of_the_full_forward(model, jit, monkeypatch):
    """Prompts of several lengths, padded on the left and read in pieces of four."""
    module, params = model
    monkeypatch.setattr(generation, "PIECE", 4)
    found = generate(module, params, PROMPTS, 8)
    forward = jit(lambda ids: module.apply({"params": params}, ids)[0])
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        np.testing.assert_array_equal(tokens, greedy_by_full_forward(forward, prompt, 8))
    assert len({tuple(tokens) for tokens in found}) == 3, "the model does not distinguish"


def test_decoding_is_the_full_forward(model, jit, check):
    """Logits too: a masked piece that begins with padding, one without a mask, then tokens."""
    module, params = model
    ids = jax.random.randint(jax.random.key(0), (2, 12), 0, VOCAB)
    mask = jnp.arange(12)[None] >= jnp.asarray([[0], [3]])
    step = jit(lambda *a: module.apply({"params": params}, a[0], mask=a[1], cache=a[2]))
    cache, found = empty_cache(module.config, 2, 12), []
    assert "router" not in str(jax.tree_util.tree_leaves_with_path(cache))
    for part in (slice(0, 5), slice(5, 9), *(slice(i, i + 1) for i in range(9, 12))):
        got, cache = step(ids[:, part], mask[:, part] if part.start == 0 else None, cache)
        found.append(got)
    found = jnp.concatenate(found, axis=1)
    to_the_left = jnp.stack([ids[0], jnp.roll(ids[1], -3)])
    logits, none = jit(lambda ids: module.apply({"params": params}, ids))(to_the_left)
    assert none is None
    check("no padding", found[0], logits[0], 1e-10)
    check("padding", found[1, 3:], logits[1, :9], 1e-10)


def test_padding_and_segments_change_nothing(model, jit, check):
    module, params = model
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCAB)
    apply = jit(lambda ids, **o: module.apply({"params": params}, ids, mutable=[STATISTICS], **o))
    (logits, _), alone = apply(ids[:, 3:])
    (padded, _), masked = apply(ids, mask=jnp.arange(9)[None] + jnp.zeros((2, 1), int) >= 3)
    check("padding", padded[:, 3:], logits, 1e-10)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(masked), strict=True):
        check("statistics", a, b, 1e-10)
    (packed, _), _ = apply(ids, segment_ids=jnp.zeros_like(ids).at[:, 3:].set(1))
    check("second segment", packed[:, 3:], logits, 1e-10)
    (joined, _), _ = apply(ids, segment_ids=jnp.zeros_like(ids))
    assert np.max(np.abs(joined[:, 3:] - logits)) > 1e-3, "earlier tokens do not matter"


def test_neighbours_take_no_places_in_decoding(jit, check):
    """With places for a fifth of the tokens rows would push each other out, as in training."""
    small = {"num_hidden_layers": 1, "num_dense_layers": 0, "implementation": "auto"}
    module = RMoELM(config(capacity_factor=0.2, **small))
    ids = jax.random.randint(jax.random.key(0), (3, 6), 0, VOCAB)
    params = params_lib.initialise(module, jax.random.key(1), ids)
    run = jit(lambda ids, cache: module.apply({"params": params}, ids, cache=cache)[0])
    room = functools.partial(empty_cache, module.config, length=6)
    together, alone = run(ids, room(3)), run(ids[:1], room(1))
    check("logits", together[:1], alone, 1e-10)
    assert np.max(np.abs(run(ids, None)[:1] - alone)) > 1e-3


def test_states_are_matrices_of_all_layers(model):
    module, _ = model
    cache = empty_cache(module.config, 2, 5)
    if module.config.mixer == "attention":
        assert cache.layers.k.shape == (2, 2, 5, 2, 4)
    else:
        width = {"delta_product": 4, "lightnet": 8}[module.config.mixer]  # LightNet's cosine form
        assert states(module.config, cache).shape == (3, 2, 4, width, 4)


@pytest.mark.parametrize("mixer", ["delta_product", "lightnet"])
def test_a_mixer_is_that_of_its_family(mixer):
    """Whatever the models do not share, and no key of RMoE sets, has the family's default."""
    c = config(mixer=mixer)
    values = base.get_config("language_model", mixer).model.to_dict()
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "dtype", "param_dtype")
    values |= {name: getattr(c, name) for name in (*shared, "initializer_range")}
    assert c.mixing == type(c.mixing)(**values)


def test_keys_of_other_mixers_are_not_passed_over():
    for mixer, changes, message in (
        ("conv", {}, "'conv' must be one of attention, delta_product, lightnet"),
        ("attention", {"num_householder": 3}, "num_householder=3 is for mixer delta_product"),
        ("attention", {"use_short_conv": False}, "means nothing for attention: leave it at True"),
        ("lightnet", {"use_forget_gate": True}, "use_forget_gate=True is for mixer delta_product"),
        ("lightnet", {"num_kv_heads": 2}, "num_kv_heads=2 is for mixer attention"),
        ("delta_product", {"rope_theta": 1e5}, "rope_theta=100000.0 is for mixer attention"),
        ("delta_product", {"num_householder": 0}, "num_householder must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            config(mixer=mixer, **changes)
    assert config(mixer="lightnet", num_heads=16).head_dim == 1  # only rotary angles need pairs


def test_mistakes_with_a_cache():
    module = RMoELM(config())
    ids = jnp.zeros((1, 3), jnp.int32)
    run = lambda room, **o: jax.eval_shape(
        lambda: module.init(jax.random.key(0), ids, cache=empty_cache(module.config, 1, room), **o)
    )
    with pytest.raises(ValueError, match="without segments"):
        run(3, segment_ids=ids)
    with pytest.raises(ValueError, match="3 tokens in a cache with room for 2"):
        run(2)
