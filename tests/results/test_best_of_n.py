"""Which of n answers count at equal positions, and which of them is chosen."""

from __future__ import annotations

import pytest

from memgen.results.best_of_n import affordable, oracle, positions, positions_of_first, vote

PROMPT = 30


def row(sample: int, new: int, reward: float, n: int = 3) -> dict:
    """An answer of `new` tokens, one of n whose prompt was read once for all of them."""
    return {
        "sample": sample,
        "reward": reward,
        "reasoner_positions": PROMPT / n + new - 1,
        "weaver_positions": 0.0,
        "trigger_positions": 0.0,
        "prompt_tokens": PROMPT,
    }


ROWS = [row(0, 5, 0.0), row(1, 9, 1.0), row(2, 7, 0.5)]


def test_the_prompt_counts_once_however_many_answers_count():
    assert positions_of_first(ROWS, 1) == PROMPT + 4
    assert positions_of_first(ROWS, 2) == PROMPT + 4 + 8
    assert positions_of_first(ROWS, 3) == PROMPT + 4 + 8 + 6 == pytest.approx(sum(map(positions, ROWS)))


@pytest.mark.parametrize(
    ("budget", "count"), [(0, 1), (PROMPT + 11.9, 1), (PROMPT + 12, 2), (PROMPT + 18, 3), (1e9, 3)]
)
def test_as_many_count_as_the_budget_allows_and_the_first_always(budget, count):
    assert affordable(ROWS, budget) == count


def test_the_oracle_takes_the_highest_reward():
    assert oracle(ROWS)["sample"] == 1
    assert oracle([row(0, 5, 1.0), row(1, 5, 1.0)])["sample"] == 0


@pytest.mark.parametrize(
    ("finals", "sample"),
    [
        (["a", "b", "b"], 1),
        (["a", "b", "c"], 0),
        ([None, "b", "c"], 1),
        ([None, None, None], 0),
        (["a", None, None], 0),
    ],
    ids=["most frequent", "tie", "tie without the first", "no final answer", "no votes of none"],
)
def test_the_vote_takes_the_most_frequent_final_answer_and_the_earliest_of_several(finals, sample):
    assert vote(ROWS, finals)["sample"] == sample
