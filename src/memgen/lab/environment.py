"""The lab's tasks as an environment."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import final, get_args

from typing_extensions import override

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.lab.world import Problem, TaskName, World, bill_problems, sample_problems, shop_problems


@dataclass(frozen=True)
class ConstantAnswer:
    """The best score of an answer that does not depend on the prompt."""

    completion: str
    """The full completion (steps and answer) that is right most often."""
    total: float
    """Its share of right completions: what `Reward.total` measures."""
    answer: str
    """The answer after "#" that is right most often, whatever the steps."""
    answer_accuracy: float
    """Its share of right answers."""


class LabEnvironment(Environment, ABC):
    """Generated items of some of the lab's tasks. A leaf has the tasks' words and scores the answers.

    Args:
        tasks: names of tasks. A name that occurs n times gets n shares of every split.
        known: the names that there are.
        world_seed: decides the prices of the closed-book tasks.
        train_size: examples to train on.
        val_size: examples to choose settings on.
        test_size: examples to report.

    Raises:
        ValueError: if a task is unknown, none is given, or a size is below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        known: Sequence[str],
        world_seed: int,
        train_size: int,
        val_size: int,
        test_size: int,
    ) -> None:
        unknown = [task for task in tasks if task not in known]
        if unknown or not tasks:
            raise ValueError(f"tasks must be some of {', '.join(known)}, got {list(tasks)}")
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{split}_size must be at least 1, got {size}")
        self.tasks = tuple(tasks)
        self.world = World(world_seed)

    @abstractmethod
    def of_task(self, task: str, split: Split, count: int) -> Sequence[Example]:
        """The first examples of a task; their ids are given by `examples`.

        Raises:
            ValueError: if the split has fewer.
        """

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of a split: the tasks take turns, so that any beginning of it has the tasks' shares.

        Raises:
            ValueError: if a task has fewer problems in the split than its share asks for.
        """
        size = self.sizes[split]
        turns = [self.tasks[index % len(self.tasks)] for index in range(size)]
        supply = {task: iter(self.of_task(task, split, count)) for task, count in Counter(turns).items()}
        return [
            dataclasses.replace(next(supply[task]), id=f"{split}-{index}") for index, task in enumerate(turns)
        ]

    def messages(self, example: Example) -> list[Message]:
        """The problem as the user's one message."""
        return [{"role": "user", "content": example.question}]

    @override
    def final_answer(self, example: Example, answer: str) -> str | None:
        """The words of the whole answer: its steps count too."""
        return " ".join(answer.split()) or None

    def scored(self, example: Example, parts: dict[str, float]) -> Reward:
        """A reward whose total is the part `exact`, which in a mixture of tasks is also reported as `TASK/exact`."""
        if len(set(self.tasks)) > 1:
            parts = {**parts, f"{example.meta['task']}/exact": parts["exact"]}
        return Reward(total=parts["exact"], parts=parts)

    def constant_answer_baseline(self, split: Split) -> ConstantAnswer:
        """The best constant completion and the best constant answer, chosen on the split itself."""
        examples = self.examples(split)
        completion, completions = Counter(example.target for example in examples).most_common(1)[0]
        answer, answers = Counter(example.answer for example in examples).most_common(1)[0]
        return ConstantAnswer(
            completion=completion,
            total=completions / len(examples),
            answer=answer,
            answer_accuracy=answers / len(examples),
        )


@final
class Lab(LabEnvironment):
    """Generated problems over a world of fixed prices, in the lab's own words.

    Args:
        tasks: names of tasks. A name that occurs n times gets n shares of every split.
        world_seed: decides the prices of `shop` and `bill`.
        train_size: examples to train on.
        val_size: examples to choose settings on.
        test_size: examples to report.

    Raises:
        ValueError: if a task is unknown, none is given, or a size is below 1.
    """

    def __init__(
        self,
        tasks: tuple[str, ...] = ("shop",),
        world_seed: int = 0,
        train_size: int = 2048,
        val_size: int = 240,
        test_size: int = 600,
    ) -> None:
        super().__init__(tasks, get_args(TaskName), world_seed, train_size, val_size, test_size)
        self.name = "lab_" + "_".join(dict.fromkeys(self.tasks))

    @override
    def of_task(self, task: str, split: Split, count: int) -> Sequence[Example]:
        match task:
            case "shop":
                problems: Sequence[Problem] = first_shops(self.world, split, count)
            case "bill":
                problems = bill_problems(self.world, split, count)
            case _:
                problems = _sampled(task, split, count)
        return [_example(problem) for problem in problems]

    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the steps (the price list) and the answer after "#" are both exactly right, else 0.

        Parts: `answer` (what follows "#"), `prices` (the list before it; `steps` in tasks without prices) and `exact`;
        in a mixture of tasks also `TASK/exact`, so each task has its own curve.
        """
        steps, mark, result = answer.strip().partition("#")
        right_answer = bool(mark) and _words(result.strip()) == _words(example.answer)
        right_steps = _words(steps) == _words(str(example.meta["steps"]) + "\n")
        steps_name = "prices" if example.meta["task"] in ("shop", "bill", "open") else "steps"
        parts = {
            "answer": float(right_answer),
            steps_name: float(right_steps),
            "exact": float(right_answer and right_steps),
        }
        return self.scored(example, parts)


def first_shops(world: World, split: Split, count: int) -> list[Problem]:
    """The first closed-book shop problems of a split.

    Raises:
        ValueError: if it has fewer.
    """
    problems = shop_problems(world, split)
    if count > len(problems):
        raise ValueError(
            f"{split}_size asks for {count} shop problems, but the split has {len(problems)}; set {split}_size lower"
        )
    return problems[:count]


@cache
def _sampled(task: TaskName, split: Split, count: int) -> Sequence[Problem]:
    return tuple(sample_problems(task, split, count))


def _words(text: str) -> list[str]:
    """The words of a text, newlines included."""
    return text.replace("\n", " \n ").split(" ")


def _example(problem: Problem) -> Example:
    return Example(
        id="",
        question=problem.prompt,
        target=problem.solution,
        answer=problem.answer,
        meta={"task": problem.task, "steps": problem.steps, "items": problem.items},
    )
