"""A trigger without parameters: it invokes where the reasoner does not know what comes next.

The paper has no such trigger. It is the control of a learned one: uncertainty costs nothing to read and needs no training.
`model.memgen.trigger.kind: memgen.model.entropy_trigger.EntropyTrigger`, with `arguments: {threshold: 1.0}`.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from memgen.model.backbone import Backbone
from memgen.model.cache import KVCache
from memgen.model.trigger import Boundary, Trigger
from memgen.types import TokenBatch


@final
class EntropyTrigger(Trigger):
    """Invokes where the entropy of the reasoner's next token, at temperature 1, is above a threshold.

    Args:
        base: the reasoner's, whose head gives the next token's distribution.
        threshold: in nats, 0 or more. Of V tokens the entropy is at most ln V, so a threshold from there on never invokes.

    Raises:
        ValueError: if the threshold is no such number.
    """

    needs_states = True

    def __init__(self, base: Backbone, threshold: float) -> None:
        super().__init__()
        if not 0.0 <= threshold < math.inf:
            raise ValueError(f"the threshold of the entropy must be 0 nats or more, got {threshold}")
        self.base = base
        self.threshold = threshold

    @override
    def bases(self) -> dict[str, Backbone]:
        return {"trigger": self.base}

    @override
    def invoke_probs(self, boundary: Boundary, cache: KVCache | None) -> Float[Tensor, " rows"]:
        assert boundary.states is not None, (
            "the caller reads the reasoner first for a trigger that needs states"
        )
        return (self.entropy(boundary.states) > self.threshold).float()

    def entropy(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
        """Entropy of the next token's distribution behind each state, in nats, float32."""
        logits: Tensor = self.base.head(states)
        found: Tensor = torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1)
        return found

    @override
    def logits(
        self,
        batch: TokenBatch,
        at: Bool[Tensor, "batch length"],
        states: Float[Tensor, "places hidden"] | None,
    ) -> Float[Tensor, "places 2"]:
        raise ValueError(
            "the entropy trigger has no parameters, so there is nothing to train; set model.memgen.trigger.kind to tokens "
            "or hidden_states"
        )
