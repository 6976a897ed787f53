"""The weaver: turns the reasoner's state into K latent vectors (paper, Eq. 5).

As in the released code, and unlike the paper's Eq. 5, it reads by default the reasoner's input embeddings so far,
earlier latents included, through a linear map; K learned queries behind them carry the latents out. With
`reads="hidden_states"` it reads the reasoner's last hidden states, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.model.backbone import Backbone
from memgen.model.cache import KVCache, PassSegment
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig
from memgen.types import InsertionKind

__all__ = ["QueryBank", "Weaver", "WeaverConfig"]


@final
class QueryBank(nn.Module):
    """K learned queries: LayerNorm(latents) * scale.

    Args:
        count: K.
        hidden: width of the weaver's base.
        scale: initial scale.
    """

    def __init__(self, count: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(count, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(self) -> Float[Tensor, "latent hidden"]:
        """The queries as input embeddings of the weaver's base."""
        queries: Tensor = self.norm(self.latents) * self.scale
        return queries


@final
class Weaver(LatentSource):
    """LoRA adapter, learned queries and the maps between the two spaces.

    Args:
        backbone: its base, shared with the reasoner or its own; the adapter is added here.
        config: how latents are made.
        reasoner_hidden: width of the reasoner.
    """

    adapter = "weaver"
    """Name of its LoRA adapter on its base."""
    settings = (
        "reads", "prompt_latents", "inference_latents", "lora.r", "lora.alpha", "lora.target_modules",
    )  # fmt: skip

    def __init__(self, backbone: Backbone, config: WeaverConfig, reasoner_hidden: int) -> None:
        super().__init__(config)
        self.reads_states = config.reads == "hidden_states"
        self.backbone = backbone
        backbone.add_adapter(self.adapter, config.lora)
        hidden = backbone.hidden_size
        scale = config.query_scale
        if scale is None:
            scale = float(backbone.embedding.float().std())
        self.reasoner_to_weaver = nn.Linear(reasoner_hidden, hidden)
        self.weaver_to_reasoner = nn.Linear(hidden, reasoner_hidden)
        if config.map_init == "identity":
            if hidden != reasoner_hidden:
                raise ValueError(
                    f"weaver.map_init=identity needs equal widths, but the reasoner's is {reasoner_hidden} and that of the "
                    f"weaver's base {hidden}; set weaver.map_init=random, or use the reasoner's base"
                )
            self._start_as_identity()
        self.prompt_queries = (
            QueryBank(config.prompt_latents, hidden, scale) if config.prompt_latents else None
        )
        self.inference_queries = (
            QueryBank(config.inference_latents, hidden, scale) if config.inference_latents else None
        )

    @classmethod
    @override
    def build(cls, config: WeaverConfig, around: Surroundings) -> Weaver:
        return cls(around.base, config, around.reasoner.hidden_size)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.weaver_to_reasoner.weight.dtype

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        for map_, scale in (
            (self.reasoner_to_weaver, 1.0),
            (self.weaver_to_reasoner, self.backbone.embedding_scale()),
        ):
            nn.init.eye_(map_.weight).mul_(scale)
            nn.init.zeros_(map_.bias)

    @override
    def bases(self) -> dict[str, Backbone]:
        return {"weaver": self.backbone}

    @override
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Maps, queries and the adapter."""
        own = {
            name: parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")
        }
        adapter = {
            f"backbone.model.{n}": p for n, p in self.backbone.adapters.parameters(self.adapter).items()
        }
        return own | adapter

    @override
    def is_untrained(self) -> bool:
        """Whether its adapter is as it was made: the second factor of every LoRA pair is 0 then."""
        pairs = self.backbone.adapters.parameters(self.adapter)
        return all(not bool(p.any()) for name, p in pairs.items() if ".lora_B." in name)

    @override
    def positions(
        self,
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        texts: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        return [count + self.config.latents(kind) for count, kind in zip(counts, kinds, strict=True)]

    @property
    @override
    def forgotten(self) -> int:
        return max(self.config.prompt_latents, self.config.inference_latents)

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
        """Writes the latents of one insertion per row.

        Only what is not in a row's KV cache yet is passed in; the queries are read with it and not kept, so the next
        call reads the latents themselves in their place.

        Args:
            states: the reasoner's embeddings (or hidden states) of the new stream positions, packed row by row.
            counts: new positions of each row; may be 0 only if the cache holds some of the row already.
            kinds: which queries each row uses.
            rows: each row's row in the cache.
            cache: what the weaver read before.
            texts: not read.

        Returns:
            Latents in the reasoner's embedding space, float32, packed row by row: K of its kind for each row.
        """
        queries = {
            kind: bank()
            for kind, bank in (
                (InsertionKind.PROMPT, self.prompt_queries),
                (InsertionKind.INFERENCE, self.inference_queries),
            )
            if bank is not None and kind in kinds
        }
        projected = self.reasoner_to_weaver(states.to(self.reasoner_to_weaver.weight.dtype))
        parts: list[Tensor] = []
        sizes: list[int] = []
        for part, kind in zip(projected.split(list(counts)), kinds, strict=True):
            bank = queries[kind]
            parts += [part, bank.to(part.dtype)]
            sizes.append(bank.shape[0])
        fed = [count + size for count, size in zip(counts, sizes, strict=True)]
        view = cache.open([PassSegment(rows=rows, counts=fed, keep=counts, read=sizes)])
        hidden = self.backbone(torch.cat(parts), view, self.adapter)
        latents: Tensor = self.weaver_to_reasoner(hidden.to(self.weaver_to_reasoner.weight.dtype))
        return latents
