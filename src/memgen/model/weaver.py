"""The weaver: turns the reasoner's state into K latent vectors (paper, Eq. 5).

As in the released code, and unlike the paper's Eq. 5, it reads by default the reasoner's input embeddings so far,
earlier latents included, through a linear map; K learned queries behind them carry the latents out. With
`reads="hidden_states"` it reads the reasoner's last hidden states, as in the paper. Behind them it may read what was
retrieved (`memgen.model.external`; paper, Eq. 17-19).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.model.backbone import Backbone
from memgen.model.cache import KVCache, PackedKVCache, PassSegment
from memgen.model.external import External, external_memories
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig, start_as_identity
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
        external: what it reads besides the stream.
    """

    adapter = "weaver"
    """Name of its LoRA adapter on its base."""
    settings = (
        "reads", "prompt_latents", "inference_latents", "lora.r", "lora.alpha", "lora.target_modules",
    )  # fmt: skip

    def __init__(
        self,
        backbone: Backbone,
        config: WeaverConfig,
        reasoner_hidden: int,
        external: Sequence[External] = (),
    ) -> None:
        super().__init__(config)
        self.external = tuple(external)
        self.reads_text = bool(self.external)
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
            start_as_identity(self.reasoner_to_weaver, reasoner_hidden)
            start_as_identity(self.weaver_to_reasoner, reasoner_hidden, backbone.embedding_scale())
        self.prompt_queries = (
            QueryBank(config.prompt_latents, hidden, scale) if config.prompt_latents else None
        )
        self.inference_queries = (
            QueryBank(config.inference_latents, hidden, scale) if config.inference_latents else None
        )

    @classmethod
    @override
    def build(cls, config: WeaverConfig, around: Surroundings) -> Weaver:
        external = external_memories(config, around)
        return cls(around.base, config, around.reasoner.hidden_size, external)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.weaver_to_reasoner.weight.dtype

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
        read = counts if self._reads_stream else [0] * len(counts)
        own = [count + self.config.latents(kind) for count, kind in zip(read, kinds, strict=True)]
        for memory in self.external:
            assert texts is not None, "a weaver that reads external memory reads text"
            own = [a + b for a, b in zip(own, memory.positions(texts, kinds), strict=True)]
        return own

    @property
    def _reads_stream(self) -> bool:
        return all(memory.parametric for memory in self.external)

    @property
    @override
    def forgotten(self) -> int:
        queries = max(self.config.prompt_latents, self.config.inference_latents)
        return queries + sum(memory.most for memory in self.external)

    @override
    def weave(
        self,
        states: Float[Tensor, "time hidden"],
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        rows: Sequence[int],
        cache: KVCache,
        texts: Sequence[Sequence[int]] | None = None,
        snippets: Sequence[Float[Tensor, "_ hidden"]] | None = None,
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
            texts: what the external memory is asked with.
            snippets: reasoner embeddings (or hidden states) that are read behind each row's new positions and forgotten
                with the queries (paper, Eq. 17-19: text that was retrieved); a row's may be empty. None: what the external
                memory gives, if there is one.

        Returns:
            Latents in the reasoner's embedding space, float32, packed row by row: K of its kind for each row.

        Raises:
            ValueError: if a row is longer with its snippet than the weaver's base can read.
        """
        if snippets is None and self.external:
            assert texts is not None, "a weaver that reads external memory reads text"
            found = [memory.read(texts, kinds) for memory in self.external]
            snippets = [torch.cat(pieces) for pieces in zip(*found, strict=True)]
        if not self._reads_stream:
            states, counts, rows = states[:0], [0] * len(counts), range(len(counts))
            cache = PackedKVCache(len(counts), states.device)
        queries = {
            kind: bank()
            for kind, bank in (
                (InsertionKind.PROMPT, self.prompt_queries),
                (InsertionKind.INFERENCE, self.inference_queries),
            )
            if bank is not None and kind in kinds
        }
        projected = self.reasoner_to_weaver(states.to(self.reasoner_to_weaver.weight.dtype))
        retrieved = [None] * len(counts) if snippets is None else list(snippets)
        parts: list[Tensor] = []
        sizes: list[int] = []
        fed: list[int] = []
        for part, kind, snippet in zip(projected.split(list(counts)), kinds, retrieved, strict=True):
            bank = queries[kind]
            parts.append(part)
            if snippet is not None and len(snippet):
                parts.append(self.reasoner_to_weaver(snippet.to(part.dtype)))
            parts.append(bank.to(part.dtype))
            sizes.append(bank.shape[0])
            fed.append(part.shape[0] + (0 if snippet is None else len(snippet)) + bank.shape[0])
        view = cache.open([PassSegment(rows=rows, counts=fed, keep=counts, read=sizes)])
        context = self.backbone.context_length
        if snippets is not None and context is not None and view.limit > context:
            raise ValueError(
                f"a stream with what was retrieved for it has {view.limit} positions, but the context of the weaver's base "
                f"is {context}; lower model.memgen.weaver.retrieval.budget or bank.blocks (of the composer: "
                "model.memgen.weaver.arguments.budget)"
            )
        hidden = self.backbone(torch.cat(parts), view, self.adapter)
        latents: Tensor = self.weaver_to_reasoner(hidden.to(self.weaver_to_reasoner.weight.dtype))
        return self._with_stored(latents, sizes, kinds, texts)

    def _with_stored(
        self,
        latents: Tensor,
        sizes: Sequence[int],
        kinds: Sequence[InsertionKind],
        texts: Sequence[Sequence[int]] | None,
    ) -> Tensor:
        """The latents with the blocks that are inserted as they are in the place of woven ones."""
        for memory in self.external:
            assert texts is not None, "a weaver that reads external memory reads text"
            stored = memory.stored(texts, kinds)
            if any(block is not None for block in stored):
                woven = latents.split(list(sizes))
                latents = torch.cat(
                    [
                        own if block is None else block.to(own)
                        for own, block in zip(woven, stored, strict=True)
                    ]
                )
        return latents
