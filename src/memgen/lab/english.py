"""The lab's shop and bill in plain English, for a real model with a subword tokenizer, and two tasks that need no memory.

Prices, items and splits are those of `memgen.lab.world`. `shop` and `bill` are closed book: their prices stand in no
prompt. `open` is `shop` with the prices in the prompt and `copy` repeats a list of prices; both contradict the world in
every price, so memory can only harm there.

The forms were chosen by what SmolLM2-135M-Instruct can do without memory (greedy, bfloat16): given the prices, it
adds them right in 57 of 60 sums written "4 + 1 = 5, 5 + 5 = 10" and in 8 of 60 written "4 + 1 + 5 = 10"; without a worked
example in front it answers no `open` and no `copy` in the form asked for, with them 9 and 13 of 16.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal, final, get_args

from typing_extensions import override

from memgen.environments.base import Example, Message, Reward, Split
from memgen.lab.environment import LabEnvironment, first_shops
from memgen.lab.world import BILL_ITEMS, ITEMS, PRICES, bill_problems, shop_problems

EnglishTask = Literal["shop", "bill", "open", "copy"]

PLURALS = {"oat": "oats"}
COUNTABLE = ("fig", "nut", "egg", "pie", "bun", "leek", "plum")
"""Items with an article."""
WORKED = {"open": 3, "copy": 1}
"""Worked examples before the question, as earlier turns, in the tasks without need of memory."""

_SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")


@final
class EnglishLab(LabEnvironment):
    """Generated problems over the lab's world of fixed prices, in plain English.

    Answers must be right to the letter, except for white space around them and one full stop at the end. Learning from
    reference answers, `open` and `copy` supervise their worked examples too.

    Args:
        tasks: names of tasks (shop, bill, open, copy). A name that occurs n times gets n shares of every split.
        world_seed: decides the prices of `shop` and `bill`.
        train_size: examples to train on.
        val_size: examples to choose settings on.
        test_size: examples to report.
        bill_items: items of a bill, from 2 to 14.

    Raises:
        ValueError: if a task is unknown, none is given, or a number is out of its range.
    """

    def __init__(
        self,
        tasks: tuple[str, ...] = ("shop",),
        world_seed: int = 0,
        train_size: int = 2048,
        val_size: int = 240,
        test_size: int = 600,
        bill_items: int = BILL_ITEMS,
    ) -> None:
        super().__init__(tasks, get_args(EnglishTask), world_seed, train_size, val_size, test_size)
        # With more, a split could be without any bill.
        if not 2 <= bill_items <= len(ITEMS) - 2:
            raise ValueError(f"bill_items must be in 2 to {len(ITEMS) - 2}, got {bill_items}")
        self.bill_items = bill_items
        self.name = "lab_english_" + "_".join(dict.fromkeys(self.tasks))
        self._worked = {task: self._worked_examples(task, count) for task, count in WORKED.items()}

    @override
    def of_task(self, task: str, split: Split, count: int) -> Sequence[Example]:
        if task == "bill":
            lists = [p.items for p in bill_problems(self.world, split, count, self.bill_items)]
        else:
            lists = [problem.items for problem in first_shops(self.world, split, count)]
        rng = random.Random(f"english {task} {split}")
        return [self._example(task, items, rng) for items in lists]

    def _worked_examples(self, task: str, count: int) -> list[Message]:
        rng = random.Random(f"english {task} worked")
        messages: list[Message] = []
        for problem in shop_problems(self.world, "train")[
            -count:
        ]:  # the last ones, which few trainings reach
            example = self._example(task, problem.items, rng)
            messages.append({"role": "user", "content": example.question})
            messages.append({"role": "assistant", "content": example.target})
        return messages

    def _example(self, task: str, items: Sequence[str], rng: random.Random) -> Example:
        world = self.world.prices()
        if task in ("shop", "bill"):
            prices = [world[item] for item in items]
        else:
            prices = [rng.choice([price for price in PRICES if price != world[item]]) for item in items]
        asked = _enumerated([_with_article(item) for item in items])
        listed = ", ".join(f"{_noun(item)} {price}" for item, price in zip(items, prices, strict=True))
        match task:
            case "shop":
                question, target = f"What do {asked} cost?", _added(prices)
            case "open":
                question, target = f"{_told(items, prices)} What do {asked} cost?", _added(prices)
            case "bill":
                question, target = f"Write the bill for {asked}.", listed
            case _:
                question, target = f"Repeat this: {listed}", listed
        return Example(
            id="",
            question=question,
            target=target,
            answer=target.rpartition(" ")[2],
            meta={"task": task, "items": tuple(items)},
        )

    @override
    def messages(self, example: Example) -> list[Message]:
        """The question, in `open` and `copy` behind worked examples of the training split."""
        worked = self._worked.get(str(example.meta["task"]), [])
        return [*worked, {"role": "user", "content": example.question}]

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the answer is the reference answer, else 0.

        Parts: `prices` (the list of prices alone: the first summand of a sum and the second of each, or the numbers of a
        bill), `answer` (the number behind the last "=", or the bill's last price) and `exact`; in a mixture of tasks also
        `TASK/exact`.
        """
        task = str(example.meta["task"])
        written = answer.strip().removesuffix(".").rstrip()
        mark = "= " if task in ("shop", "open") else " "
        parts = {
            "answer": float(mark in written and written.rpartition(mark)[2] == example.answer),
            "prices": float(_price_list(task, written) == _price_list(task, example.target)),
            "exact": float(written == example.target),
        }
        return self.scored(example, parts)


def _noun(item: str) -> str:
    return PLURALS.get(item, item)


def _with_article(item: str) -> str:
    if item not in COUNTABLE:
        return _noun(item)
    return f"an {item}" if item[0] in "aeiou" else f"a {item}"


def _enumerated(words: Sequence[str]) -> str:
    """E.g. "a fig, a nut and tea"."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _told(items: Sequence[str], prices: Sequence[int]) -> str:
    """The prices in a sentence, e.g. "A fig costs 4, a nut 1 and tea 5."."""
    others = [f"{_with_article(item)} {price}" for item, price in zip(items[1:], prices[1:], strict=True)]
    sentence = _enumerated([f"{_with_article(items[0])} costs {prices[0]}", *others])
    return f"{sentence[0].upper()}{sentence[1:]}."


def _added(prices: Sequence[int]) -> str:
    """The prices added one after another, e.g. "4 + 1 = 5, 5 + 5 = 10"."""
    sums = [sum(prices[:count]) for count in range(1, len(prices) + 1)]
    return ", ".join(
        f"{before} + {price} = {after}"
        for before, price, after in zip(sums, prices[1:], sums[1:], strict=False)
    )


def _price_list(task: str, text: str) -> list[str]:
    """The prices that an answer writes, without anything else; none if it is not in the task's form."""
    if task not in ("shop", "open"):
        return [line.rpartition(" ")[2] for line in text.split(", ")]
    sums = [match for part in text.split(", ") if (match := _SUM.fullmatch(part))]
    if len(sums) != text.count(", ") + 1:
        return []
    return [sums[0][1], *(part[2] for part in sums)]
