"""The weaver: turns the reasoner's state into K latent vectors (paper, Eq. 5).

As in the released code, and unlike the paper's Eq. 5, it reads by default the reasoner's input embeddings so far,
earlier latents included, through a linear map; K learned queries behind them carry the latents out. With
`reads="hidden_states"` it reads the reasoner's last hidden states, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone, BackboneConfig
from memgen.model.cache import KVCache, PassSegment
from memgen.types import InsertionKind


@dataclass(frozen=True)
class WeaverConfig:
    """How latents are made."""

    backbone: BackboneConfig | None = None
    """A base of its own; None shares the reasoner's (one copy of the weights)."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter that is trained."""
    prompt_latents: int = 8
    """K at the end of a prompt; 0 switches that insertion off."""
    inference_latents: int = 8
    """K after a delimiter; 0 switches those insertions off."""
    reads: Literal["embeddings", "hidden_states"] = "embeddings"
    """What it reads of the reasoner: input embeddings (released code) or last hidden states (paper, Eq. 5)."""
    query_scale: float | None = None
    """Initial scale of the normalised queries; None takes the standard deviation of its base's embeddings."""
    map_init: Literal["random", "identity"] = "random"
    """Start of the two linear maps. `random`: `nn.Linear`'s own (released code). `identity`: the weaver's base reads the
    reasoner's embeddings unchanged, as the text that it was pretrained on, and its last hidden states become latents with
    about the norm of token embeddings. Needs a base of the reasoner's width."""

    def latents(self, kind: InsertionKind) -> int:
        """K of a kind of insertion; 0 if it is switched off."""
        return self.prompt_latents if kind == InsertionKind.PROMPT else self.inference_latents

    def __post_init__(self) -> None:
        for name in ("prompt_latents", "inference_latents"):
            if getattr(self, name) < 0:
                raise ValueError(f"weaver.{name} must be 0 or more, got {getattr(self, name)}")


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
class Weaver(nn.Module):
    """LoRA adapter, learned queries and the maps between the two spaces.

    Args:
        backbone: its base, shared with the reasoner or its own; the adapter is added here.
        config: how latents are made.
        reasoner_hidden: width of the reasoner.
    """

    adapter = "weaver"
    """Name of its LoRA adapter on its base."""

    def __init__(self, backbone: Backbone, config: WeaverConfig, reasoner_hidden: int) -> None:
        super().__init__()
        self.config = config
        self.trained_kinds: set[InsertionKind] = set()
        """Kinds of insertion whose latents training has written, here or before the checkpoint that was loaded."""
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

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        for map_, scale in (
            (self.reasoner_to_weaver, 1.0),
            (self.weaver_to_reasoner, self.backbone.embedding_scale()),
        ):
            nn.init.eye_(map_.weight).mul_(scale)
            nn.init.zeros_(map_.bias)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by its name in this module: maps, queries and the adapter."""
        own = {
            name: parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")
        }
        adapter = {
            f"backbone.model.{n}": p for n, p in self.backbone.adapters.parameters(self.adapter).items()
        }
        return own | adapter

    def is_untrained(self) -> bool:
        """Whether its adapter is as it was made: the second factor of every LoRA pair is 0 then."""
        pairs = self.backbone.adapters.parameters(self.adapter)
        return all(not bool(p.any()) for name, p in pairs.items() if ".lora_B." in name)

    def weave(
        self,
        states: Float[Tensor, "time hidden"],
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        rows: Sequence[int],
        cache: KVCache,
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
        if torch.is_grad_enabled() and self.weaver_to_reasoner.weight.requires_grad:
            self.trained_kinds.update(kinds)
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
