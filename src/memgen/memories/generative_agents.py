"""Generative Agents: a stream of memories, and reflections on it (arXiv 2304.03442).

    WRITE  append the episode; the scribe rates its importance, 1 to 10
           importance since the last reflection above 150: from the newest 100 the scribe asks 3 questions; for each the
           nearest memories are read, and it infers 5 insights with the memories that are their evidence
    READ   the best by recency + importance + relevance, each scaled to [0, 1] over all memories; reading renews access

Recency is 0.995 to the power of the hours since the last access (section 4.1), relevance the cosine, or BM25's score. An hour is a
write, since nothing here depends on the time of day. Differs from the released code (joonspk-research/generative_agents), in
which (1) recency is 0.99 to the power of the rank, the oldest first, so that the oldest are favoured; (2) the three have the
weights 0.5, 3 and 2, where the paper's are 1. Insights are rated in one call each. Without a scribe the importance is
1 + 9 |reward|, at most 10, and nothing is reflected upon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, transcript
from memgen.memories.scribe import Nonsense
from memgen.memories.store import Item


@dataclass(frozen=True)
class GenerativeAgentsSettings:
    """Constants of Generative Agents."""

    k: int = 10
    """Memories that are read, as far as the budget goes; the released code's 30 suits its long contexts."""
    decay: float = 0.995
    """Recency per hour."""
    hours_per_tick: float = 1.0
    """Hours between two writes."""
    reflect_above: float = 150.0
    """Importance since the last reflection above which there is another one."""
    newest: int = 100
    """Memories that a reflection begins with."""
    questions: int = 3
    """Questions of a reflection."""
    insights: int = 5
    """Insights per question."""

    def __post_init__(self) -> None:
        for name in ("k", "newest", "questions", "insights"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")


def scores(
    hours: Sequence[float], importance: Sequence[float], relevance: Sequence[float], decay: float = 0.995
) -> np.ndarray:
    """Recency + importance + relevance of memories, each scaled to [0, 1] over all of them.

    Args:
        hours: since the last access.
        importance: 1 to 10.
        relevance: cosines, or any other scores.
        decay: of recency per hour.

    Returns:
        float64 (memories,). A part in which all are equal counts 0.
    """
    recency = decay ** np.asarray(hours, dtype=np.float64)
    total: np.ndarray = _scaled(recency) + _scaled(np.asarray(importance)) + _scaled(np.asarray(relevance))
    return total


def _scaled(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    spread = np.ptp(values) if len(values) else 0.0
    return (values - values.min()) / spread if spread else np.zeros_like(values)


@final
class GenerativeAgents(TextMemory[GenerativeAgentsSettings]):
    """A stream in which what is recent, important and relevant is found."""

    method = "generative_agents"
    place = "before_task"
    constants = GenerativeAgentsSettings
    recalls = True

    @override
    def learn(self, experience: Experience) -> None:
        text = transcript(experience)
        importance = self._rated(text)
        if importance is None:
            importance = min(10.0, 1 + 9 * abs(experience.reward))
        self._append(text, importance)
        if self.store.state("importance") > self.settings.reflect_above and self.scribe is not None:
            self._reflect()
            self.store.set_state("importance", 0.0)

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        return [self.passage(item) for item in self._best(query, state.k or self.settings.k)]

    @override
    def recall(self, items: Sequence[Item]) -> None:
        for item in items:
            self.store.update(item, accessed=self.store.tick)

    def _best(self, query: str, k: int) -> list[Item]:
        stream = self.store.items("memory")
        if not stream:
            return []
        self.retrievals += 1
        relevance = self.store.relevance(query, "memory")
        total = scores(
            [(self.store.tick - item.accessed) * self.settings.hours_per_tick for item in stream],
            [item.strength for item in stream],
            [relevance[item.number] for item in stream],
            self.settings.decay,
        )
        return [stream[index] for index in np.argsort(-total, kind="stable")[:k]]

    def _append(self, text: str, importance: float, evidence: Sequence[int] = ()) -> None:
        number = self.store.add("memory", text, key=text, strength=importance)
        self.store.set_state("importance", self.store.state("importance", 0.0) + importance)
        for source in evidence:
            self.store.link(number, source, "evidence")

    def _rated(self, text: str) -> float | None:
        return self.ask("an importance", f"{_IMPORTANCE}\n\n{text}\n\nImportance (1 to 10):", 8, _rating)

    def _reflect(self) -> None:
        recent = self.store.items("memory", newest=self.settings.newest)
        listed = "\n\n".join(item.text for item in recent)
        count = self.settings.questions
        asking = f"{_QUESTIONS.format(count=count)}\n\nMemories:\n{listed}"
        for question in (self.ask("questions", asking, 200, _lines) or [])[:count]:
            found = self._best(question, self.settings.k)
            numbered = dict(enumerate(found, start=1))
            shown = "\n\n".join(f"{number}. {item.text}" for number, item in numbered.items())
            asking = f"{_INSIGHTS.format(count=self.settings.insights)}\n\nQuestion: {question}\n\nMemories:\n{shown}"
            for insight, evidence in (self.ask("insights", asking, 400, _insights) or [])[
                : self.settings.insights
            ]:
                importance = self._rated(insight) or 5.0
                self._append(insight, importance, _numbers(evidence, numbered))


_IMPORTANCE = (
    "How important is this memory for tasks to come, on a scale from 1 (everyday) to 10 (it changes how to act)? Answer with "
    "the number alone.\n\nMemory:"
)
_QUESTIONS = "What are the {count} most important general questions that these memories can answer? One question a line."
_INSIGHTS = (
    "Which {count} general insights do these memories give on the question? One a line, with the numbers of the memories "
    "that show it, in this form: the insight (because of 1, 3)"
)
_INSIGHT = re.compile(r"^[\W\d]*(\S.*?)\s*\(because of ([\d,\s and]+)\)", re.MULTILINE)


def _rating(answer: str) -> float:
    found = re.search(r"\d+", answer)
    if found is None or not 1 <= int(found[0]) <= 10:
        raise Nonsense(f"there is no number from 1 to 10 in {answer!r:.80}")
    return float(found[0])


def _lines(answer: str) -> list[str]:
    lines = [re.sub(r"^[\W\d]+", "", line).strip() for line in answer.splitlines()]
    if not any(lines):
        raise Nonsense("there is no question")
    return [line for line in lines if line]


def _insights(answer: str) -> list[tuple[str, list[int]]]:
    found = [(text, [int(n) for n in re.findall(r"\d+", named)]) for text, named in _INSIGHT.findall(answer)]
    if not found:
        raise Nonsense(f'there is no "insight (because of ...)" in {answer!r:.80}')
    return found


def _numbers(evidence: Sequence[int], numbered: Mapping[int, Item]) -> list[int]:
    return [numbered[number].number for number in evidence if number in numbered]
