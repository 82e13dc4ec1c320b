"""Generation: equal to the full forward, drawing by the rules, mixed prompts, stops, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import generation, params as params_lib
from scanax.models.delta_product import DeltaProductConfig, DeltaProductLM, empty_cache
from scanax.models.generation import Sampling, draw, generate

VOCAB = 23
CONFIG = DeltaProductConfig(
    vocab_size=VOCAB + 2,  # two that are never drawn
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=2,
    num_v_heads=0,
    head_dim=8,
    expand_v=1.0,
    num_householder=2,
    intermediate_size=16,
    use_short_conv=True,
    conv_size=4,
    activation="silu",
    use_forget_gate=True,
    use_output_gate=True,
    allow_neg_eigval=True,
    tie_word_embeddings=False,
    norm_eps=1e-6,
    initializer_range=0.5,
    dtype="float32",
    param_dtype="float32",
    remat=False,
    implementation="auto",
)
MODULE = DeltaProductLM(CONFIG)
PROMPTS = [np.arange(n, dtype=np.int32) * 7 % VOCAB for n in (1, 11, 5)]


@pytest.fixture(scope="module")
def params():
    return params_lib.initialise(MODULE, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def apply(params, ids, mask, cache):
    return MODULE.apply({"params": params}, ids, mask=mask, cache=cache, last_only=True)


def complete(params, prompts=PROMPTS, seed=0, max_tokens=12, stops=(), **sampling):
    return generate(
        apply,
        params,
        lambda batch, length: empty_cache(CONFIG, batch),
        prompts,
        jax.random.key(seed),
        vocab_size=VOCAB,
        max_tokens=max_tokens,
        sampling=Sampling(**sampling),
        stops=stops,
    )


@functools.partial(jax.jit, static_argnums=0)
def full_logits(module, params, ids):
    return module.apply({"params": params}, ids)[0]


def greedy_by_full_forward(params, prompt, tokens):
    ids = np.zeros((1, 32), np.int32)
    ids[0, : len(prompt)], n = prompt, len(prompt)
    for _ in range(tokens):  # the model is causal: what stands behind does not matter
        ids[0, n] = np.argmax(full_logits(MODULE, params, ids)[0, n - 1, :VOCAB])
        n += 1
    return ids[0, len(prompt) : n]


@pytest.mark.parametrize("piece", [4, 512])
def test_greedy_tokens_are_those_of_the_full_forward(params, monkeypatch, piece):
    """Also with prompts of several lengths that are read in several pieces."""
    monkeypatch.setattr(generation, "PIECE", piece)
    found = complete(params, temperature=0.0)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        np.testing.assert_array_equal(tokens, greedy_by_full_forward(params, prompt, 12))
    assert len({tuple(tokens) for tokens in found.tokens}) == 3, "the model does not distinguish"
    assert found.prompt_tokens == 17 and found.new_tokens == 36 and not any(found.stopped)


def test_rows_do_not_depend_on_their_neighbours(params):
    together = complete(params, temperature=1.5)
    alone = complete(params, PROMPTS[:1], temperature=1.5)
    np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])
    again = complete(params, temperature=1.5)
    other = complete(params, temperature=1.5, seed=1)
    assert all(map(np.array_equal, together.tokens, again.tokens))
    assert not any(map(np.array_equal, together.tokens, other.tokens))


def test_stop_sequences_end_their_row_alone(params):
    free = complete(params, temperature=0.0)
    stop = free.tokens[1][3:5].tolist()
    found = complete(params, temperature=0.0, stops=[stop, [VOCAB + 1]])
    assert found.stopped[1]
    for row, (before, after) in enumerate(zip(free.tokens, found.tokens, strict=True)):
        assert found.stopped[row] == (len(after) < 12)
        np.testing.assert_array_equal(before[: len(after)], after)
    text = " ".join(map(str, found.tokens[1]))
    assert " ".join(map(str, stop)) not in text and len(found.tokens[1]) <= 3
    assert found.new_tokens == sum(
        len(t) + 2 * s for t, s in zip(found.tokens, found.stopped, strict=True)
    )


def counts(logits, seen=None, **sampling):
    """How often each token is drawn, of 4,000."""
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (4000, len(logits)))
    seen = None if seen is None else jnp.broadcast_to(jnp.asarray(seen), rows.shape)
    return np.bincount(draw(keys, rows, seen, Sampling(**sampling)), minlength=len(logits))


P = np.array([0.5, 0.25, 0.15, 0.07, 0.03])


@pytest.mark.parametrize(
    "sampling, expected",
    [
        ({}, P),
        ({"temperature": 0.5}, P**2),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, P * [1, 1, 0, 0, 0]),
        ({"top_k": 9}, P),
        ({"top_p": 0.8}, P * [1, 1, 1, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.2}, P * [1, 1, 1, 0, 0]),
        ({"top_k": 4, "top_p": 0.7, "min_p": 0.4}, P * [1, 1, 0, 0, 0]),
        ({"temperature": 2.0, "top_p": 0.5}, np.sqrt(P) * [1, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling, expected):
    expected = 4000 * np.asarray(expected) / np.sum(expected)
    found = counts(np.log(P) + 3, **sampling)
    assert (found[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = np.sum((found[kept] - expected[kept]) ** 2 / expected[kept])
    assert chi2 < 20  # 4 degrees of freedom: p = 5e-4


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    found = counts([2.0, 2.0, -1.0, -1.0], [True, False, True, False], repetition_penalty=2.0)
    expected = np.exp([1.0, 2.0, -2.0, -1.0])
    np.testing.assert_allclose(found, 4000 * expected / expected.sum(), rtol=0.15, atol=15)


def test_penalised_tokens_of_the_prompt_and_of_what_was_drawn_do_not_come_back(params):
    found = complete(params, temperature=0.0, repetition_penalty=1e9, max_tokens=8)
    assert len({*PROMPTS[0].tolist(), *found.tokens[0].tolist()}) == 9


@pytest.mark.parametrize(
    "name, value", [("temperature", -1), ("top_k", -1), ("top_p", 0), ("min_p", 2)]
)
def test_wrong_options(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sampling(**{name: value})


def test_wrong_arguments(params):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        complete(params, [PROMPTS[0], np.zeros(0, np.int32)])
    with pytest.raises(ValueError, match="prompt 0 has tokens outside"):
        complete(params, [np.asarray([VOCAB])])
    with pytest.raises(ValueError, match="a stop sequence is empty"):
        complete(params, stops=[[]])
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        complete(params, max_tokens=0)


def test_cache_of_another_model_or_batch(params):
    ids = jnp.zeros((2, 3), jnp.int32)
    run = lambda cache: MODULE.apply({"params": params}, ids, cache=cache)
    with pytest.raises(ValueError, match="it has 1 layers, this model 2"):
        run(empty_cache(CONFIG, 2)[:1])
    with pytest.raises(ValueError, match=r"state of layer 0 has shape \(3, 2, 8, 8\)"):
        run(empty_cache(CONFIG, 3))
    first, second = empty_cache(CONFIG, 2)
    with pytest.raises(ValueError, match="conv_k of layer 1 has shape None"):
        run((first, second._replace(conv_k=None)))


def test_empty_cache_is_what_the_model_starts_from(params):
    ids = jnp.asarray([PROMPTS[1]])
    with_cache, without = (
        MODULE.apply({"params": params}, ids, cache=cache)
        for cache in (empty_cache(CONFIG, 1), None)
    )
    jax.tree.map(np.testing.assert_array_equal, with_cache, without)
