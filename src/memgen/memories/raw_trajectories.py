"""Raw trajectories, keyed by their task: the store that LatentMem's composer reads (arXiv 2602.03036).

    WRITE  append the episode's text
    READ   the k nearest by their task

Differs from the paper: (1) BM25 or any embedder in the place of MiniLM; (2) a trajectory of the very task that is asked about
is left out unless `same_task` is set, for in training it gives the answer away. Its code reorders what it finds by a sampled
answer of a language model, which is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, steps


@dataclass(frozen=True)
class RawTrajectoriesSettings:
    """Constants of the store."""

    k: int = 1
    """Trajectories that are read."""
    same_task: bool = False
    """Whether a trajectory whose task is part of the query is read too."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")


@final
class RawTrajectories(TextMemory[RawTrajectoriesSettings]):
    """Episodes as they were, in their own words alone: a reasoner's small vocabulary may have no others."""

    method = "raw_trajectories"
    place = "examples"
    constants = RawTrajectoriesSettings
    asks = False

    @override
    def learn(self, experience: Experience) -> None:
        lines = [experience.task.strip()]
        for step in steps(experience):
            lines += [step.action, step.result] if step.result else [step.action]
        self.store.add("trajectory", "\n".join(lines), key=experience.task)

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        self.retrievals += 1
        wanted, asked = state.k or self.settings.k, _plain(query)
        same: set[int] = set()
        while True:
            found = self.store.search(query, wanted, "trajectory", leave_out=same)
            again = {hit.item.number for hit in found if _plain(hit.item.key or "") in asked}
            if self.settings.same_task or not again:
                return [self.passage(hit.item) for hit in found]
            same |= again


def _plain(text: str) -> str:
    return " ".join(text.split())
