"""Pause tokens: constant vectors that give the reasoner positions to compute in, and tell it nothing (arXiv 2310.02226).

One learned <pause> vector stands at all K places of an insertion. With `tied: false` each place of each kind of insertion
has a vector of its own: a soft prompt that is put where the weaver's latents would be.

Differs from the paper: (1) the reasoner is frozen, so only the vector is learned, and there is no pretraining with pauses;
(2) pauses stand wherever the trigger invokes, not only behind the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.model.cache import KVCache
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig
from memgen.types import InsertionKind

# K latents, H hidden size


@final
class Pause(LatentSource):
    """Constants in the place of latents.

    New vectors have a random direction and the mean norm of token embeddings, so that they can be inserted untrained.

    Args:
        config: K of each kind of insertion.
        hidden: width of the reasoner.
        norm: of a new vector.
        tied: one vector for all places (paper), or one for each place of each kind of insertion.
        seed: of the directions.

    Raises:
        ValueError: if nothing would ever be inserted.
    """

    def __init__(
        self, config: WeaverConfig, hidden: int, norm: float, *, tied: bool = True, seed: int = 0
    ) -> None:
        super().__init__(config)
        sizes = {kind: config.latents(kind) for kind in InsertionKind if config.latents(kind)}
        if not sizes:
            raise ValueError(
                "pause tokens need a place: weaver.prompt_latents and weaver.inference_latents are both 0; set one above "
                "0, or model.memgen.trigger.kind to never for the bare reasoner"
            )
        counts = {"pause": 1} if tied else {kind.name.lower(): size for kind, size in sizes.items()}
        self.tied = tied
        generator = torch.Generator().manual_seed(seed)
        self.vectors = nn.ParameterDict()
        for name, count in counts.items():
            directions = torch.randn(count, hidden, generator=generator)
            self.vectors[name] = nn.Parameter(norm * nn.functional.normalize(directions, dim=-1))

    @classmethod
    @override
    def build(cls, config: WeaverConfig, around: Surroundings) -> Pause:
        reasoner = around.reasoner
        return cls(config, reasoner.hidden_size, reasoner.embedding_norm(), **config.arguments)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return next(iter(self.vectors.values())).dtype

    def block(self, kind: InsertionKind) -> Float[Tensor, "latent hidden"]:
        """The K vectors of a kind of insertion."""
        vectors: Tensor = self.vectors["pause" if self.tied else kind.name.lower()]
        return vectors.expand(self.config.latents(kind), -1)  # (K, H)

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
        """The constants of each row's kind of insertion; nothing is read and the cache stays empty.

        Args:
            states: not read.
            counts: not read.
            kinds: which constants.
            rows: not read.
            cache: not read.
            texts: not read.
        """
        return torch.cat([self.block(kind) for kind in kinds])
