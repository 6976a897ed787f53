"""Paired effects, and Holm's correction against the closed test that it abbreviates."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from memgen.analysis.effects import Outcome, effects, filter_rate, holm, outcomes
from memgen.results.statistics import mean_interval, paired_test


def closed_test(p_values: list[float], index: int) -> float:
    """The adjusted p-value of the closed Bonferroni test: the worst over all sets of hypotheses with this one."""
    others = [i for i in range(len(p_values)) if i != index]
    sets = [(index, *some) for size in range(len(others) + 1) for some in combinations(others, size)]
    return max(min(1.0, len(some) * min(p_values[i] for i in some)) for some in sets)


def test_holms_correction_is_that_of_the_closed_bonferroni_test():
    random = np.random.default_rng(0)
    for size in range(1, 8):
        p_values = np.round(random.random(size) ** 3, 2).tolist()  # Some of them are equal.
        assert holm(p_values) == pytest.approx([closed_test(p_values, i) for i in range(size)])


def test_no_tests_need_no_correction():
    assert holm([]) == []


def answer(reward, *, task="a", failure=None, fault=None, removed=0, invoked=2):
    return {
        "reward": reward,
        "task": task,
        "failure": failure,
        "fault": fault,
        "removed": removed,
        "invoked": invoked,
    }


def two_conditions() -> dict:
    right = {i: answer(1.0, task="ab"[i % 2]) for i in range(20)}
    wrong = {
        i: answer(0.0, task="a", failure="cut off", removed=2) if i % 2 == 0 else answer(1.0, task="b")
        for i in range(20)
    }
    return {"as it is": right, "changed": wrong}


def test_effects_are_paired_by_item_and_tell_tasks_and_failures_apart():
    answers = two_conditions()
    found = {
        e.outcome.name: e
        for e in effects([("changed", "as it is")], answers, outcomes(list(answers.values())))
    }
    assert set(found) == {"reward", "reward on a", "reward on b", "failure: cut off"}
    before, after = [1.0] * 20, [0.0, 1.0] * 10
    assert found["reward"].difference == mean_interval([b - a for a, b in zip(before, after, strict=True)])
    assert found["reward"].p_value == paired_test(before, after).p_value
    assert found["reward"].adjusted == pytest.approx(4 * found["reward"].p_value)
    assert (found["reward on a"].difference.mean, found["reward on a"].items) == (-1.0, 10)
    assert found["reward on b"].p_value == 1.0
    assert found["failure: cut off"].difference.mean == 0.5
    assert [name for name, e in found.items() if e.harms(0.05)] == [
        "reward",
        "reward on a",
        "failure: cut off",
    ]


def test_an_improvement_is_no_harm():
    answers = two_conditions()
    (found,) = effects([("as it is", "changed")], answers, [Outcome("reward")])
    assert found.adjusted < 0.05
    assert not found.harms(0.05)


def test_items_that_the_environment_failed_under_either_condition_are_left_out():
    answers = two_conditions()
    answers["changed"][0] = answer(0.0, fault="it broke", removed=2)
    (found,) = effects([("changed", "as it is")], answers, [Outcome("reward")])
    assert found.items == 19
    assert filter_rate(answers["changed"]) == 18 / 38
    assert filter_rate({}) == 0.0
