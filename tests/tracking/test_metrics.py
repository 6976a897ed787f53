"""Measures of answers against means by hand."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from memgen.model.weaver import WeaverConfig
from memgen.tracking.metrics import AnswerMetrics, Measured
from memgen.types import AgentTurn, Decision, Trajectory


def turn(context, tokens, insertions=(), finished=True) -> AgentTurn:
    return AgentTurn(
        context=list(context),
        tokens=list(tokens),
        logprobs=[0.0] * len(tokens),
        decisions=[int(Decision.NOT_ASKED)] * len(tokens),
        invoke_probs=[0.0] * len(tokens),
        insertions=list(insertions),
        finished=finished,
    )


def answer(reward, parts, *turns, fault=None) -> Trajectory:
    return Trajectory("item", turns, reward, parts, not all(t.finished for t in turns), fault)


WEAVER = WeaverConfig(prompt_latents=3, inference_latents=2)
FIRST = [
    answer(1.0, {"format": 1.0}, turn([1], [5, 6, 7, 8], [(1, 0), (3, 1), (4, 1)], finished=False)),
    answer(0.25, {"format": 0.0, "price": 0.5}, turn([1, 2], [5])),
]
SECOND = [answer(1.5, {"price": 1.0}, turn([3], [9, 9], [(2, 1)]))]


def measured(*batches) -> dict[str, float]:
    metric = AnswerMetrics(WEAVER)
    for trajectories in batches:
        metric.update(trajectories)
    return {name: float(value) for name, value in metric.compute().items()}


def test_means_are_over_answers_and_parts_over_the_answers_that_have_them():
    assert measured(FIRST, SECOND) == pytest.approx(
        {
            "reward": (1.0 + 0.25 + 1.5) / 3,
            "exact_match": 2 / 3,
            "finished": 2 / 3,
            "answer_tokens": (4 + 1 + 2) / 3,
            "turns": 1.0,
            "insertions_per_answer": (3 + 0 + 1) / 3,
            "latents_per_answer": (3 + 2 + 2 + 2) / 3,
            "invoked_at_prompt_end": 1 / 3,
            "reward_format": 1 / 2,
            "reward_price": 1.5 / 2,
        }
    )


def test_boundaries_that_settings_ruled_out_are_counted_per_answer():
    ruled_out = [{"number": 2, "cooldown": 0}, {"number": 1, "cooldown": 0}, {"number": 0, "cooldown": 0}]
    first, second, third = (replace(turn([1], [2]), ruled_out=counts) for counts in ruled_out)
    found = measured([answer(1.0, {}, first, second)], [answer(1.0, {}, third)])
    assert found["ruled_out_number"] == 1.5
    assert found["ruled_out_cooldown"] == 0.0
    old = asdict(Measured.of(answer(1.0, {}, third), WEAVER))
    del old["ruled_out"]
    assert Measured.from_record(old) == replace(Measured.of(answer(1.0, {}, third), WEAVER), ruled_out={})


def test_the_order_and_the_size_of_batches_do_not_matter():
    assert measured(SECOND, FIRST) == pytest.approx(measured(FIRST, SECOND))


def test_an_exact_match_is_a_whole_reward():
    assert measured([answer(0.999, {}, turn([1], [2]))])["exact_match"] == 0.0
    assert measured([answer(1.0, {}, turn([1], [2]))])["exact_match"] == 1.0


def test_no_answer_gives_no_means():
    metric = AnswerMetrics(WEAVER)
    metric.update(SECOND)
    metric.reset()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute() == {}


def test_a_reset_forgets_everything():
    metric = AnswerMetrics(WEAVER)
    metric.update(FIRST)
    metric.compute()
    metric.reset()
    metric.update(SECOND)
    assert {name: float(value) for name, value in metric.compute().items()} == measured(SECOND)


def test_an_episode_that_the_environment_failed_counts_for_nothing_but_its_share():
    failed = answer(0.0, {}, turn([1], [2, 3]), fault="the server is gone")
    assert measured(SECOND, [failed]) == pytest.approx(measured(SECOND) | {"faulted": 0.5})
    assert measured([failed]) == {"faulted": 1.0}
