"""Documents on which the lab's reasoner is pretrained.

Solved problems of all tasks, episodes of the text world, and recalls: a few facts said again and again, on which
look-up is learnt first. Prices and homes are sampled anew in every document, so that no world can be learnt here.

In half of the documents notes stand where a weaver may insert latents: at the end of a prompt and after the delimiters
of a solution. A note is a few facts; where a world would tell them, most notes say what is asked, everywhere else they
are irrelevant. So the reasoner learns to read inserted memory and to pass over it. This is a concession to its size:
without notes the same reasoner is hardly steerable by latents at this budget.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from memgen.lab.text_world import MAX_TURNS, House
from memgen.lab.tokenizer import END
from memgen.lab.world import ITEMS, PRICES, ROOMS, Problem, TaskName, random_problem, split_of

DELIMITERS = (",", ".", "\n")

Kind = TaskName | Literal["recall", "text_world"]
"""Kind of a document."""

KINDS: tuple[Kind, ...] = ("recall", "open", "shop", "bill", "text_world", "add", "rev", "walk")


@dataclass(frozen=True)
class DocumentMix:
    """Shares of the kinds of documents, and how notes are written into them."""

    recall: float = 0.12
    """Share of recalls."""
    open: float = 0.19
    """Share of open-book shop problems."""
    shop: float = 0.14
    """Share of closed-book shop problems, with prices of their own in every document."""
    bill: float = 0.12
    """Share of bills, with prices of their own in every document."""
    text_world: float = 0.15
    """Share of episodes of the text world, with homes of their own in every document."""
    add: float = 0.14
    rev: float = 0.05
    walk: float = 0.09
    noted: float = 0.5
    """Share of documents that have notes."""
    note_rate: float = 0.5
    """In a document that has notes: how often a place gets one."""
    relevant: float = 0.7
    """Share of the noted documents about a world whose notes say what is asked."""

    @classmethod
    def of(
        cls, kind: Kind, *, noted: float = 0.5, note_rate: float = 0.5, relevant: float = 0.7
    ) -> DocumentMix:
        """A mixture of one kind alone."""
        shares = {other: float(other == kind) for other in KINDS}
        return cls(**shares, noted=noted, note_rate=note_rate, relevant=relevant)

    def random_kind(self, rng: random.Random) -> Kind:
        """Samples a kind by its share."""
        return rng.choices(KINDS, weights=[getattr(self, kind) for kind in KINDS])[0]


@dataclass(frozen=True)
class Document:
    """A text as tokens, and which of them carry loss: those of an assistant, end tokens included."""

    tokens: tuple[str, ...]
    supervised: tuple[bool, ...]


@dataclass
class _Draft:
    """A document while it is written."""

    tokens: list[str] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)

    def add(self, tokens: list[str], *, supervised: bool = False) -> None:
        self.tokens += tokens
        self.supervised += [supervised] * len(tokens)

    def done(self) -> Document:
        return Document(tuple(self.tokens), tuple(self.supervised))


def random_document(mix: DocumentMix, rng: random.Random) -> Document:
    """Samples a document. Prompts of the val and test splits occur only in tasks about a world, and with other facts."""
    kind = mix.random_kind(rng)
    if kind == "recall":
        return _recall(rng)
    note_rate = mix.note_rate if rng.random() < mix.noted else 0.0
    relevant = rng.random() < mix.relevant
    if kind == "text_world":
        return _episode(note_rate, relevant, rng)
    problem = random_problem(kind, rng)
    while kind not in ("shop", "bill") and split_of(problem.prompt) != "train":
        problem = random_problem(kind, rng)
    return _solved(problem, note_rate, relevant, rng)


def words(text: str) -> list[str]:
    """The tokens of one of the lab's own texts, in which all words stand apart."""
    return [word for word in text.replace("\n", " \n ").split(" ") if word]


def _solved(problem: Problem, note_rate: float, relevant: bool, rng: random.Random) -> Document:
    """A problem and its solution, with notes at some of the places where a weaver may insert."""
    draft = _Draft()
    draft.add(words(problem.prompt))
    written = 0  # commas of the solution so far
    if rng.random() < note_rate:
        draft.add(_note(problem, relevant, written, rng))
    for word in [*words(problem.solution), END]:
        draft.add([word], supervised=True)
        written += word == ","
        if word in DELIMITERS and rng.random() < note_rate:
            draft.add(_note(problem, relevant, written, rng))
    return draft.done()


def _note(problem: Problem, relevant: bool, written: int, rng: random.Random) -> list[str]:
    """One to three prices: of what is asked, in its order (of a bill the coming ones), or of something else."""
    if not relevant or problem.task not in ("shop", "bill"):
        return _irrelevant_note(problem.items, rng)
    prices = [clause.split(" ")[-1] for clause in problem.steps.removesuffix(" .").split(" , ")]
    facts = list(zip(problem.items, prices, strict=True))
    if problem.task == "bill":
        coming = facts[min(written, len(facts) - 1) :]
        return [word for fact in coming[: rng.randint(1, 3)] for word in fact]
    noted = set(rng.sample(problem.items, rng.randint(1, 3)))
    return [word for fact in facts if fact[0] in noted for word in fact]


def _irrelevant_note(items: tuple[str, ...], rng: random.Random) -> list[str]:
    """Prices of items that are not asked."""
    others = [item for item in ITEMS if item not in items]
    return [
        word for item in rng.sample(others, rng.randint(1, 3)) for word in (item, str(rng.choice(PRICES)))
    ]


def _recall(rng: random.Random) -> Document:
    """Three to five prices or homes, said again and again; what follows from an earlier mention carries loss."""
    count = rng.randint(3, 5)
    values = rng.choice(([str(price) for price in PRICES], ROOMS))
    facts = [(item, rng.choice(values)) for item in rng.sample(ITEMS, count)]
    draft = _Draft()
    seen: set[int] = set()
    for index in [*range(count), *rng.choices(range(count), k=14)]:
        item, value = facts[index]
        draft.add([item])
        draft.add([value], supervised=index in seen)
        seen.add(index)
    return draft.done()


def _episode(note_rate: float, relevant: bool, rng: random.Random) -> Document:
    """An episode of an agent that goes where it knows a thing to be, from notes or from sight, and searches else."""
    homes = dict(zip(ITEMS, [*ROOMS, *rng.sample(ROOMS, len(ITEMS) - len(ROOMS))], strict=True))
    shuffled = list(homes.values())
    rng.shuffle(shuffled)
    homes = dict(zip(ITEMS, shuffled, strict=True))
    thing, goal = rng.sample(ITEMS, 2)
    while homes[thing] == homes[goal]:
        thing, goal = rng.sample(ITEMS, 2)
    house = House(homes, thing, goal, rng.choice(ROOMS))
    draft = _Draft()
    known: dict[str, str] = {}
    unseen = set(ROOMS)
    draft.add(words(house.task))
    for _ in range(MAX_TURNS):
        unseen.discard(house.here)
        known |= {item: room for item, room in homes.items() if room == house.here}
        if rng.random() < note_rate:
            if relevant:
                noted = rng.choice(((thing,), (goal,), (thing, goal)))
                known |= {item: homes[item] for item in noted}
                draft.add([word for item in noted for word in (item, homes[item])])
            else:
                draft.add(_irrelevant_note((thing, goal), rng))
        action = house.best_action(known) or f"go {rng.choice(sorted(unseen))}"
        draft.add([*words(action), END], supervised=True)
        seen = house.act(action)
        assert seen is not None, "the agent does what is possible"
        if house.solved:
            break
        draft.add(words(seen))
    return draft.done()
