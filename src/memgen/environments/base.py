"""What a task is: examples, prompts, a reward, and for interactive tasks episodes. Text in, text out.

Token ids stay in generation/. The reward that trains is the metric that is reported, unless configuration says
otherwise.
"""

from __future__ import annotations

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
    """One item of a task.

    Attributes:
        id: unique within its split, stable between runs.
        question: what is asked, as the data has it.
        target: the reference completion that SFT learns (without end token).
        answer: what the reward compares with.
        meta: anything else the environment needs.
    """

    id: str
    question: str
    target: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """Named parts and their total.

    Attributes:
        total: what training maximises and evaluation reports, usually in [0, 1].
        parts: what it is made of, by name.
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Environment(ABC):
    """A task with one answer per prompt. `name` says which, in metrics and tables."""

    name: str

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """The items of a split, always in the same order.

        Raises:
            FileNotFoundError: if the split's data is absent.
            ValueError: if the data is broken; the message names file and line.
        """

    @abstractmethod
    def messages(self, example: Example) -> list[Message]:
        """The prompt of an item as chat messages."""

    @abstractmethod
    def reward(self, example: Example, answer: str) -> Reward:
        """Scores a completion's text (special tokens removed)."""

    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Scores many completions. Environments whose rewards take time override it to score side by side."""
        return [self.reward(example, answer) for example, answer in zip(examples, answers, strict=True)]

    def conversation(self, example: Example) -> list[Message]:
        """The prompt followed by the reference completion: what SFT trains on. Multi-turn tasks override it."""
        return [*self.messages(example), {"role": "assistant", "content": example.target}]

    def conversations(self, examples: Sequence[Example]) -> Iterator[list[Message]]:
        """Conversations of many items, in their order. Environments that play them override it to do so in parallel."""
        return map(self.conversation, examples)


@dataclass(frozen=True)
class Observation:
    """What an episode begins with.

    Attributes:
        text: becomes a user message behind `Environment.messages`; empty if those say everything.
    """

    text: str


@dataclass(frozen=True)
class Step:
    """The environment's answer to an action.

    Attributes:
        observation: becomes the next user message; not shown if the episode is done.
        done: whether the episode is over.
        parts: what this step earned or counted, by name (for records; `Episode.reward` scores the episode).
        fault: why the environment itself failed (a crash, a server that is gone), or None. Such an episode is over;
            it is neither trained on nor scored, since what went wrong is not the agent's doing.
    """

    observation: str
    done: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None


class Episode(ABC):
    """One run of an interactive task."""

    @abstractmethod
    def reset(self, example: Example) -> Observation:
        """Begins anew with an item."""

    @abstractmethod
    def step(self, action: str) -> Step:
        """Acts. `action` is the text of the agent's turn, special tokens removed."""

    @abstractmethod
    def reward(self) -> Reward:
        """The score of the episode as it stands, also where it was cut before its end."""

    def close(self) -> None:  # noqa: B027 - most episodes hold nothing
        """Frees what the episode holds. It can be reset no more."""


class InteractiveEnvironment(Environment):
    """A task of several turns: the agent's text, the environment's observation, and so on."""

    max_turns: int
    """Turns of the agent after which an episode is cut."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end a turn of the agent where they appear, besides its end-of-turn token."""

    @abstractmethod
    def episode(self) -> Episode:
        """A new episode, to be reset before its first step."""

    def reset_all(self, episodes: Sequence[Episode], examples: Sequence[Example]) -> list[Observation]:
        """Begins many episodes. Environments that wait for processes or servers override it to do so side by side."""
        return [episode.reset(example) for episode, example in zip(episodes, examples, strict=True)]

    def step_all(self, episodes: Sequence[Episode], actions: Sequence[str]) -> list[Step]:
        """One step of many episodes, likewise."""
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
