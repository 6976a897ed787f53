"""What a rollout says about itself against figures by hand, and advice that is given once."""

from __future__ import annotations

import logging

import pytest
import torch

from memgen.model.weaver import WeaverConfig
from memgen.tracking.signals import Advice, latent_metrics, rollout_means, rollout_sums, values_of_some
from memgen.types import AgentTurn, Decision, InsertionKind, Trajectory

NO, SKIP, INVOKE = Decision.NOT_ASKED, Decision.SKIP, Decision.INVOKE
WEAVER = WeaverConfig(prompt_latents=3, inference_latents=2)


def turn(*decisions: Decision, finished: bool = True) -> AgentTurn:
    kinds = [InsertionKind.PROMPT if i == 0 else InsertionKind.INFERENCE for i in range(len(decisions))]
    return AgentTurn(
        context=[1],
        tokens=[5] * len(decisions),
        logprobs=[0.0] * len(decisions),
        decisions=[int(d) for d in decisions],
        invoke_probs=[0.5] * len(decisions),
        insertions=[
            (1 + i, int(k)) for i, (d, k) in enumerate(zip(decisions, kinds, strict=True)) if d == INVOKE
        ],
        finished=finished,
    )


def episode(reward: float, *turns: AgentTurn, fault: str | None = None, **parts: float) -> Trajectory:
    named = {name.replace("__", "/"): value for name, value in parts.items()}
    return Trajectory("item", turns, reward, named, any(not t.finished for t in turns), fault)


EPISODES = [
    episode(1.0, turn(INVOKE, NO, SKIP, INVOKE), exact=1.0, shop__exact=1.0),
    episode(0.0, turn(SKIP, INVOKE), turn(INVOKE, NO, NO, finished=False), exact=0.0, add__exact=0.0),
    episode(0.5, turn(SKIP), exact=0.5, add__exact=0.5),
    episode(9.0, turn(INVOKE), fault="gone", exact=9.0, add__exact=9.0),
]


def test_means_are_over_the_episodes_that_the_environment_did_not_fail():
    means = rollout_means(rollout_sums(EPISODES, WEAVER))
    assert means == pytest.approx(
        {
            "rollout/faults": 1.0,
            "rollout/reward": 0.5,
            "rollout/reward_std": (0.5 / 3) ** 0.5,
            "rollout/exact_match": 1 / 3,
            "rollout/truncated": 1 / 3,
            "rollout/turns": 4 / 3,
            "rollout/tokens": 10 / 3,
            "rollout/tokens_max": 5.0,
            "rollout/tokens_min": 1.0,
            "rollout/insertions": 4 / 3,
            # Prompt ends: invoked, skipped, invoked, skipped. Inside: skipped, invoked, invoked.
            "trigger/invocation_rate_prompt": 2 / 4,
            "trigger/invocation_rate_inference": 2 / 3,
            "trigger/invocation_rate": 4 / 7,
            "trigger/invocations": 4 / 3,
            "trigger/offered": 7 / 3,
        }
    )


def test_ranks_sums_add_up_to_those_of_all_episodes():
    whole = rollout_sums(EPISODES, WEAVER)
    halves = [rollout_sums(EPISODES[:1], WEAVER), rollout_sums(EPISODES[1:], WEAVER)]
    for name, value in whole.items():
        how = (
            torch.minimum if name.endswith("_min") else torch.maximum if name.endswith("_max") else torch.add
        )
        assert float(how(halves[0][name], halves[1][name])) == float(value), name


def test_a_rollout_without_an_episode_has_no_means():
    assert rollout_means(rollout_sums(EPISODES[3:], WEAVER)) == {"rollout/faults": 1.0}


def test_parts_and_invocations_are_told_of_each_kind_of_item():
    assert values_of_some(EPISODES) == {
        "rollout/reward_exact": [1.0, 0.0, 0.5],
        "rollout/reward_shop/exact": [1.0],
        "rollout/reward_add/exact": [0.0, 0.5],
        "trigger/invocations_shop": [2.0],
        "trigger/invocations_add": [2.0, 0.0],
    }


def test_latents_are_measured_against_token_embeddings_and_each_other():
    embedding = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    same, across = torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert latent_metrics([same, across], embedding) == pytest.approx(
        {"latents/norm": 4.0, "latents/norm_over_embedding": 2.0, "latents/slot_cosine": 0.5}
    )
    assert "latents/slot_cosine" not in latent_metrics([same[:1]], embedding)
    assert latent_metrics([], embedding) == {}


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (
            lambda a: a.on_rollout({"rollout/reward": 1.0}, teaches=False, greedy=False),
            "all answers are correct",
        ),
        (
            lambda a: a.on_rollout({"rollout/reward": 0.0}, teaches=False, greedy=False),
            "all answers are wrong",
        ),
        (lambda a: a.on_rollout({"rollout/reward": 0.3}, teaches=False, greedy=True), "nothing is sampled"),
        (
            lambda a: a.on_rollout({"rollout/truncated": 0.75}, teaches=True, greedy=False),
            "75 % of the episodes were truncated",
        ),
        (
            lambda a: a.on_rollout({"rollout/faults": 2.0}, teaches=True, greedy=False),
            "2 episodes had an environment error",
        ),
        (lambda a: a.on_decisions(0.0), "the trigger skips at every boundary"),
        (lambda a: a.on_decisions(1.0), "the trigger invokes at every boundary"),
        (lambda a: a.on_decisions(None), "was not asked once"),
        (lambda a: a.on_update(0.0, 0.0, first_pass=True), "the gradient is exactly 0"),
        (lambda a: a.on_update(1e-9, 0.5, first_pass=True), "as it must be at the first update"),
    ],
)
def test_advice_is_given_once(caplog, look, message):
    advice = Advice()
    with caplog.at_level(logging.WARNING):
        look(advice)
        look(advice)
    assert caplog.text.count(message) == 1


@pytest.mark.parametrize(
    "look",
    [
        lambda a: a.on_rollout({"rollout/reward": 0.4, "rollout/truncated": 0.2}, teaches=True, greedy=False),
        lambda a: a.on_decisions(0.4),
        lambda a: a.on_update(0.3, 0.5, first_pass=True),
        # Later in a cycle a loss near 0 is chance.
        lambda a: a.on_update(1e-9, 0.5, first_pass=False),
    ],
)
def test_what_is_well_is_passed_over(caplog, look):
    with caplog.at_level(logging.WARNING):
        look(Advice())
    assert caplog.text == ""
