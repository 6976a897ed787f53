"""What KodCode and BigCodeBench share: one published set to split, and answers that run in a sandbox."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from typing_extensions import override

from memgen.environments.base import Example, Reward
from memgen.environments.code.answers import score
from memgen.environments.code.execution import Executor, Program
from memgen.environments.questions import QuestionEnvironment, Questions


class CodeEnvironment(QuestionEnvironment, ABC):
    """A benchmark of Python tasks; reward 1 if all of an item's tests pass in the sandbox, else 0."""

    def __init__(self, questions: Questions, executor: Executor) -> None:
        """Runs nothing yet.

        Args:
            questions: the items.
            executor: runs the answers.
        """
        super().__init__(questions)
        self._executor = executor

    @abstractmethod
    def program(self, example: Example, answer: str) -> Program | None:
        """The answer's code with the item's tests; None if the answer holds no code."""

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the answer's code passes all tests, else 0."""
        return self.rewards([example], [answer])[0]

    @override
    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Runs many, `reward_workers` at a time."""
        return score(self._executor, [self.program(e, a) for e, a in zip(examples, answers, strict=True)])
