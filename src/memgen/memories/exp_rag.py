"""ExpRAG: the most similar earlier tasks as examples (a baseline of Evo-Memory, arXiv 2511.20857).

    WRITE  append (task, output, feedback), by template
    READ   the k nearest by their task

No code was found. The paper's encoder is said to be bge-base-en-v1.5; here it is the embedder that all methods share, or BM25.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, record


@dataclass(frozen=True)
class ExpRAGSettings:
    """Constants of ExpRAG."""

    k: int = 4
    """Tasks that are read."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")


@final
class ExpRAG(TextMemory[ExpRAGSettings]):
    """The nearest tasks."""

    method = "exp_rag"
    place = "examples"
    constants = ExpRAGSettings
    asks = False

    @override
    def learn(self, experience: Experience) -> None:
        self.store.add("task", record(experience), key=experience.task)

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        found = self.search(query, state.k or self.settings.k, "task")
        return [self.passage(hit.item) for hit in found]
