"""ExpRecent: the last tasks as examples (a baseline of Evo-Memory, arXiv 2511.20857).

    WRITE  append (task, output, feedback), by template
    READ   the last w, newest first

No code was found; the window is ours, as the paper does not give it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, record


@dataclass(frozen=True)
class ExpRecentSettings:
    """Constants of ExpRecent."""

    window: int = 4
    """Tasks that are read (w)."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


@final
class ExpRecent(TextMemory[ExpRecentSettings]):
    """The last tasks."""

    method = "exp_recent"
    place = "examples"
    constants = ExpRecentSettings
    asks = False

    @override
    def learn(self, experience: Experience) -> None:
        self.store.add("task", record(experience))

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        newest = self.store.items("task", newest=state.k or self.settings.window)
        return [self.passage(item) for item in reversed(newest)]
