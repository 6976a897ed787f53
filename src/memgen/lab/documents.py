"""The text on which the lab's reasoner is pretrained.

Solved problems of all tasks. Closed-book shop problems have prices of their own in every document, so that no world can
be learnt here. In half of the documents notes stand where a weaver may insert latents: at the end of the prompt and
after the delimiters of the solution. A note is a few "item price" pairs; in most closed-book problems it says what is
asked, everywhere else it is irrelevant. So the reasoner learns to read inserted memory and to pass over it. This is a
concession to its size: without notes the same reasoner is hardly steerable by latents at this budget.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from memgen.lab.tokenizer import END
from memgen.lab.world import ITEMS, PRICES, Problem, Task, draw_problem, split_of

DELIMITERS = (",", ".", "\n")


@dataclass(frozen=True)
class DocumentMix:
    """What pretraining documents are made of."""

    look: float = 0.18
    """Share of open-book problems whose solution names each item before its price: the easiest way to learn to look up."""
    open: float = 0.26
    """Share of open-book shop problems."""
    shop: float = 0.22
    """Share of closed-book shop problems, with prices of their own in every document."""
    add: float = 0.12
    rev: float = 0.06
    walk: float = 0.16
    noted: float = 0.5
    """Share of documents that have notes."""
    note_rate: float = 0.5
    """In a document that has notes: how often a place gets one."""
    relevant: float = 0.7
    """Share of the noted closed-book problems whose notes say the prices that are asked."""

    def draw_task(self, rng: random.Random) -> Task | Literal["look"]:
        """Draws a task by its share."""
        tasks: tuple[Task | Literal["look"], ...] = ("look", "open", "shop", "add", "rev", "walk")
        return rng.choices(tasks, weights=[getattr(self, task) for task in tasks])[0]


@dataclass(frozen=True)
class Document:
    """A text as tokens, and which of them carry loss: those of the solution and the end token."""

    tokens: tuple[str, ...]
    supervised: tuple[bool, ...]


def draw_document(mix: DocumentMix, rng: random.Random) -> Document:
    """Draws a document. Prompts of the val and test splits never occur, but for those of `shop`, whose prices are drawn."""
    task = mix.draw_task(rng)
    problem = draw_problem(task, rng)
    while task != "shop" and split_of(problem.prompt) != "train":
        problem = draw_problem(task, rng)
    noted = rng.random() < mix.noted
    relevant = task == "shop" and rng.random() < mix.relevant

    tokens = words(problem.prompt)
    supervised = [False] * len(tokens)
    if noted and rng.random() < mix.note_rate:
        note = _note(problem, relevant, rng)
        tokens += note
        supervised += [False] * len(note)
    for word in [*words(problem.solution), END]:
        tokens.append(word)
        supervised.append(True)
        if noted and word in DELIMITERS and rng.random() < mix.note_rate:
            note = _note(problem, relevant, rng)
            tokens += note
            supervised += [False] * len(note)
    return Document(tuple(tokens), tuple(supervised))


def words(text: str) -> list[str]:
    """The tokens of one of the lab's own texts, in which all words stand apart."""
    return [word for word in text.replace("\n", " \n ").split(" ") if word]


def _note(problem: Problem, relevant: bool, rng: random.Random) -> list[str]:
    """One to three "item price" pairs: of items that are asked, in their order, or of others at any price."""
    pairs = rng.randint(1, 3)
    if not relevant:
        others = [item for item in ITEMS if item not in problem.items]
        return [word for item in rng.sample(others, pairs) for word in (item, str(rng.choice(PRICES)))]
    prices = dict(zip(problem.items, problem.steps.removesuffix(" .").split(" , "), strict=True))
    noted = set(rng.sample(problem.items, pairs))
    return [word for item in problem.items if item in noted for word in (item, prices[item])]
