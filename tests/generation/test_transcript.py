"""Transcripts of rollouts: the texts are what the agent read and wrote, and nothing else about a rollout changes."""

from __future__ import annotations

import dataclasses

import pytest

from memgen.chat import CHATML, conversation_ids
from memgen.environments.base import Step
from memgen.generation.rollout import Actor, EpisodeSettings, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.generation.transcript import rollout_with_text
from rl_runs import Countdown, Vowels
from tiny import byte_tokenizer, tiny_memgen

TOKENIZER = byte_tokenizer()
SAMPLED = GenerationSettings(max_new_tokens=5, temperature=1.0, group_size=2)


def actor(environment, **episodes) -> Actor:
    model = tiny_memgen(cap=2)
    model.reasoner.end_at(TOKENIZER.convert_tokens_to_ids("<|im_end|>"))
    return Actor(model, TOKENIZER, environment, SAMPLED, EpisodeSettings(**episodes), CHATML)


def play(player):
    examples = player.environment.examples("train")[:3]
    return rollout_with_text(player, examples, list(range(2 * len(examples))))


@pytest.mark.parametrize("environment", [Vowels(), Countdown((1, 2, 3))], ids=["one turn", "several turns"])
def test_writing_down_changes_nothing_about_a_rollout(environment):
    player = actor(environment)
    listened, _ = play(player)
    plain = rollout(player, environment.examples("train")[:3], list(range(6)))
    assert listened.trajectories == plain.trajectories
    assert listened.work == plain.work


def test_the_first_prompt_and_the_observations_are_what_the_agent_read():
    player = actor(Countdown((3,)))
    rollouts, transcripts = play(player)
    for trajectory, transcript in zip(rollouts.trajectories, transcripts, strict=True):
        assert [m["content"] for m in transcript.prompt] == ["count", "3 to go"]
        assert len(transcript.answers) == len(trajectory.turns) == 3
        assert len(transcript.observations) == 2
        for seen, turn in zip(transcript.observations, trajectory.turns[1:], strict=True):
            assert f"user\n{seen}<|im_end|>" in TOKENIZER.decode(turn.context)


def test_a_whole_conversation_encodes_to_what_the_agent_read_and_wrote():
    """Where its tokens are the text's own, which random bytes seldom are: the agent's turns are replaced by text."""
    player = actor(Countdown((2,)))
    _, (transcript, _) = play(player)
    plain = dataclasses.replace(transcript, answers=("go", "stop"))
    tokens = conversation_ids(TOKENIZER, plain.messages(), CHATML)
    first, second = tokens.turns
    assert TOKENIZER.decode(tokens.ids[first.prompt_end : first.end]) == "go<|im_end|>"
    assert TOKENIZER.decode(tokens.ids[second.prompt_end : second.end]) == "stop<|im_end|>"
    assert transcript.observations[0] in TOKENIZER.decode(tokens.ids[first.end : second.prompt_end])


class Chatty(Countdown):
    """Answers with more than fits, in characters of several bytes."""

    def step_all(self, episodes, actions):
        steps = super().step_all(episodes, actions)
        return [Step("äöü" * 20, step.done, step.parts, step.fault) for step in steps]


@pytest.mark.parametrize("limit", [5, 6, 7])
def test_a_long_observation_is_written_down_as_it_was_cut(limit):
    player = actor(Chatty((2,)), max_observation_tokens=limit)
    rollouts, transcripts = play(player)
    for trajectory, transcript in zip(rollouts.trajectories, transcripts, strict=True):
        (seen,) = transcript.observations
        assert len(TOKENIZER.encode(seen, add_special_tokens=False)) <= limit
        assert f"user\n{seen}<|im_end|>" in TOKENIZER.decode(trajectory.turns[1].context)


def test_insertions_count_from_the_beginning_of_a_turn():
    _, transcripts = play(actor(Vowels()))
    assert all(transcript.insertions[0][0] == 0 for transcript in transcripts)
    assert any(len(transcript.insertions[0]) > 1 for transcript in transcripts)


def test_an_episode_that_the_environment_failed_keeps_what_was_said_before():
    _, transcripts = play(actor(Countdown((3, 3), fails={0: 2})))
    assert [len(transcript.answers) for transcript in transcripts] == [2, 2, 3, 3]
    assert [len(transcript.observations) for transcript in transcripts] == [1, 1, 2, 2]
