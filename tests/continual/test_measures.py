"""Measures of continual learning, against matrices computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from memgen.continual.measures import Scores, measure


def exact(matrix, chain, tasks, items=10):
    """Scores whose means are the matrix's, in tenths."""
    rows = [
        {
            task: [1.0] * round(value * items) + [0.0] * (items - round(value * items))
            for task, value in zip(tasks, row, strict=True)
        }
        for row in matrix
    ]
    return Scores(tuple(chain), tuple(tasks), tuple(rows))


ABC = [
    # a    b    c
    [0.1, 0.2, 0.3],  # before
    [0.9, 0.4, 0.1],  # after a
    [0.5, 0.8, 0.2],  # after b
    [0.6, 0.3, 1.0],  # after c
]


def test_the_measures_are_those_computed_by_hand():
    found = measure(exact(ABC, "abc", "abc"))
    assert found.average.mean == pytest.approx((0.6 + 0.3 + 1.0) / 3)
    # Of a: max(0.9, 0.5) - 0.6; of b: max(0.4, 0.8) - 0.3.
    assert found.forgetting.mean == pytest.approx((0.3 + 0.5) / 2)
    assert found.backward.mean == pytest.approx(((0.6 - 0.9) + (0.3 - 0.8)) / 2)
    # Of b after a, and of c after a and b, against the reasoner before.
    assert found.forward.mean == pytest.approx(((0.4 - 0.2) + (0.2 - 0.3)) / 2)
    assert found.other is None


def test_the_order_of_the_columns_is_not_that_of_the_chain():
    shuffled = [[row[2], row[0], row[1]] for row in ABC]
    first, second = measure(exact(ABC, "abc", "abc")), measure(exact(shuffled, "abc", "cab"))
    for name, interval in first.as_dict().items():
        other = second.as_dict()[name]
        assert (interval is None) == (other is None)
        if interval is not None:
            assert interval.mean == pytest.approx(other.mean)


def test_a_chain_of_one_task_is_transfer_to_the_others():
    found = measure(exact([[0.1, 0.2, 0.3], [0.9, 0.4, 0.1]], "a", "abc"))
    assert found.average.mean == pytest.approx(0.9)
    assert found.other.mean == pytest.approx(((0.4 - 0.2) + (0.1 - 0.3)) / 2)
    assert found.forgetting is found.backward is found.forward is None


def test_what_is_never_lost_is_not_forgotten_and_backward_transfer_may_be_positive():
    found = measure(exact([[0.0, 0.0], [0.5, 0.0], [0.7, 0.9]], "ab", "ab"))
    assert found.forgetting.mean == pytest.approx(-0.2)
    assert found.backward.mean == pytest.approx(0.2)


def test_intervals_hold_the_measures_and_resample_the_same_items_in_every_row():
    random = np.random.default_rng(0)
    rewards = random.random(50).round()
    # The same items are right in both rows, so the difference is the same for every resample.
    rows = tuple({"a": list(rewards * 0.5), "b": list(rewards)} for _ in range(3))
    found = measure(Scores(("a", "b"), ("a", "b"), rows))
    assert found.backward.mean == found.backward.low == found.backward.high == 0.0
    assert found.average.low < found.average.mean < found.average.high
    # Half a reward of 50 items with variance 0.25 each, averaged with one of whole rewards.
    spread = (0.25 / 50) ** 0.5 * (0.25 + 1) ** 0.5 / 2
    assert (found.average.high - found.average.low) / (2 * 1.96) == pytest.approx(spread, rel=0.15)


def test_rows_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="a chain of 2 tasks has 3 rows"):
        Scores(("a", "b"), ("a", "b"), ({"a": [1.0], "b": [1.0]},))
    with pytest.raises(ValueError, match=r"a needs the same items in every row, at least one; got \[1, 2\]"):
        Scores(("a",), ("a",), ({"a": [1.0]}, {"a": [1.0, 0.0]}))
