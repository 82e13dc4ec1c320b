"""The order of examples: a permutation per epoch, exact positions, any number of processes."""

from collections import Counter
import json

import numpy as np
import pytest

from scanax.train.data import draws
from scanax.train.data.pipeline import (
    IGNORE,
    Batches,
    DataChanged,
    DataError,
    eval_batch,
    order,
)


class Numbers:
    """Record i holds i and the number of its draw."""

    def __init__(self, length: int = 10, name: str = "numbers"):
        self.length, self.identity = length, {"source": name}

    def __len__(self) -> int:
        return self.length

    def batch(self, records, draws):
        return {"labels": records.astype(np.int32), "draw": draws}


def batches(source=None, process: int = 0, processes: int = 1, **options) -> Batches:
    options = {"seed": 0, **options}
    return Batches(source or Numbers(), 4, process, processes, **options)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_an_epoch_visits_every_record_once(length):
    for seed, epoch in [(0, 0), (0, 1), (7, 0)]:
        found = draws.permute(np.arange(length), length, seed, np.full(length, epoch))
        np.testing.assert_array_equal(np.sort(found), np.arange(length))


def test_permutations_are_uniform():
    """Chi-square over the 24 orders of four records in 12,000 epochs; 23 degrees of freedom."""
    epochs = np.repeat(np.arange(12000), 4)
    found = draws.permute(np.tile(np.arange(4), 12000), 4, 3, epochs).reshape(-1, 4)
    counts = np.asarray(list(Counter(map(tuple, found.tolist())).values()))
    assert len(counts) == 24 and ((counts - 500) ** 2 / 500).sum() < 60


def test_epochs_and_seeds_differ_and_are_not_in_order():
    numbers = np.arange(1000)
    first, second = order(1000, 0, numbers), order(1000, 0, numbers + 1000)
    for a, b in [(first, second), (first, order(1000, 1, numbers)), (first, numbers)]:
        assert (a == b).sum() < 10
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    np.testing.assert_array_equal(order(1000, None, numbers + 1000), numbers)


def test_uniform_numbers_depend_on_the_draw_alone():
    whole = draws.uniform(5, np.arange(10000), 3)
    np.testing.assert_array_equal(draws.uniform(5, np.asarray([77, 3]), 3), whole[[77, 3]])
    assert abs(whole.mean() - 0.5) < 0.01 and abs(whole.var() - 1 / 12) < 0.003
    assert np.abs(np.corrcoef(whole.T) - np.eye(3)).max() < 0.05
    assert len({draws.stream(5, name) for name in ("a", "b", "ab", "ba")}) == 4


def test_position_is_exact():
    iterator = batches()
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator)["labels"] for _ in range(3)]
    again = batches(threads=3)
    again.set_state(state)
    np.testing.assert_array_equal([next(again)["labels"] for _ in range(3)], expected)


def test_batches_run_on_over_the_end_of_an_epoch():
    iterator = batches()  # 10 records in batches of 4
    labels = np.concatenate([next(iterator)["labels"] for _ in range(5)])
    for epoch in (labels[:10], labels[10:]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_reads_the_same_batches(processes):
    whole = batches()
    parts = [batches(process=process, processes=processes) for process in range(processes)]
    for _ in range(4):
        expected = next(whole)
        found = [next(part) for part in parts]
        for name in ("labels", "draw"):
            together = np.concatenate([part[name] for part in found])
            np.testing.assert_array_equal(together, expected[name])


def test_processes_must_divide_the_batch():
    with pytest.raises(DataError, match="does not divide over 3 processes"):
        batches(processes=3)


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: batches(Numbers(name="letters")), "source: numbers -> letters"),
        (lambda: batches(Numbers(11)), "records: 10 -> 11"),
        (lambda: batches(seed=1), "order_seed: 0 -> 1"),
    ],
)
def test_a_position_in_other_data_is_refused(other, message):
    state = batches().get_state()
    with pytest.raises(DataChanged, match=message):
        other().set_state(state)
    other().set_state(state, allow_change=True)


def test_the_last_evaluation_batch_is_filled_up_without_weight():
    found = [eval_batch(Numbers(), 4, index) for index in range(4)]
    assert found[3] is None
    np.testing.assert_array_equal(found[1]["labels"], [4, 5, 6, 7])
    np.testing.assert_array_equal(found[2]["labels"], [8, 9, IGNORE, IGNORE])
