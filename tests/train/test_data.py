"""Word problems and the pipeline: order, positions, processes, curriculum."""

import json

import numpy as np
import pytest

from scanax.models.delta_product.groups import group, prefix_products
from scanax.train.data.pipeline import Batches
from scanax.train.data.word_problem import WordProblems, bos_id, vocab_size


def words(**changes) -> WordProblems:
    arguments = {"name": "S3", "seed": 0, "length": 20, "batch_size": 4}
    return WordProblems(**{**arguments, **changes})


@pytest.mark.parametrize("name", ["S3", "S4", "A5", "S5"])
def test_rows_are_words_with_their_prefix_products(name):
    row = words(name=name)[3]
    assert row["ids"][0] == row["labels"][0] == bos_id(group(name)) < vocab_size(group(name))
    np.testing.assert_array_equal(row["labels"][1:], prefix_products(group(name), row["ids"][1:]))
    assert all(x.dtype == np.int32 and x.shape == (21,) for x in row.values())


def test_elements_are_uniform_over_the_whole_group():
    counts = np.bincount(np.concatenate([words()[i]["ids"][1:] for i in range(600)]), minlength=6)
    assert counts.min() > 0.9 * counts.mean() and len(counts) == 6


def test_rows_depend_on_seed_and_index_alone():
    np.testing.assert_array_equal(words()[7]["ids"], words(batch_size=9)[7]["ids"])
    assert (words()[7]["ids"] != words()[8]["ids"]).any()
    assert (words()[7]["ids"] != words(seed=1)[7]["ids"]).any()


def test_curriculum_packs_words_of_the_step():
    source = words(lengths=(4, 20), starts=(0, 2))
    short, long = source[7], source[8]  # batch 1 and batch 2
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


def test_position_is_exact():
    batches = Batches(words(), 4, 0, 1)
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches)["ids"] for _ in range(3)]
    again = Batches(words(), 4, 0, 1)
    again.set_state(state)
    np.testing.assert_array_equal([next(again)["ids"] for _ in range(3)], expected)
    np.testing.assert_array_equal(expected[0], [words()[i]["ids"] for i in range(20, 24)])


def test_any_number_of_processes_reads_the_same_batches():
    whole = Batches(words(), 4, 0, 1)
    parts = [Batches(words(), 4, process, 2) for process in range(2)]
    for _ in range(3):
        rows = np.concatenate([next(part)["ids"] for part in parts])
        expected = next(whole)["ids"]
        assert sorted(map(tuple, rows)) == sorted(map(tuple, expected))
    with pytest.raises(ValueError, match="does not divide over 3 processes"):
        Batches(words(), 4, 0, 3)


def test_a_position_in_other_data_is_refused():
    state = Batches(words(), 4, 0, 1).get_state()
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        Batches(words(seed=1), 4, 0, 1).set_state(state)
