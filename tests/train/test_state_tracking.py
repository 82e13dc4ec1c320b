"""State tracking tasks: what their metrics count, recomputed by hand, and what does not fit."""

import jax
import numpy as np
import pytest

from scanax.configs import base
from scanax.train import tasks
from scanax.train.config import ConfigError, from_dict
from scanax.train.data.pipeline import IGNORE

SMALL = {
    "batch_size": 4,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.intermediate_size": 16,
    "evaluation.batch_size": 32,
    "mesh.data": 1,
}
WORDS = {"data.length": 12, "data.eval_lengths": (2, 6)}


def build(name: str, **changes):
    values = base.get_config(name)
    values.update_from_flattened_dict({**SMALL, **changes})
    return tasks.build(from_dict(values.to_dict()))


def evaluated(task):
    """An evaluation batch, the likeliest tokens, and the means that the task reports."""
    params, extra = task.init(jax.random.key(0))
    params["lm_head"]["kernel"] = 30 * params["lm_head"]["kernel"]  # decided predictions
    batch = task.eval_data(0)
    sums = jax.jit(task.evaluate)(params, extra, batch, None)
    means = {name: np.asarray(value) / np.asarray(weight) for name, (value, weight) in sums.items()}
    return batch, params, means


def predictions(task, params, key=0):
    return task.sample(params, {}, jax.random.key(key), 64)


@pytest.mark.parametrize("repeat", [1, 3])
def test_sequence_accuracy_counts_products_only(repeat):
    task = build("word_problem", **WORDS, **{"data.tokens_per_element": repeat})
    batch, params, means = evaluated(task)
    assert batch["ids"].shape == (32, 6 * repeat + 1)
    assert (batch["labels"] != IGNORE).sum() == 32 * 7
    assert means["accuracy_by_length"].shape == (6,)
    assert np.all(np.diff(means["accuracy_by_length"]) <= 0)
    assert means["sequence_accuracy_2"] == means["accuracy_by_length"][1]
    found = predictions(task, params)
    assert found["predictions"].shape == (64, 6 * repeat + 1)
    assert f"of 64 words of {6 * repeat} tokens right" in task.render(found)
    params, extra = task.init(jax.random.key(1))
    train = next(task.train_data(0, 1))
    _, aux = task.loss(params, extra, train, None)
    assert float(aux.weight) == (train["labels"] != IGNORE).sum() == 4 * 13


def test_one_filler_makes_a_step_of_two(golden):
    """Labels of a word with fillers are those of the word without, one filler later."""
    plain, delayed = (
        build("word_problem", **WORDS, **{"data.tokens_per_element": repeat}).eval_data(0)
        for repeat in (1, 2)
    )
    elements = delayed["ids"][:, 1::2]
    assert elements.max() < 6 and (delayed["ids"][:, 2::2] == 6 + 4).all()
    assert (delayed["labels"][:, 1::2] == IGNORE).all() and (plain["labels"] != IGNORE).all()
    same = np.load(golden / "deltaproduct" / "word_S3.npz")["mult_table"]
    np.testing.assert_array_equal(
        same[delayed["labels"][:, 2:-2:2], elements[:, 1:]], delayed["labels"][:, 4::2]
    )


@pytest.mark.parametrize("name", ["S4", "A5", "S5"])
def test_variants_limit_the_elements(name):
    task = build("word_problem", **WORDS, **{"data.group": name, "data.limit_to": 3})
    everything = build("word_problem", **WORDS, **{"data.group": name})
    count = lambda task: len(
        np.unique(np.concatenate([task.eval_data(i)["ids"] for i in range(40)]))
    )
    # the identity, transpositions (not in A5) and 3-cycles, and BOS
    assert count(task) == {"S4": 1 + 6 + 8, "A5": 1 + 20, "S5": 1 + 10 + 20}[name] + 1
    assert count(everything) == {"S4": 24, "A5": 60, "S5": 120}[name] + 1


def test_only_swaps():
    task = build("word_problem", **WORDS, **{"data.group": "S5", "data.only_swaps": True})
    assert len(np.unique(task.eval_data(0)["ids"])) == 1 + 10 + 1
    for group, changes in (("A5", {"data.only_swaps": True}), ("A5", {"data.limit_to": 2})):
        with pytest.raises(ConfigError, match="no element but the identity"):
            build("word_problem", **WORDS, **{"data.group": group, **changes})


@pytest.mark.parametrize("name", ["parity", "modular_arithmetic", "modular_arithmetic_brackets"])
def test_scaled_accuracy_is_0_for_guessing_and_1_for_knowing(name):
    lengths = {"data.lengths": (3, 9), "data.eval_lengths": (9, 25), "data.row_tokens": 32}
    task = build("formal_language", **lengths, **{"data.language": name})
    batch, params, means = evaluated(task)
    assert (batch["labels"] != IGNORE).sum() == 32
    chance = 0.5 if name == "parity" else 0.2
    np.testing.assert_allclose(
        means["scaled_accuracy"], (means["accuracy"] - chance) / (1 - chance), rtol=1e-5
    )
    by_length = means["accuracy_by_length"]
    edges = np.round(np.linspace(9, 26, 9))
    weights = np.histogram(batch["lengths"].max(axis=1), edges - 0.5)[0]
    np.testing.assert_allclose(np.nansum(by_length * weights) / 32, means["accuracy"], rtol=1e-5)
    assert (np.isnan(by_length) == (weights == 0)).all()
    lines = task.render(predictions(task, params)).splitlines()
    assert len(lines) == 64 and all("=" in line for line in lines)
    right = sum("wrong" not in line for line in lines)
    assert right < 64


def test_wrong_formal_configs():
    with pytest.raises(ConfigError, match="shortest and the longest"):
        build("formal_language", **{"data.lengths": (3, 4, 5)})
    with pytest.raises(ConfigError, match="must hold BOS"):
        build("formal_language", **{"data.row_tokens": 20})
    with pytest.raises(ConfigError, match="smaller than the 5 tokens"):
        build("formal_language", **{"model.vocab_size": 4})
