"""Word problems: products, order, curriculum."""

import numpy as np
import pytest

from scanax.models.delta_product.groups import group, prefix_products
from scanax.train.data.word_problem import WordProblems, bos_id, vocab_size


def words(**changes) -> WordProblems:
    arguments = {"name": "S3", "seed": 0, "length": 20, "batch_size": 4}
    return WordProblems(**{**arguments, **changes})


def row(source: WordProblems, index: int) -> dict[str, np.ndarray]:
    batch = source.batch(np.asarray([index]), np.asarray([0]))
    return {name: values[0] for name, values in batch.items()}


@pytest.mark.parametrize("name", ["S3", "S4", "A5", "S5"])
def test_rows_are_words_with_their_prefix_products(name):
    found = row(words(name=name), 3)
    ids, labels = found["ids"], found["labels"]
    assert ids[0] == labels[0] == bos_id(group(name)) < vocab_size(group(name))
    np.testing.assert_array_equal(labels[1:], prefix_products(group(name), ids[1:]))
    assert all(x.dtype == np.int32 and x.shape == (21,) for x in found.values())


def test_elements_are_uniform_over_the_whole_group():
    counts = np.bincount(
        words().batch(np.arange(600), np.arange(600))["ids"][:, 1:].ravel(), minlength=6
    )
    assert counts.min() > 0.9 * counts.mean() and len(counts) == 6


def test_rows_depend_on_seed_and_index_alone():
    np.testing.assert_array_equal(row(words(), 7)["ids"], row(words(batch_size=9), 7)["ids"])
    assert (row(words(), 7)["ids"] != row(words(), 8)["ids"]).any()
    assert (row(words(), 7)["ids"] != row(words(seed=1), 7)["ids"]).any()


def test_curriculum_packs_words_of_the_step():
    source = words(lengths=(4, 20), starts=(0, 2))
    short, long = row(source, 7), row(source, 8)  # batch 1 and batch 2
    assert (short["ids"] == bos_id(source.group)).nonzero()[0].tolist() == [0, 5, 10, 15, 20]
    np.testing.assert_array_equal(short["segments"], np.arange(21) // 5)
    np.testing.assert_array_equal(
        short["labels"][6:10], prefix_products(source.group, short["ids"][6:10])
    )
    assert (long["segments"] == 0).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": (4,), "starts": (0, 2)}, "same number"),
        ({"lengths": (4,), "starts": (3,)}, "first step must be 0"),
        ({"lengths": (4, 8), "starts": (0, 0)}, "must increase"),
        ({"lengths": (40,), "starts": (0,)}, "between 1 and"),
        ({"name": "Z60"}, "unknown group"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        words(**changes)
