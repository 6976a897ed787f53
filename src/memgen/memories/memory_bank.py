"""MemoryBank: a store that forgets, with summaries per day (arXiv 2305.10250).

    WRITE  append (query, response), stability S = 1, last recalled now
           a day is over: the scribe summarises it and what it shows of the user or task giver, then everything (4 calls);
           an item whose retention R = exp(-t / S) has fallen below its luck is forgotten, t in days since its last recall
    READ   the overall summary, then the k nearest items by date; each recalled: S + 1, t = 0

A day is a number of writes, since nothing here depends on the time of day. Differs from the released code
(zhongwanjun/MemoryBank-SiliconFriend): (1) its retention is exp(-t S / 5), so that a stronger memory is forgotten faster;
(2) it draws anew each time it looks, so that what is kept depends on how often it does. Here each item draws once between
two recalls, by the seed, and is kept with probability R(t) at every t. Without a scribe a summary is the day's first and last
line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience
from memgen.memories.scribe import some_text
from memgen.memories.store import Item
from memgen.seeds import seed_of


@dataclass(frozen=True)
class MemoryBankSettings:
    """Constants of MemoryBank."""

    k: int = 2
    """Items that are read."""
    day: int = 10
    """Writes in a day."""
    forget: bool = True
    """Whether items are forgotten."""
    summary_tokens: int = 400
    """Limit of a summary."""

    def __post_init__(self) -> None:
        for name in ("k", "day", "summary_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def retention(days: float, stability: float) -> float:
    """Ebbinghaus' curve: the probability that an item is still kept.

    Args:
        days: since its last recall (t).
        stability: 1, and 1 more for each recall (S).
    """
    return math.exp(-days / stability)


@final
class MemoryBank(TextMemory[MemoryBankSettings]):
    """What is recalled often is kept, the rest is forgotten and lives on in summaries."""

    method = "memory_bank"
    place = "before_task"
    constants = MemoryBankSettings
    recalls = True

    @override
    def learn(self, experience: Experience) -> None:
        text = f"[day {self.today}] {experience.task.strip()}\n{experience.output}\n({experience.feedback})"
        self.store.add("dialogue", text, key=experience.task, strength=1.0)
        if self.store.tick % self.settings.day == 0:
            self._end_day()

    @override
    def conclude(self) -> None:
        if self.store.tick % self.settings.day:
            self._end_day()

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        overall = [self.passage(item) for item in self.store.items("overall")]
        nearest = [
            self.passage(hit.item) for hit in self.search(query, state.k or self.settings.k, "dialogue")
        ]
        kept = self.fitting([*overall, *nearest], state)
        return sorted(kept, key=lambda passage: (passage.title != "overall", int(passage.id)))

    @override
    def recall(self, items: Sequence[Item]) -> None:
        for item in items:
            if item.kind == "dialogue":
                self.store.update(item, strength=item.strength + 1, accessed=self.store.tick)

    @property
    def today(self) -> int:
        """The day of the write under way, from 1."""
        return max(0, self.store.tick - 1) // self.settings.day + 1

    def _end_day(self) -> None:
        first = (self.today - 1) * self.settings.day
        dialogues = [item for item in self.store.items("dialogue") if item.created > first]
        if dialogues:
            text = "\n\n".join(item.text for item in dialogues)
            lines = text.split("\n")
            events = self._summary("events of a day", _EVENTS, text) or f"{lines[0]}\n{lines[-1]}"
            traits = self._summary("traits of a day", _TRAITS, text)
            self.store.add("day", events, data={"traits": traits})
            self._sum_up()
        if self.settings.forget:
            for item in self.store.items("dialogue"):
                if retention(
                    (self.store.tick - item.accessed) / self.settings.day, item.strength
                ) < self._luck(item):
                    self.store.remove(item)

    def _sum_up(self) -> None:
        """Makes the summary of all days anew."""
        days = self.store.items("day")
        text = "\n\n".join(f"Day {number}: {day.text}" for number, day in enumerate(days, start=1))
        lines = text.split("\n")
        events = self._summary("all events", _ALL_EVENTS, text) or f"{lines[0]}\n{lines[-1]}"
        traits = [day.data["traits"] for day in days if day.data["traits"]]
        overall = self._summary("all traits", _ALL_TRAITS, "\n\n".join(traits)) if traits else None
        for item in self.store.items("overall"):
            self.store.remove(item)
        self.store.add("overall", f"{events}\n\n{overall}" if overall else events)

    def _summary(self, purpose: str, prompt: str, text: str) -> str | None:
        return self.ask(purpose, f"{prompt}\n\n{text}", self.settings.summary_tokens, some_text)

    def _luck(self, item: Item) -> float:
        """In [0, 1), the same at every look until the item is recalled again."""
        return seed_of("memory_bank", self.seed, item.number, item.strength) / 2**63


_EVENTS = (
    "Summarise what happened in these tasks: what was asked, what was done, how it ended. Be brief.\n\nTasks:"
)
_TRAITS = (
    "What do these tasks show about who gives them and about their world: habits, wishes, rules? Answer in a few "
    "sentences.\n\nTasks:"
)
_ALL_EVENTS = "Summarise the events of these days in a few sentences, the important ones first.\n\nDays:"
_ALL_TRAITS = "Sum up these observations about who gives the tasks and about their world in a few sentences.\n\nObservations:"
