"""The trigger: INVOKE or SKIP at a boundary (paper, Eq. 4 and 7).

Three kinds. A constant probability (always, never, random). Learned from tokens, as released: an adapter and a 2-way
head over a pass of its own that never sees latents. Learned from the reasoner's own hidden states, as in the paper:
no second pass over the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone, BackboneConfig
from memgen.model.cache import Memory, PackedStore, RowCache, Segment, upload
from memgen.types import Decision, TokenBatch

TriggerKind = Literal["always", "never", "random", "tokens", "hidden_states"]


@dataclass(frozen=True)
class TriggerConfig:
    """Who decides, and how."""

    kind: TriggerKind = "always"
    """always, never, random: a constant. tokens: learned, reads the text. hidden_states: learned, reads the reasoner."""
    probability: float = 0.5
    """Chance of INVOKE at a boundary for `random`."""
    backbone: BackboneConfig | None = None
    """For `tokens`: a base of its own; None shares the reasoner's."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """For `tokens`: its adapter."""
    initial_invoke_bias: float = 0.0
    """Added to the INVOKE logit of a new learned trigger."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"trigger.probability must be in [0, 1], got {self.probability}")


@dataclass(frozen=True)
class Boundary:
    """What the trigger may look at when some rows stand at a boundary."""

    rows: Sequence[int]
    """Lines of the trigger's memory."""
    unread: Sequence[Sequence[int]]
    """Per row, the reasoner's token ids since the trigger last read it, the boundary token included. No latents."""
    states: Float[Tensor, "rows hidden"] | None
    """The reasoner's last hidden state behind the boundary token; only for a trigger that `needs_states`."""


class Trigger(nn.Module, ABC):
    """Decides at boundaries."""

    needs_states: bool = False
    """Whether it reads the reasoner's hidden states."""
    stochastic: bool = False
    """Whether its decisions are drawn even where learned triggers are read greedily."""

    def memory(self, rows: int, capacity: int, device: torch.device) -> RowCache | None:
        """The key-value memory for `rows` streams of up to `capacity` tokens, or None if it has no pass of its own."""
        return None

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by its name in this module."""
        return {}

    @abstractmethod
    def invoke_probs(self, boundary: Boundary, memory: Memory | None) -> Float[Tensor, " rows"]:
        """Probability of INVOKE for each row, float32."""


@final
class ConstantTrigger(Trigger):
    """Invokes with a fixed probability: 1 always, 0 never.

    Args:
        probability: chance of INVOKE at a boundary.
    """

    stochastic = True

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    @override
    def invoke_probs(self, boundary: Boundary, memory: Memory | None) -> Float[Tensor, " rows"]:
        return torch.full((len(boundary.rows),), self.probability)


@final
class TokenTrigger(Trigger):
    """Adapter + 2-way head over the tokens so far, as in the released code; latents are invisible to it.

    Args:
        backbone: its base, shared with the reasoner or its own; the adapter is added here.
        config: adapter and initial bias.
        translate: turns the reasoner's token ids into those of its own base; None if both have one vocabulary.
    """

    adapter = "trigger"
    """Name of its LoRA adapter on its base."""

    def __init__(
        self,
        backbone: Backbone,
        config: TriggerConfig,
        translate: Callable[[Sequence[int]], list[int]] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.translate = translate
        backbone.add_adapter(self.adapter, config.lora)
        self.output_layer = _decision_head(backbone.hidden_size, config.initial_invoke_bias)

    @override
    def memory(self, rows: int, capacity: int, device: torch.device) -> RowCache:
        # A translation may need more tokens than the reasoner's text; the bound only sizes the buffer.
        return RowCache(rows, capacity * (4 if self.translate else 1), device)

    @override
    def own_parameters(self) -> dict[str, nn.Parameter]:
        own = {f"output_layer.{name}": p for name, p in self.output_layer.named_parameters()}
        adapter = {
            f"backbone.model.{n}": p for n, p in self.backbone.adapters.parameters(self.adapter).items()
        }
        return own | adapter

    @override
    def invoke_probs(self, boundary: Boundary, memory: Memory | None) -> Float[Tensor, " rows"]:
        assert memory is not None, "the caller made this trigger's memory"
        unread = [list(ids) if self.translate is None else self.translate(ids) for ids in boundary.unread]
        hidden = self._read(unread, boundary.rows, memory, [1] * len(unread))
        return self._logits(hidden).softmax(dim=-1)[:, int(Decision.INVOKE)]

    def logits(self, batch: TokenBatch) -> Float[Tensor, "time 2"]:
        """SKIP and INVOKE logits behind every token of a batch (in its own base's ids), packed row by row."""
        device = self.backbone.device
        store = PackedStore(len(batch.lengths), device)
        return self._logits(self._read(batch.rows(), range(len(batch.lengths)), store, None))

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.output_layer(hidden.to(self.output_layer.weight.dtype))
        return logits.float()

    def _read(
        self,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        memory: Memory,
        wanted: Sequence[int] | None,
    ) -> Tensor:
        """Hidden states of the new tokens, packed: of the last ones of each row if fewer are wanted than are read."""
        counts = [len(ids) for ids in unread]
        assert min(counts) > 0, "a boundary lies behind a token that the trigger has not read"
        ids = upload([token for row in unread for token in row], self.backbone.device)
        view = memory.open([Segment(rows=rows, counts=counts, read=wanted)])
        hidden: Tensor = self.backbone(self.backbone.embed(ids), view, self.adapter)
        return hidden


@final
class StateTrigger(Trigger):
    """A 2-way head on the reasoner's last hidden state (paper, Eq. 4 with sigma as the 2-way softmax).

    Args:
        hidden: width of the reasoner.
        config: initial bias.
    """

    needs_states = True

    def __init__(self, hidden: int, config: TriggerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.output_layer = _decision_head(hidden, config.initial_invoke_bias)

    @override
    def own_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    @override
    def invoke_probs(self, boundary: Boundary, memory: Memory | None) -> Float[Tensor, " rows"]:
        assert boundary.states is not None, (
            "the caller reads the reasoner first for a trigger that needs states"
        )
        return self.logits(boundary.states).softmax(dim=-1)[:, int(Decision.INVOKE)]

    def logits(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows 2"]:
        """SKIP and INVOKE logits from hidden states."""
        logits: Tensor = self.output_layer(self.norm(states.to(self.norm.weight.dtype)))
        return logits.float()


def _decision_head(hidden: int, invoke_bias: float) -> nn.Linear:
    head = nn.Linear(hidden, 2)
    with torch.no_grad():
        head.bias[int(Decision.INVOKE)] += invoke_bias
    return head
