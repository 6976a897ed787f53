"""The lab's tasks as an environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import final, get_args

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


@final
class Lab(Environment):
    """Generated problems over a world of fixed prices.

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
        known = get_args(TaskName)
        unknown = [task for task in tasks if task not in known]
        if unknown or not tasks:
            raise ValueError(f"tasks must be some of {', '.join(known)}, got {list(tasks)}")
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{split}_size must be at least 1, got {size}")
        self.tasks = tuple(tasks)
        self.world = World(world_seed)
        self.name = "lab_" + "_".join(dict.fromkeys(self.tasks))

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of a split: the tasks take turns, so that any beginning of it has the tasks' shares.

        Raises:
            ValueError: if a task has fewer problems in the split than its share asks for.
        """
        size = self.sizes[split]
        turns = [self.tasks[index % len(self.tasks)] for index in range(size)]
        supply = {task: iter(self._problems(task, split, count)) for task, count in Counter(turns).items()}
        return [_example(next(supply[task]), f"{split}-{index}") for index, task in enumerate(turns)]

    def _problems(self, task: str, split: Split, count: int) -> Sequence[Problem]:
        match task:
            case "shop":
                problems = shop_problems(self.world, split)
            case "bill":
                return bill_problems(self.world, split, count)
            case _:
                return _sampled(task, split, count)
        if count > len(problems):
            raise ValueError(
                f"{split}_size asks for {count} {task} problems, but the split has {len(problems)}; "
                f"set {split}_size lower"
            )
        return problems[:count]

    def messages(self, example: Example) -> list[Message]:
        """The problem as the user's one message."""
        return [{"role": "user", "content": example.question}]

    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the steps (the price list) and the answer after "#" are both exactly right, else 0.

        Parts: `answer` (what follows "#"), `prices` (the list before it; `steps` in tasks without prices) and `exact`;
        in a mixture of tasks also `TASK/exact`, so each task has its own curve.
        """
        steps, mark, result = answer.strip().partition("#")
        right_answer = bool(mark) and _words(result.strip()) == _words(example.answer)
        right_steps = _words(steps) == _words(str(example.meta["steps"]) + "\n")
        exact = float(right_answer and right_steps)
        task = str(example.meta["task"])
        steps_name = "prices" if task in ("shop", "bill", "open") else "steps"
        parts = {"answer": float(right_answer), steps_name: float(right_steps), "exact": exact}
        if len(set(self.tasks)) > 1:
            parts[f"{task}/exact"] = exact
        return Reward(total=exact, parts=parts)

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


@cache
def _sampled(task: TaskName, split: Split, count: int) -> Sequence[Problem]:
    return tuple(sample_problems(task, split, count))


def _words(text: str) -> list[str]:
    """The words of a text, newlines included."""
    return text.replace("\n", " \n ").split(" ")


def _example(problem: Problem, identifier: str) -> Example:
    return Example(
        id=identifier,
        question=problem.prompt,
        target=problem.solution,
        answer=problem.answer,
        meta={"task": problem.task, "steps": problem.steps, "items": problem.items},
    )
