"""Rollouts as text: what was said to the agent, what it said, and where memory was woven in.

A trajectory holds token ids, from which the text of an observation cannot be had back through an arbitrary chat
template. So the texts are written down where they pass by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from typing_extensions import override

from memgen.environments.base import (
    Episode,
    Example,
    InteractiveEnvironment,
    Message,
    Observation,
    Reward,
    Split,
    Step,
)
from memgen.generation.rollout import Actor, Rollouts, rollout
from memgen.types import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Transcript:
    """One episode as text.

    Attributes:
        prompt: what the agent read before its first turn.
        answers: the text of each of its turns, special tokens removed: what the environment was given.
        observations: what it read between two turns, one fewer than `answers`.
        insertions: for each turn, before which of its tokens latents were inserted (0: at the end of its prompt).
    """

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    observations: tuple[str, ...]
    insertions: tuple[tuple[int, ...], ...]

    def messages(self) -> list[Message]:
        """The whole conversation."""
        messages = list(self.prompt)
        for turn, answer in enumerate(self.answers):
            if turn:
                messages.append(Message(role="user", content=self.observations[turn - 1]))
            messages.append(Message(role="assistant", content=answer))
        return messages


def rollout_with_text(
    actor: Actor, examples: Sequence[Example], seeds: Sequence[int], *, keep_latents: bool = False
) -> tuple[Rollouts, list[Transcript]]:
    """`rollout`, and the transcript of each of its trajectories.

    Args:
        actor: who plays.
        examples: the items.
        seeds: a seed for each episode.
        keep_latents: whether to return the inserted latents.

    Raises:
        ValueError: as `rollout`.
        RuntimeError: as `rollout`.
    """
    observed: list[list[str]] | None = None
    if isinstance(actor.environment, InteractiveEnvironment):
        listening = _Listening(
            actor.environment, _Shortening(actor.tokenizer, actor.episodes.max_observation_tokens)
        )
        rollouts = rollout(
            dataclasses.replace(actor, environment=listening), examples, seeds, keep_latents=keep_latents
        )
        observed = listening.observed
    else:
        rollouts = rollout(actor, examples, seeds, keep_latents=keep_latents)
    size = actor.generation.group_size
    transcripts = []
    for index, trajectory in enumerate(rollouts.trajectories):
        prompt = tuple(actor.environment.messages(examples[index // size]))
        seen = observed[index] if observed is not None else [""]
        if seen and seen[0]:
            prompt = (*prompt, Message(role="user", content=seen[0]))
        transcripts.append(_transcript(actor.tokenizer, trajectory, prompt, seen[1:]))
    return rollouts, transcripts


def _transcript(
    tokenizer: PreTrainedTokenizerBase,
    trajectory: Trajectory,
    prompt: tuple[Message, ...],
    observations: Sequence[str],
) -> Transcript:
    turns = trajectory.turns
    answers = tokenizer.batch_decode([turn.tokens for turn in turns], skip_special_tokens=True)
    return Transcript(
        prompt=prompt,
        answers=tuple(answers),
        # What the last turn was answered with, nobody read.
        observations=tuple(observations[: max(len(turns) - 1, 0)]),
        insertions=tuple(tuple(point - len(turn.context) for point, _ in turn.insertions) for turn in turns),
    )


@final
class _Shortening:
    """Cuts an observation as a rollout does, so that what is written down is what the agent reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit

    def __call__(self, text: str) -> str:
        words = self._tokenizer.encode(text, add_special_tokens=False)
        if len(words) <= self._limit:
            return text
        keep = self._limit
        while keep > 1 and self._length(words[:keep]) > self._limit:
            # Half a character at the cut may need more tokens than it had.
            keep -= 1
        return str(self._tokenizer.decode(words[:keep]))

    def _length(self, words: list[int]) -> int:
        return len(self._tokenizer.encode(str(self._tokenizer.decode(words)), add_special_tokens=False))


@final
class _Listening(InteractiveEnvironment):
    """An environment that writes down what its episodes say. For one rollout.

    Args:
        environment: the task.
        shorten: what becomes of an observation before it is shown and written down.
    """

    def __init__(self, environment: InteractiveEnvironment, shorten: _Shortening) -> None:
        self.name = environment.name
        self.max_turns = environment.max_turns
        self.stop_texts = environment.stop_texts
        self.observed: list[list[str]] = []
        """Of each episode, in the order in which they were made: what it began with and what followed."""
        self._environment = environment
        self._shorten = shorten
        self._place: dict[int, int] = {}
        self._held: list[Episode] = []  # An id means an episode only as long as that is alive.

    @override
    def examples(self, split: Split) -> Sequence[Example]:
        return self._environment.examples(split)

    @override
    def messages(self, example: Example) -> list[Message]:
        return self._environment.messages(example)

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        return self._environment.reward(example, answer)

    @override
    def episode(self) -> Episode:
        episode = self._environment.episode()
        self._place[id(episode)] = len(self.observed)
        self._held.append(episode)
        self.observed.append([])
        return episode

    @override
    def reset_all(self, episodes: Sequence[Episode], examples: Sequence[Example]) -> list[Observation]:
        observations = self._environment.reset_all(episodes, examples)
        for episode, observation in zip(episodes, observations, strict=True):
            self.observed[self._place[id(episode)]] = [observation.text]
        return observations

    @override
    def step_all(self, episodes: Sequence[Episode], actions: Sequence[str]) -> list[Step]:
        steps = []
        for episode, step in zip(episodes, self._environment.step_all(episodes, actions), strict=True):
            if not step.done and step.fault is None:
                step = dataclasses.replace(step, observation=self._shorten(step.observation))
            self.observed[self._place[id(episode)]].append(step.observation)
            steps.append(step)
        return steps
