"""ReMem: earlier tasks as examples, thought over before each action (Evo-Memory, arXiv 2511.20857).

    WRITE   append (task, output, feedback), by template
    READ    the k nearest by their task
    REFINE  before each action: the scribe thinks, drops passages by their numbers, or says that the agent may act, until it
            does

No code was found; the limit on rounds is ours. Without a scribe failures are dropped where a success is present, and, if a
threshold is set, what has a lower cosine with the situation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, record
from memgen.memories.scribe import Nonsense


@dataclass(frozen=True)
class ReMemSettings:
    """Constants of ReMem."""

    k: int = 4
    """Tasks that are read."""
    rounds: int = 3
    """Questions of a refinement, at most."""
    least_cosine: float | None = None
    """Without a scribe: cosine with the situation below which a passage is dropped. Needs an embedder."""

    def __post_init__(self) -> None:
        for name in ("k", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Thought:
    """What the scribe does with what was read."""

    kind: Literal["think", "refine", "act"]
    """Its choice."""
    text: str = ""
    """What it thinks."""
    dropped: tuple[int, ...] = ()
    """Numbers of the passages that it drops, from 1."""


@final
class ReMem(TextMemory[ReMemSettings]):
    """The nearest tasks, refined."""

    method = "remem"
    place = "examples"
    constants = ReMemSettings

    @override
    def needs_vectors(self) -> bool:
        return self.settings.least_cosine is not None

    @override
    def learn(self, experience: Experience) -> None:
        self.store.add(
            "task", record(experience), key=experience.task, data={"success": experience.succeeded}
        )

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        return [self.passage(hit.item) for hit in self.search(query, state.k or self.settings.k, "task")]

    @override
    def refine(self, passages: Sequence[Passage], state: ReadState) -> list[Passage]:
        kept = dict(enumerate(passages, start=1))
        thoughts: list[str] = []
        for _ in range(self.settings.rounds if kept else 0):
            thought = self.ask("refinement", _prompt(kept, thoughts, state), 200, thought_in)
            if thought is None:
                return self._by_rule(list(kept.values()), state)
            if thought.kind == "act":
                break
            thoughts += [thought.text] if thought.kind == "think" else []
            kept = {number: passage for number, passage in kept.items() if number not in thought.dropped}
        return list(kept.values())

    def _by_rule(self, passages: list[Passage], state: ReadState) -> list[Passage]:
        """The fallback."""
        succeeded = {
            p.id: bool(item and item.data["success"])
            for p in passages
            for item in [self.store.item(int(p.id))]
        }
        if any(succeeded.values()):
            passages = [passage for passage in passages if succeeded[passage.id]]
        least = self.settings.least_cosine
        if least is None or not state.situation:
            return passages
        cosines = self.store.relevance(state.situation, "task")
        return [passage for passage in passages if cosines[int(passage.id)] >= least]


def thought_in(answer: str) -> Thought:
    """The scribe's choice.

    Raises:
        Nonsense: if it made none.
    """
    found = re.search(r"^\W*(think|refine|act)\b[\s:]*(.*)", answer, re.IGNORECASE | re.MULTILINE)
    if found is None:
        raise Nonsense(f"neither Think, Refine nor Act: {answer!r:.80}")
    kind, rest = found[1].lower(), found[2].strip()
    if kind == "act":
        return Thought("act")
    if kind == "think":
        return Thought("think", text=rest)
    numbers = tuple(int(number) for number in re.findall(r"\d+", rest))
    if not numbers:
        raise Nonsense(f"Refine names no number: {answer!r:.80}")
    return Thought("refine", dropped=numbers)


def _prompt(kept: dict[int, Passage], thoughts: Sequence[str], state: ReadState) -> str:
    shown = "\n\n".join(f"[{number}] {passage.text}" for number, passage in kept.items())
    thought = "".join(f"\nThought: {text}" for text in thoughts)
    return (
        "An agent is about to act and has earlier tasks before it. Answer with one line:\nThink: <a thought>\n"
        "Refine: <numbers of earlier tasks that are of no use now; they are dropped>\nAct\n\n"
        f"Situation: {state.situation or '(not told)'}\n\nEarlier tasks:\n{shown}\n{thought}"
    )
