"""The interface of a task: examples, prompts, a reward, and for interactive tasks episodes. Text in, text out.

Token ids stay in generation/. The reward that training maximises is also the reported metric, unless the configuration
says otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Split = Literal["train", "val", "test"]


class Message(TypedDict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True)
class Example:
    """One item of a task."""

    id: str
    """Unique within its split, the same in every run."""
    question: str
    """The question as it is in the data."""
    target: str
    """The reference completion that SFT learns, without end token."""
    answer: str
    """The reference that the reward compares with."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Anything else the environment needs."""


LARGEST_REWARD = 3.4e38
"""Larger rewards have no float32."""


@dataclass(frozen=True)
class Reward:
    """The score of a completion or an episode."""

    total: float
    """What training maximises and evaluation reports, usually in [0, 1]."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Reward components and counts by name, reported beside the total."""


def checked_reward(reward: object) -> Reward:
    """An environment's reward with its numbers as floats.

    Raises:
        ValueError: if it is no Reward, or its total or a component is no finite (float32) number; the message says what.
    """
    if not isinstance(reward, Reward):
        raise ValueError(f"{reward!r} in place of a Reward")  # noqa: TRY004 - a value of the environment, not of ours
    parts = {str(name): _finite(value, f"component {name}") for name, value in reward.parts.items()}
    return Reward(_finite(reward.total, "total"), parts)


def _finite(value: object, what: str) -> float:
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST_REWARD:
        raise ValueError(f"a {what} of {value!r}")
    return number


class Environment(ABC):
    """A task with one answer per prompt."""

    name: str
    """Identifies the task in metrics and tables."""

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """The items of a split, always in the same order.

        Raises:
            FileNotFoundError: if the split's data cannot be found.
            ValueError: if the data is broken; the message names file and line.
        """

    @abstractmethod
    def messages(self, example: Example) -> list[Message]:
        """The prompt of an item as chat messages."""

    @abstractmethod
    def reward(self, example: Example, answer: str) -> Reward:
        """Scores a completion's text (special tokens removed)."""

    def final_answer(self, example: Example, answer: str) -> str | None:
        """The answer that a completion gives, in a form in which equal answers are equal texts: what a majority vote counts.

        Returns:
            None if it gives none, or the task has no exact answers. Environments whose tasks have them override it.
        """
        return None

    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Scores many completions. Environments whose rewards take time override it to score them in parallel."""
        return [self.reward(example, answer) for example, answer in zip(examples, answers, strict=True)]

    def conversation(self, example: Example) -> list[Message]:
        """The prompt followed by the reference completion, for SFT. Multi-turn tasks override it."""
        return [*self.messages(example), {"role": "assistant", "content": example.target}]

    def conversations(self, examples: Sequence[Example]) -> Iterator[list[Message]]:
        """Conversations of many items, in their order. Environments that play them override it to do so in parallel."""
        return map(self.conversation, examples)


@dataclass(frozen=True)
class Observation:
    """The first observation of an episode."""

    text: str
    """Becomes a user message after `Environment.messages`; empty: no message."""


@dataclass(frozen=True)
class Step:
    """The environment's response to an action."""

    observation: str
    """Becomes the next user message; not shown if the episode is done."""
    done: bool
    """Whether the episode is over."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Reward components and counts of this step by name, for records; `Episode.reward` scores the episode."""
    fault: str | None = None
    """Environment error that ended the episode (a crash, an unreachable server), or None. Such an episode is neither
    trained on nor scored, since the agent did not cause the error."""


class Episode(ABC):
    """One run of an interactive task."""

    @abstractmethod
    def reset(self, example: Example) -> Observation:
        """Starts a new run on an item."""

    @abstractmethod
    def step(self, action: str) -> Step:
        """Takes an action: the text of the agent's turn, special tokens removed."""

    @abstractmethod
    def reward(self) -> Reward:
        """The score of the episode so far; also for an episode truncated before its end."""

    def close(self) -> None:  # noqa: B027 - most episodes hold nothing
        """Releases the episode's resources. It cannot be reset afterwards."""


class InteractiveEnvironment(Environment):
    """A task of several turns, in which the agent's actions and the environment's observations alternate."""

    max_turns: int
    """Turns of the agent after which an episode is truncated."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end a turn of the agent, besides its end-of-turn token."""

    @abstractmethod
    def episode(self) -> Episode:
        """A new episode, to be reset before its first step."""

    def reset_all(self, episodes: Sequence[Episode], examples: Sequence[Example]) -> list[Observation]:
        """Starts many episodes. Environments that wait for processes or servers override it to do so in parallel."""
        return [episode.reset(example) for episode, example in zip(episodes, examples, strict=True)]

    def step_all(self, episodes: Sequence[Episode], actions: Sequence[str]) -> list[Step]:
        """Takes one step in each of many episodes, likewise."""
        return [episode.step(action) for episode, action in zip(episodes, actions, strict=True)]

    def reward(self, example: Example, answer: str) -> Reward:
        """The score of an episode in which `answer` is the only action."""
        episode = self.episode()
        try:
            episode.reset(example)
            episode.step(answer)
            return episode.reward()
        finally:
            episode.close()
