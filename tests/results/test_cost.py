"""The costs of answers add up to the exact work counts of their rollout."""

from __future__ import annotations

import dataclasses

import pytest

from memgen.chat import CHATML
from memgen.generation.rollout import Actor, EpisodeSettings, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.results.cost import costs
from rl_runs import Countdown, Vowels
from tiny import byte_tokenizer, tiny_memgen

TOKENIZER = byte_tokenizer()


def played(environment, group_size, keep, **model):
    agent = tiny_memgen(cap=2, **model)
    agent.boundaries.config = dataclasses.replace(agent.boundaries.config, keep_turn_latents=keep)
    for token in range(60):  # Answers of unequal length.
        agent.reasoner.end_at(token)
    settings = GenerationSettings(
        max_new_tokens=9, temperature=1.0, group_size=group_size, sample_decisions=True
    )
    player = Actor(agent, TOKENIZER, environment, settings, EpisodeSettings(), CHATML)
    examples = environment.examples("train")[:3]
    return agent, rollout(player, examples, [7 * i for i in range(len(examples) * group_size)])


@pytest.mark.parametrize("environment", [Vowels(), Countdown((1, 2, 3))], ids=["one turn", "several turns"])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("keep", [False, True], ids=["latents of a turn", "latents of all turns"])
@pytest.mark.parametrize(
    "model",
    [
        {"trigger": "always"},
        {"trigger": "never"},
        {"trigger": "random"},
        {"trigger": "tokens"},
        {"trigger": "tokens", "prompt_latents": 0},
        {"trigger": "random", "prompt_latents": 0},
        {"trigger": "random", "inference_latents": 0},
        {"trigger": "hidden_states", "reads": "hidden_states"},
    ],
    ids=lambda model: " ".join(map(str, model.values())),
)
def test_costs_add_up_to_the_work_of_the_rollout(environment, group_size, keep, model):
    agent, rollouts = played(environment, group_size, keep, **model)
    found = costs(agent, rollouts.trajectories, group_size)
    assert sum(cost.reasoner for cost in found) == pytest.approx(rollouts.work.reasoner_positions)
    assert sum(cost.weaver for cost in found) == pytest.approx(rollouts.work.weaver_positions)
    assert sum(cost.trigger for cost in found) == pytest.approx(rollouts.work.trigger_positions)


def test_a_single_answer_to_a_prompt_has_whole_costs():
    agent, rollouts = played(Vowels(), 1, False)
    (first, *_) = costs(agent, rollouts.trajectories, 1)
    (turn,) = rollouts.trajectories[0].turns
    inside = len(turn.insertions) - 1
    assert first.reasoner == len(turn.context) + 3 + len(turn.tokens) - 1 + 2 * inside
