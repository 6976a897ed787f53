"""LoRA on the reasoner itself, in the weaver's place: what fine-tuning gains from what the weaver learns from.

It writes no latents. Every pass of the reasoner applies its adapter, in decoding and in training alike, so stages, records and
checkpoints are the weaver's: weaver SFT becomes SFT of the reasoner, weaver GRPO becomes GRPO of it, or REINFORCE. The base's own
weights stay frozen, and without the adapter they are read bit for bit as before.

Differs from the paper's SFT and GRPO rows (arXiv 2509.24704, Table 1) as far as known: it does not say whether they are LoRA.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.cache import KVCache
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig
from memgen.types import InsertionKind

logger = logging.getLogger(__name__)


@final
class ReasonerLora(LatentSource):
    """An adapter on the reasoner's base, of `weaver.lora`.

    Args:
        config: K must be 0 for both kinds of insertion.
        backbone: the reasoner's base; the adapter is added here.
        match: `prompt_latents` and `inference_latents` of a weaver on the same base with the same `weaver.lora`. The rank is
            then the one whose parameters are nearest to that weaver's in number; alpha grows with it. None: the rank is
            `lora.r`.

    Raises:
        ValueError: if there are latents to insert, the base is another than the reasoner's, or `match` says something else.
    """

    reasoner_adapter = "reasoner"
    settings = ("arguments", "lora.r", "lora.alpha", "lora.target_modules")

    def __init__(
        self, config: WeaverConfig, backbone: Backbone, match: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(config)
        if config.prompt_latents or config.inference_latents:
            raise ValueError(
                f"weaver.kind lora writes no latents; set weaver.prompt_latents ({config.prompt_latents}) and "
                f"weaver.inference_latents ({config.inference_latents}) to 0"
            )
        if config.backbone is not None:
            raise ValueError(
                f"weaver.kind lora adapts the reasoner's own base; set weaver.backbone ({config.backbone.name}) to null"
            )
        self.backbone = backbone
        self.lora = config.lora
        self._chosen: dict[str, int] = {}
        if match is not None:
            self.lora, weaver = _matching(config.lora, backbone, match)
            self._chosen = {
                "lora_rank": self.lora.r,
                "lora_alpha": self.lora.alpha,
                "matched_parameters": weaver,
            }
        backbone.add_adapter(self.reasoner_adapter, self.lora)

    @classmethod
    @override
    def build(cls, config: WeaverConfig, around: Surroundings) -> ReasonerLora:
        return cls(config, around.reasoner, **config.arguments)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return next(iter(self.own_parameters().values())).dtype

    @override
    def bases(self) -> dict[str, Backbone]:
        return {"weaver": self.backbone}

    @override
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's."""
        pairs = self.backbone.adapters.parameters(self.reasoner_adapter)
        return {f"backbone.model.{name}": parameter for name, parameter in pairs.items()}

    @override
    def chosen(self) -> dict[str, int]:
        """Rank and alpha that match a weaver, and the weaver's parameters."""
        return dict(self._chosen)

    @override
    def is_untrained(self) -> bool:
        """Whether it is as it was made: the second factor of every LoRA pair is 0 then."""
        return all(not bool(p.any()) for name, p in self.own_parameters().items() if ".lora_B." in name)

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
        """Never called: K is 0."""
        raise AssertionError("no kind of insertion has latents")


def _matching(lora: LoraSettings, backbone: Backbone, match: Mapping[str, int]) -> tuple[LoraSettings, int]:
    """The settings of a rank at which an adapter has about as many parameters as a weaver with `lora`, and how many that has."""
    keys = {"prompt_latents", "inference_latents"}
    if not isinstance(match, Mapping) or set(match) != keys or min(match.values()) < 0:
        raise ValueError(
            f"weaver.arguments.match says which weaver to match, {{prompt_latents: K, inference_latents: K}}, got {match}"
        )
    per_rank, hidden = backbone.adapters.size(lora.target_modules), backbone.hidden_size
    maps = 2 * (hidden * hidden + hidden)
    banks = sum(count * hidden + 2 * hidden + 1 for count in match.values() if count)
    weaver = lora.r * per_rank + maps + banks
    rank = max(1, round(weaver / per_rank))
    found = dataclasses.replace(lora, r=rank, alpha=max(1, round(lora.alpha * rank / lora.r)))
    logger.info(
        "the reasoner's adapter has rank %d, alpha %d and %d parameters; the weaver that it matches (rank %d, K %d and %d) has %d",
        rank, found.alpha, rank * per_rank, lora.r, match["prompt_latents"], match["inference_latents"], weaver,
    )  # fmt: skip
    return found, weaver
