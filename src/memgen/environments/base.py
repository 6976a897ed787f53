"""What a task is: examples, prompts and a reward. Text in, text out; token ids stay in generation/."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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

    def conversation(self, example: Example) -> list[Message]:
        """The prompt followed by the reference completion: what SFT trains on. Multi-turn tasks override it."""
        return [*self.messages(example), {"role": "assistant", "content": example.target}]
