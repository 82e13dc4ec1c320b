"""Formal languages: answers against Python's own arithmetic, lengths, rows."""

import numpy as np
import pytest

from scanax.train.data.curriculum import Curriculum
from scanax.train.data.formal import Words, language
from scanax.train.data.pipeline import IGNORE

NAMES = ("parity", "modular_arithmetic", "modular_arithmetic_brackets")


def rows(name: str, n: int = 40, **changes) -> tuple[Words, dict[str, np.ndarray]]:
    arguments = {"seed": 0, "lengths": (3, 40), "tokens": 128}
    source = Words(language(name, 5), **{**arguments, **changes})
    return source, source.batch(np.arange(n), np.arange(n))


def spoken(source: Words, batch: dict[str, np.ndarray]):
    """(text, label, length) of every word in the rows."""
    for ids, labels, segments, lengths in zip(*batch.values(), strict=True):
        for end in np.flatnonzero(labels != IGNORE):
            word = ids[segments == segments[end]]
            texts = [source.language.vocab[i] for i in word]
            assert texts[0] == "<bos>" and texts[-1] == "="
            assert len(texts) == lengths[end] + 2
            yield "".join(texts[1:-1]), labels[end], lengths[end]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_python(name):
    source, batch = rows(name)
    words = list(spoken(source, batch))
    assert len(words) > 100
    for text, answer, _ in words:
        value = text.count("1") % 2 if name == "parity" else eval(text) % 5
        assert answer == value, text


@pytest.mark.parametrize("name", NAMES)
def test_every_length_occurs_and_answers_are_spread(name):
    source, batch = rows(name, 600)
    _, answers, lengths = zip(*spoken(source, batch), strict=True)
    allowed = range(3, 41) if name != "modular_arithmetic" else range(3, 40, 2)
    assert set(lengths) == set(allowed)
    share = np.bincount(answers) / len(answers)
    assert len(share) == source.language.modulus and share.min() > 0.5 / len(share)


def test_single_words_of_the_longest_row():
    source, batch = rows("parity", lengths=(40, 256), tokens=258, single=True)
    assert (batch["labels"] != IGNORE).sum(axis=1).tolist() == [1] * 40
    assert {length for _, _, length in spoken(source, batch)} <= set(range(40, 257))


def test_rows_depend_on_seed_and_index_alone():
    _, batch = rows("modular_arithmetic", 8)
    source, _ = rows("modular_arithmetic", 1)
    alone = source.batch(np.asarray([5]), np.asarray([0]))
    np.testing.assert_array_equal(alone["ids"][0], batch["ids"][5])
    _, other = rows("modular_arithmetic", 8, seed=1)
    assert (other["ids"] != batch["ids"]).any()


def test_curriculum_holds_long_words_back():
    stages = Curriculum((3, 9, 39), (0, 2, 3), longest=40, batch_size=10, shortest=3)
    source, batch = rows("modular_arithmetic", curriculum=stages)
    limits = [9 if i >= 20 else 3 for i in range(30)] + [39] * 10  # batches of ten rows
    longest = batch["lengths"].max(axis=1)
    assert (longest <= limits).all() and {3, 9} < set(longest) and longest.max() > 30
    assert set(batch["lengths"][20:30].ravel()) == {0, 3, 5, 7, 9}
    assert len(list(spoken(source, {k: x[:20] for k, x in batch.items()}))) == 20 * (128 // 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": (40, 3)}, "no words of 40 to 3"),
        ({"lengths": (4, 4)}, "no words of 4 to 4"),
        ({"lengths": (3, 127)}, "must hold BOS"),
        ({"lengths": (4, 40), "curriculum": Curriculum((4,), (0,), 40, 1)}, "no words of 4 to 4"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        rows("modular_arithmetic", **changes)


def test_wrong_languages():
    with pytest.raises(ValueError, match="unknown"):
        language("dyck", 5)
    with pytest.raises(ValueError, match="at least 2"):
        language("parity", 1)
