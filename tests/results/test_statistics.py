"""Statistics against enumeration and against what is known of them."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from memgen.results.statistics import mean_interval, paired_test, pass_at_k


@pytest.mark.parametrize(("answers", "right"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1), (4, 2)])
def test_pass_at_k_is_the_share_of_choices_of_k_answers_with_a_right_one(answers, right):
    scores = [True] * right + [False] * (answers - right)
    for k in range(1, answers + 1):
        choices = [any(choice) for choice in combinations(scores, k)]
        assert pass_at_k(answers, right, k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_is_unbiased_where_the_naive_estimate_is_not():
    chance, answers, k = 0.3, 6, 3
    expected = naive = 0.0
    for outcome in product([True, False], repeat=answers):
        right = sum(outcome)
        probability = chance**right * (1 - chance) ** (answers - right)
        expected += probability * pass_at_k(answers, right, k)
        naive += probability * (1 - (1 - right / answers) ** k)
    assert expected == pytest.approx(1 - (1 - chance) ** k)
    assert abs(naive - (1 - (1 - chance) ** k)) > 0.01


@pytest.mark.parametrize(("answers", "right", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_impossible_numbers_are_refused(answers, right, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(answers, right, k)


def test_the_interval_is_about_as_wide_as_normal_theory_says():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400).tolist()
    found = mean_interval(values)
    half = 1.96 * np.std(values) / np.sqrt(400)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.mean - half, abs=0.03)
    assert found.high == pytest.approx(found.mean + half, abs=0.03)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    random = np.random.default_rng(1)
    held = 0
    for trial in range(60):
        found = mean_interval((random.random(80) < 0.4).astype(float).tolist(), seed=trial)
        held += found.low <= 0.4 <= found.high
    assert held >= 52


def test_the_same_scores_have_the_same_interval():
    values = [0.0, 1.0, 1.0, 0.5] * 9
    assert mean_interval(values) == mean_interval(values)


def test_equal_scores_have_an_interval_of_no_width_and_one_score_has_none():
    assert (mean_interval([1.0] * 5).low, mean_interval([1.0] * 5).high) == (1.0, 1.0)
    single = mean_interval([0.5])
    assert (single.mean, single.low, single.high) == (0.5, None, None)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_binary_scores_are_tested_by_the_items_that_changed():
    """McNemar's exact test: 9 won and 1 lost is as likely as 10 fair coins with at most 1 head, on both sides."""
    first = [0.0] * 9 + [1.0] + [1.0] * 50 + [0.0] * 40
    second = [1.0] * 9 + [0.0] + [1.0] * 50 + [0.0] * 40
    found = paired_test(first, second)
    assert found.name == "McNemar, exact"
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired_test(second, first).p_value == pytest.approx(found.p_value)
    assert paired_test(first, first).p_value == 1.0


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_few_graded_scores_are_tested_with_every_pattern_of_signs(count):
    random = np.random.default_rng(count)
    first, second = random.random(count), random.random(count) + 0.3
    gains = second - first
    means = [np.mean(gains * signs) for signs in product([1, -1], repeat=count)]
    least = min(
        np.mean(np.array(means) >= gains.mean() - 1e-12), np.mean(np.array(means) <= gains.mean() + 1e-12)
    )
    found = paired_test(first.tolist(), second.tolist())
    assert found.name == "sign-flip permutation"
    assert found.p_value == pytest.approx(min(1.0, 2 * least))


def test_many_graded_scores_are_tested_by_sampled_signs():
    random = np.random.default_rng(5)
    first = random.random(300)
    assert (
        paired_test(first.tolist(), (first + 0.05 + 0.1 * random.normal(size=300)).tolist()).p_value < 0.001
    )
    assert paired_test(first.tolist(), (first + 0.1 * random.normal(size=300)).tolist()).p_value > 0.01
    assert paired_test(first.tolist(), first.tolist()).p_value == 1.0


def test_runs_of_different_length_are_refused():
    with pytest.raises(ValueError, match="the same items"):
        paired_test([1.0], [1.0, 0.0])
