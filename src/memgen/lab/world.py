"""The lab's tasks: a shop and its bills, whose prices are learnt from experience only, and four skills that need no memory.

`shop` is closed book: the prices of 16 items are fixed by a world seed and stand in no prompt and in no pretraining
text, so a model can answer only after learning them from solved problems. `bill` is closed book too and asks for the
prices of six items one after another: more facts than a few latents carry at once, so latents at the end of the prompt
do not suffice and each item needs new ones. `open` is `shop` with the prices written in the prompt (sampled per problem,
so they contradict the world); `add`, `rev` and `walk` have nothing to do with a world.

Shop problems are split by their unordered triple of items, and bills by their unordered items: every item's price occurs
in training, the combinations of the other splits do not. The other tasks are split by their prompt.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Literal, get_args

from memgen.environments.base import Split

TaskName = Literal["shop", "bill", "open", "add", "rev", "walk"]

ITEMS = (
    "fig", "nut", "tea", "oat", "ham", "egg", "jam", "pie",
    "rye", "bun", "cod", "leek", "corn", "plum", "rice", "salt",
)  # fmt: skip
PRICES = (1, 2, 3, 4, 5)
PLACES = (
    "hall", "yard", "den", "loft", "shed", "barn", "cave", "dock",
    "farm", "fort", "gate", "hill", "inn", "lake", "mill", "park",
)  # fmt: skip
BILL_ITEMS = 6
"""Items of a bill."""
RANDOM_BILL_ITEMS = (3, 8)
"""Fewest and most items of a bill in a pretraining document."""
ROOMS = PLACES[:10]
"""Places of the text world."""

TEST_PERCENT = 27
VAL_PERCENT = 10

MAX_ATTEMPTS = 20_000
"""Samples in a row without a new problem, after which a task counts as exhausted."""


@dataclass(frozen=True)
class Problem:
    r"""A prompt and its worked solution.

    Attributes:
        task: name of the task.
        prompt: ends in a newline, e.g. "shop : fig , nut , tea .\n".
        steps: the working before the answer, e.g. "4 , 1 , 5 .".
        answer: what follows "#", digits apart, e.g. "1 0".
        items: the items it is about, in the order in which they are asked.
    """

    task: TaskName
    prompt: str
    steps: str
    answer: str
    items: tuple[str, ...] = ()

    @property
    def solution(self) -> str:
        """Steps and answer as a model writes them, without end token."""
        return f"{self.steps}\n# {self.answer}"


@dataclass(frozen=True)
class World:
    """Prices, and the rooms in which things are kept: facts that no prompt tells."""

    seed: int = 0
    """Decides all of it; the split into train, val and test does not depend on it."""

    def prices(self) -> dict[str, int]:
        """The price of each item, dealt as evenly as may be (one price four times, the others three times)."""
        rng = random.Random(f"world {self.seed}")
        extra = rng.sample(PRICES, len(ITEMS) % len(PRICES))
        dealt = [*PRICES * (len(ITEMS) // len(PRICES)), *extra]
        rng.shuffle(dealt)
        return dict(zip(ITEMS, dealt, strict=True))

    def homes(self) -> dict[str, str]:
        """The room in which each item is kept: one or two items in each room."""
        rng = random.Random(f"homes {self.seed}")
        rooms = [*ROOMS, *rng.sample(ROOMS, len(ITEMS) - len(ROOMS))]
        rng.shuffle(rooms)
        return dict(zip(ITEMS, rooms, strict=True))


def digits(number: int) -> str:
    """A number as the lab writes it: one token for each digit."""
    return " ".join(str(number))


def split_of(key: str) -> Split:
    """The split that a triple of items or a prompt belongs to, by its checksum: the same in every run and every world."""
    bucket = zlib.crc32(key.encode()) % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "val" if bucket < TEST_PERCENT + VAL_PERCENT else "train"


def shop_triples(split: Split) -> list[tuple[str, ...]]:
    """The unordered item triples of a split; each triple is in exactly one split."""
    return [triple for triple in combinations(ITEMS, 3) if split_of(" ".join(sorted(triple))) == split]


def shop_problems(world: World, split: Split) -> list[Problem]:
    """Every closed-book problem of a split (each triple in its six orders), shuffled the same way in every run."""
    prices = world.prices()
    problems = [
        shop_problem(items, [prices[item] for item in items])
        for triple in shop_triples(split)
        for items in permutations(triple)
    ]
    random.Random(f"shop {split}").shuffle(problems)
    return problems


def shop_problem(items: Sequence[str], prices: Sequence[int]) -> Problem:
    """Asks for the prices of three items, without saying them, and for their sum."""
    return Problem(
        task="shop",
        prompt=f"shop : {' , '.join(items)} .\n",
        steps=f"{' , '.join(str(price) for price in prices)} .",
        answer=digits(sum(prices)),
        items=tuple(items),
    )


def bill_problems(world: World, split: Split, count: int, length: int = BILL_ITEMS) -> list[Problem]:
    """Different bills of a split, the same ones in every run; a longer list begins with the shorter.

    Args:
        world: has the prices.
        split: which bills.
        count: how many.
        length: items of a bill.

    Raises:
        ValueError: if the split has not as many.
    """
    prices = world.prices()
    rng = random.Random(f"bill {split}")
    found: dict[tuple[str, ...], Problem] = {}
    attempts = 0  # since the last one that was found
    while len(found) < count:
        items = tuple(rng.sample(ITEMS, length))
        if split_of(" ".join(sorted(items))) != split or items in found:
            attempts += 1
            if attempts > MAX_ATTEMPTS:
                raise ValueError(
                    f"there are fewer than {count} different bills of {length} items in the {split} split "
                    f"({len(found)} found); ask for fewer"
                )
            continue
        found[items] = bill_problem(items, [prices[item] for item in items])
        attempts = 0
    return list(found.values())


def bill_problem(items: Sequence[str], prices: Sequence[int]) -> Problem:
    """Asks for the prices of some items, without saying them.

    The solution names each item before its price; the answer is the last price.
    """
    lines = [f"{item} {price}" for item, price in zip(items, prices, strict=True)]
    return Problem(
        task="bill",
        prompt=f"bill : {' , '.join(items)} .\n",
        steps=f"{' , '.join(lines)} .",
        answer=str(prices[-1]),
        items=tuple(items),
    )


def sample_problems(task: TaskName, split: Split, count: int) -> list[Problem]:
    """Different problems of a task without a world, the same ones in every run; a longer list begins with the shorter.

    Raises:
        ValueError: if the task is `shop` or `bill` (their problems depend on a world) or has not as many.
    """
    if task in ("shop", "bill"):
        raise ValueError(f"the problems of {task!r} depend on a world; use {task}_problems(world, ...)")
    rng = random.Random(f"{task} {split}")
    found: dict[str, Problem] = {}
    attempts = 0  # since the last one that was found
    while len(found) < count:
        problem = random_problem(task, rng)
        if split_of(problem.prompt) != split or problem.prompt in found:
            attempts += 1
            if attempts > MAX_ATTEMPTS:
                raise ValueError(
                    f"task {task!r} has fewer than {count} different problems in its {split} split "
                    f"({len(found)} found); ask for fewer"
                )
            continue
        found[problem.prompt] = problem
        attempts = 0
    return list(found.values())


def random_problem(task: TaskName, rng: random.Random) -> Problem:
    """Samples a problem; shops and bills get prices of their own, unrelated to any world."""
    match task:
        case "shop":
            return shop_problem(rng.sample(ITEMS, 3), rng.choices(PRICES, k=3))
        case "open":
            return _open(rng)
        case "bill":
            count = rng.randint(*RANDOM_BILL_ITEMS)
            return bill_problem(rng.sample(ITEMS, count), rng.choices(PRICES, k=count))
        case "add":
            return _add(rng)
        case "rev":
            return _rev(rng)
        case "walk":
            return _walk(rng)
    raise ValueError(f"unknown task {task!r}; there are {', '.join(get_args(TaskName))}")


def _price_list(rng: random.Random) -> tuple[dict[str, int], str]:
    items = rng.sample(ITEMS, rng.randint(3, 4))
    prices = {item: rng.choice(PRICES) for item in items}
    return prices, f"list : {' , '.join(f'{item} {price}' for item, price in prices.items())} .\n"


def _open(rng: random.Random) -> Problem:
    prices, text = _price_list(rng)
    asked = rng.sample(list(prices), 3)
    closed = shop_problem(asked, [prices[item] for item in asked])
    return Problem("open", text + closed.prompt, closed.steps, closed.answer, tuple(prices))


def _add(rng: random.Random) -> Problem:
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(3, 4))]
    sums = [sum(numbers[: count + 1]) for count in range(1, len(numbers))]
    return Problem(
        task="add",
        prompt=f"add : {' , '.join(str(number) for number in numbers)} .\n",
        steps=f"{' , '.join(digits(value) for value in sums)} .",
        answer=digits(sums[-1]),
    )


def _rev(rng: random.Random) -> Problem:
    numbers = [str(rng.randint(0, 9)) for _ in range(rng.randint(3, 4))]
    backwards = numbers[::-1]
    return Problem(
        task="rev",
        prompt=f"rev : {' , '.join(numbers)} .\n",
        steps=f"{' , '.join(backwards)} .",
        answer=" ".join(backwards),
    )


def _walk(rng: random.Random) -> Problem:
    """A position from 0 to 9 and two to four moves that never leave that range."""
    start = position = rng.randint(0, 9)
    moves: list[str] = []
    visited: list[int] = []
    for _ in range(rng.randint(2, 4)):
        step = rng.choice([step for step in (-3, -2, -1, 1, 2, 3) if 0 <= position + step <= 9])
        position += step
        moves.append(f"{'up' if step > 0 else 'down'} {abs(step)}")
        visited.append(position)
    return Problem(
        task="walk",
        prompt=f"walk : {start} , {' , '.join(moves)} .\n",
        steps=f"{' , '.join(str(place) for place in visited)} .",
        answer=str(position),
    )
