"""Draws: filters as published, noise that reaches far, keys of rows and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from radd_samplers import load
import scipy.stats

from scanax.models.generation import Sampling, filter_logits
from scanax.models.radd import draws


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.95])
def test_top_p(top_p):
    file, sampling = load("categorical"), Sampling(top_p=top_p)
    with jax.enable_x64(True):
        logits, uniforms = jnp.asarray(file["logits"]), jnp.asarray(file["uniforms"])
        probs = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
        index = draws.filtered_race(logits, uniforms, sampling)
    np.testing.assert_allclose(probs, file[f"top_p_{top_p}_probs"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(index, file[f"top_p_{top_p}_index"])


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_top_k(top_k):
    file, sampling = load("categorical"), Sampling(top_k=top_k)
    with jax.enable_x64(True):
        logits, uniforms = jnp.asarray(file["logits"]), jnp.asarray(file["uniforms"])
        probs = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
        index = draws.filtered_race(logits, uniforms, sampling)
    probs = -np.sort(-np.asarray(probs), axis=-1)
    np.testing.assert_allclose(
        probs[:, :top_k], file[f"top_k_{top_k}_probs_sorted"], rtol=0, atol=1e-12
    )
    assert np.all(probs[:, top_k:] == 0)
    np.testing.assert_array_equal(index, file[f"top_k_{top_k}_index"])


def test_direct():
    file = load("categorical")
    with jax.enable_x64(True):
        probs = jax.nn.softmax(jnp.asarray(file["logits"]), axis=-1)
        index = draws.race(probs, jnp.asarray(file["uniforms"]))
    np.testing.assert_allclose(probs, file["direct_probs"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(index, file["direct_index"])


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-6), (jnp.float64, 1e-14)])
def test_noise_reaches_far(dtype, rtol):
    """Of 2^64 pairs of words, those below k in 2^64 give E < k / 2^64: down to 3e-20."""
    words = np.array([0, 1, 2, 4, 5, 1000, 2**31, 2**32 - 1], np.uint32)
    high, low = (x.reshape(-1) for x in np.meshgrid(words, words, indexing="ij"))
    with jax.enable_x64(dtype == jnp.float64):
        found = np.asarray(draws.exponential_of_bits(jnp.asarray(high), jnp.asarray(low), dtype))
    u = high.astype(np.float64) * 2.0**-32 + (low + 0.5) * 2.0**-64
    np.testing.assert_allclose(found[u < 0.9], -np.log1p(-u[u < 0.9]), rtol=rtol)
    assert 0 < found.min() < 3e-20 and 16 < found.max() < 40


def test_rare_noise():
    """The chance of E < 1e-9 is 1e-9, to the pair of words."""
    limit = int(1e-9 * 2**64)
    low = np.array([limit % 2**32 - 3000, limit % 2**32 + 3000], np.uint32)
    high = np.full(2, limit >> 32, np.uint32)
    with jax.enable_x64(True):
        under, over = draws.exponential_of_bits(jnp.asarray(high), jnp.asarray(low), jnp.float64)
        assert under < 1e-9 < over


def test_draws_follow_probabilities(jit):
    """Chi-square, with a temperature and a token of probability 1e-3."""
    p_V = np.array([0.5, 0.3, 0.199, 0.001])
    logits = jnp.broadcast_to(jnp.asarray(2 * np.log(p_V), jnp.float32)[None], (200000, 4))
    draw = lambda keys: draws.draw(keys, logits, Sampling(temperature=2.0))
    drawn = jit(draw)(jax.random.split(jax.random.key(0), 200000))
    counts = np.bincount(np.asarray(drawn), minlength=4)
    assert scipy.stats.chisquare(counts, 200000 * p_V).pvalue > 1e-4


def test_likeliest(jit):
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    keys = jax.random.split(jax.random.key(1), (2, 3))
    want = np.argmax(logits, axis=-1)
    for sampling in (Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=1e-6)):
        np.testing.assert_array_equal(draws.draw(keys, logits, sampling), want)


def test_keys():
    """A position's key: of its row, event and number, wherever it stands."""
    keys = lambda: jax.random.split(jax.random.key(0), 3)
    event_B = jnp.asarray([4, 0, 2], jnp.int32)
    position_BC = jnp.asarray([[5, 0], [5, 1], [0, 5]], jnp.int32)
    found = jax.random.key_data(draws.position_keys(keys(), event_B, position_BC))
    for b in range(3):
        for c in range(2):
            key = jax.random.fold_in(jax.random.fold_in(keys()[b], event_B[b]), position_BC[b, c])
            np.testing.assert_array_equal(found[b, c], jax.random.key_data(key))
    rows = draws.row_keys(jax.random.key(3), 4)
    np.testing.assert_array_equal(
        jax.random.key_data(rows)[2], jax.random.key_data(jax.random.fold_in(jax.random.key(3), 2))
    )
    assert draws.row_keys(rows, 4) is rows
    for wrong in (rows, jnp.zeros(3)):
        with pytest.raises(ValueError, match="one per row"):
            draws.row_keys(wrong, 3)
