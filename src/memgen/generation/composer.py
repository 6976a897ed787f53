"""LatentMem's composer: a weaver that also reads trajectories of similar tasks (arXiv 2602.03036).

    trajectory = nearest(memory, task)
    latents = composer(stream, trajectory, queries)[-K:]

It is the weaver, adapter and queries and maps, with retrieval (`memgen.generation.retrieval`) under this method's settings:
one passage, of the end of the text. Without a hit it is the plain weaver, bit for bit. No gradient goes into what was
retrieved.

Differs from the paper: (1) it reads the whole stream behind which latents go, not the task alone; (2) any text memory serves,
by default `RawTrajectories` with BM25; (3) passages are whole or left out, where the published code cuts them from the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.generation.retrieval import TextRetrieval
from memgen.memories.base import TextMemory
from memgen.model.backbone import Backbone
from memgen.model.cache import KVCache
from memgen.model.external import RetrievalSettings
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig
from memgen.model.weaver import Weaver
from memgen.types import InsertionKind

_ARGUMENTS = "model.memgen.weaver.arguments"


@final
class Composer(LatentSource):
    """A weaver and the memory that it reads.

    Args:
        composer: the weaver, which reads `retrieval`.
        retrieval: searches a memory at each insertion with the end of the text.

    Raises:
        ValueError: if the weaver reads hidden states: a trajectory is read as text.
    """

    reads_text = True
    settings = Weaver.settings

    def __init__(self, composer: Weaver, retrieval: TextRetrieval) -> None:
        super().__init__(composer.config)
        if composer.reads_states:
            raise ValueError(
                "the composer reads retrieved text as embeddings; set model.memgen.weaver.reads to embeddings"
            )
        self.composer = composer
        self.retrieval = retrieval

    @classmethod
    @override
    def build(cls, config: WeaverConfig, around: Surroundings) -> Composer:
        settings = _settings(**config.arguments)
        retrieval = TextRetrieval.build(settings, config, around, section=_ARGUMENTS)
        return cls(Weaver(around.base, config, around.reasoner.hidden_size, [retrieval]), retrieval)

    @property
    def memory(self) -> TextMemory[Any]:
        """What it reads; never written."""
        return self.retrieval.memory

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.composer.dtype

    @override
    def bases(self) -> dict[str, Backbone]:
        return self.composer.bases()

    @override
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the weaver."""
        return {f"composer.{name}": p for name, p in self.composer.own_parameters().items()}

    @override
    def is_untrained(self) -> bool:
        return self.composer.is_untrained()

    @property
    @override
    def forgotten(self) -> int:
        return self.composer.forgotten

    @override
    def positions(
        self,
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        texts: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        return self.composer.positions(counts, kinds, texts)

    def retrieved(self, text: Sequence[int]) -> list[int]:
        """Token ids of the passages that fit a text; empty if there are none."""
        return self.retrieval.retrieved(text)

    @override
    def weave(
        self,
        states: Float[Tensor, "time hidden"],
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        rows: Sequence[int],
        cache: KVCache,
        texts: Sequence[Sequence[int]] | None = None,
    ) -> Float[Tensor, "latents hidden"]:
        """The weaver's latents, what the memory finds for each row's text having been read.

        Raises:
            ValueError: if a row with what was retrieved for it is longer than the weaver's base can read.
        """
        return self.composer.weave(states, counts, kinds, rows, cache, texts)


def _settings(
    *,
    memory: str | None = None,
    method: str | None = None,
    constants: dict[str, Any] | None = None,
    passages: int = 1,
    budget: int = 256,
    query_tokens: int = 256,
) -> RetrievalSettings:
    """The composer's arguments as settings of retrieval."""
    if query_tokens < 1:
        raise ValueError(f"weaver.arguments.query_tokens must be at least 1, got {query_tokens}")
    try:
        return RetrievalSettings(
            memory=memory,
            method=method or RetrievalSettings.method,
            constants=constants or {},
            passages=passages,
            budget=budget,
            separator="",
            query_head=0,
            query_tail=query_tokens,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("weaver.retrieval.", "weaver.arguments.")) from error
