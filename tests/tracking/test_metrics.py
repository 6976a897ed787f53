"""Measures of answers against means by hand, and answers with their marks."""

from __future__ import annotations

import pytest
import torch

from memgen.environments.base import Reward
from memgen.model.weaver import WeaverConfig
from memgen.tracking.metrics import AnswerMetrics
from memgen.tracking.samples import marked_answer
from memgen.types import Generation, InsertionPlan, TokenBatch, WorkCount
from tiny import byte_tokenizer


def answers(prompts, tokens, plan, finished) -> Generation:
    width = max(map(len, tokens))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in tokens])
    return Generation(
        prompt=TokenBatch.from_rows(prompts),
        tokens=padded,
        lengths=torch.tensor([len(row) for row in tokens]),
        finished=torch.tensor(finished),
        logprobs=torch.zeros(padded.shape),
        decisions=torch.zeros_like(padded),
        invoke_probs=torch.zeros(padded.shape),
        plan=InsertionPlan.from_rows(
            [[p for p, _ in row] for row in plan], [[k for _, k in row] for row in plan]
        ),
        work=WorkCount(),
    )


WEAVER = WeaverConfig(prompt_latents=3, inference_latents=2)
FIRST = answers([[1], [1, 2]], [[5, 6, 7, 8], [5]], [[(1, 0), (3, 1), (4, 1)], []], [False, True])
SECOND = answers([[3]], [[9, 9]], [[(2, 1)]], [True])
REWARDS = (
    [Reward(1.0, {"format": 1.0}), Reward(0.25, {"format": 0.0, "price": 0.5})],
    [Reward(1.5, {"price": 1.0})],
)


def measured(*batches) -> dict[str, float]:
    metric = AnswerMetrics(WEAVER)
    for generation, rewards in batches:
        metric.update(generation, rewards)
    return {name: float(value) for name, value in metric.compute().items()}


def test_means_are_over_answers_and_parts_over_the_answers_that_have_them():
    assert measured((FIRST, REWARDS[0]), (SECOND, REWARDS[1])) == pytest.approx(
        {
            "reward": (1.0 + 0.25 + 1.5) / 3,
            "exact_match": 2 / 3,
            "finished": 2 / 3,
            "answer_tokens": (4 + 1 + 2) / 3,
            "insertions_per_answer": (3 + 0 + 1) / 3,
            "latents_per_answer": (3 + 2 + 2 + 2) / 3,
            "invoked_at_prompt_end": 1 / 3,
            "reward_format": 1 / 2,
            "reward_price": 1.5 / 2,
        }
    )


def test_the_order_and_the_size_of_batches_do_not_matter():
    assert measured((SECOND, REWARDS[1]), (FIRST, REWARDS[0])) == pytest.approx(
        measured((FIRST, REWARDS[0]), (SECOND, REWARDS[1]))
    )


def test_an_exact_match_is_a_whole_reward():
    assert measured((SECOND, [Reward(0.999)]))["exact_match"] == 0.0
    assert measured((SECOND, [Reward(1.0)]))["exact_match"] == 1.0


def test_no_answer_gives_no_means():
    metric = AnswerMetrics(WEAVER)
    metric.update(SECOND, REWARDS[1])
    metric.reset()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute() == {}


def test_a_reset_forgets_everything():
    metric = AnswerMetrics(WEAVER)
    metric.update(FIRST, REWARDS[0])
    metric.compute()
    metric.reset()
    metric.update(SECOND, REWARDS[1])
    assert {name: float(value) for name, value in metric.compute().items()} == measured((SECOND, REWARDS[1]))


def test_an_answer_is_marked_where_memory_was_woven_in():
    tokenizer = byte_tokenizer()
    text = tokenizer.encode("ab, cd.")
    generation = answers([[1, 2]], [text], [[(2, 0), (5, 1), (6, 1)]], [True])
    segments = marked_answer(tokenizer, WEAVER, generation, 0)
    assert [(segment.text, segment.is_insertion) for segment in segments] == [
        ("3 latents", True),
        ("ab,", False),
        ("2 latents", True),
        (" ", False),
        ("2 latents", True),
        ("cd.", False),
    ]
