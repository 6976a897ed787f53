"""The trigger: INVOKE or SKIP at a boundary (paper, Eq. 4 and 7).

Three kinds. A constant probability (always, never, random). Learned from tokens, as released: an adapter and a 2-way
head over a pass of its own that never sees latents. Learned from the reasoner's own hidden states, as in the paper:
no second pass over the text. A class of your own, whose path is the kind, is a fourth: see `Trigger`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone, BackboneConfig
from memgen.model.cache import KVCache, PackedKVCache, PassSegment, RowKVCache, leaders_of, upload
from memgen.types import Decision, TokenBatch

KINDS = ("always", "never", "random", "tokens", "hidden_states")
LEARNED = ("tokens", "hidden_states")


@dataclass(frozen=True)
class TriggerConfig:
    """Which trigger decides, and how."""

    kind: str = "always"
    """always, never, random: a constant. tokens: learned, reads the text. hidden_states: learned, reads the reasoner. Or
    the import path of a `Trigger` of your own, as `my_package.MyTrigger`; it is called with the base and `arguments`."""
    probability: float = 0.5
    """Probability of INVOKE at a boundary for `random`."""
    backbone: BackboneConfig | None = None
    """For `tokens`: a base of its own; None shares the reasoner's."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """For `tokens`: its adapter."""
    initial_invoke_bias: float = 0.0
    """Added to the INVOKE logit of a new learned trigger."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a `Trigger` of your own."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"trigger.probability must be in [0, 1], got {self.probability}")
        if self.kind not in KINDS and "." not in self.kind:
            raise ValueError(
                f"trigger.kind must be one of {', '.join(KINDS)}, or the import path of a class, got {self.kind!r}"
            )
        if self.arguments and self.kind in KINDS:
            raise ValueError(
                f"trigger.arguments are those of a class of your own, but trigger.kind is {self.kind!r}"
            )

    @property
    def learned(self) -> bool:
        """Whether trigger RL has something to train."""
        return self.kind in LEARNED or self.kind not in KINDS


@dataclass(frozen=True)
class Boundary:
    """What the trigger may look at when some rows are at a boundary."""

    rows: Sequence[int]
    """Rows of the trigger's KV cache."""
    unread: Sequence[Sequence[int]]
    """Per row, the reasoner's token ids since the trigger last read it, the boundary token included. No latents."""
    states: Float[Tensor, "rows hidden"] | None
    """The reasoner's last hidden state behind the boundary token; only for a trigger that `needs_states`."""


class Trigger(nn.Module, ABC):
    """Decides at boundaries.

    A learned trigger defines `invoke_probs`, which decoding asks, and `logits`, which training asks: both must give the
    same distribution. A class that `TriggerConfig.kind` names by its path is called with the base (`TriggerConfig.backbone`,
    else the reasoner's) as its only positional argument; nothing else has to know it.
    """

    needs_states: bool = False
    """Whether it reads the reasoner's hidden states."""
    reads_text: bool = False
    """Whether it has a pass of its own over the text; then `kv_cache` returns a cache, and its positions are counted."""
    shares_prompts: bool = False
    """Whether answers to one prompt may share its reading: `invoke_probs` is then given the prompt alone first, once for all
    of them, and what it says to that is not used. Only with a cache, without states, and if what is read of a text does not
    depend on where it is cut."""
    stochastic: bool = False
    """Whether its decisions are sampled even where learned triggers are read greedily."""
    probability: float | None = None
    """Of INVOKE, if it is the same at every boundary, whatever the text; None: the trigger is learned."""

    def bases(self) -> dict[str, Backbone]:
        """The frozen bases that it reads, by the name under which a checkpoint keeps their fingerprint."""
        return {}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training updates, by its name in this module: all parameters but those of its bases."""
        frozen = {id(p) for base in self.bases().values() for p in base.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in frozen}

    def kv_cache(self, rows: int, capacity: int, device: torch.device) -> RowKVCache | None:
        """A KV cache for `rows` streams of up to `capacity` tokens; None if it has no pass of its own."""
        return None

    @abstractmethod
    def invoke_probs(self, boundary: Boundary, cache: KVCache | None) -> Float[Tensor, " rows"]:
        """Probability of INVOKE for each row, float32.

        Args:
            boundary: the rows and what there is to read of them.
            cache: what `kv_cache` returned.
        """

    def logits(
        self,
        batch: TokenBatch,
        at: Bool[Tensor, "batch length"],
        states: Float[Tensor, "places hidden"] | None,
    ) -> Float[Tensor, "places 2"]:
        """SKIP and INVOKE logits behind boundary tokens, float32, row by row, with gradient for `own_parameters`.

        Args:
            batch: rows of tokens.
            at: True at the boundary tokens.
            states: the reasoner's last hidden states behind them, if the trigger `needs_states`.

        Raises:
            ValueError: if the trigger has nothing to learn, or reads token ids of another vocabulary.
        """
        raise ValueError(
            "a constant trigger has no logits; set model.memgen.trigger.kind to tokens or hidden_states"
        )


@final
class ConstantTrigger(Trigger):
    """Invokes with a fixed probability: 1 always, 0 never.

    Args:
        probability: of INVOKE at a boundary.
    """

    stochastic = True
    probability: float

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    @override
    def invoke_probs(self, boundary: Boundary, cache: KVCache | None) -> Float[Tensor, " rows"]:
        return torch.full((len(boundary.rows),), self.probability)


@final
class TokenTrigger(Trigger):
    """Adapter + 2-way head over the tokens so far, as in the released code; latents are invisible to it.

    Args:
        backbone: its base, shared with the reasoner or its own; the adapter is added here.
        config: adapter and initial bias.
        translate: turns the reasoner's token ids into those of its own base; None if both have one vocabulary.
    """

    reads_text = True
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
        # Two pieces of a text may be other tokens than the whole.
        self.shares_prompts = translate is None
        backbone.add_adapter(self.adapter, config.lora)
        self.output_layer = _decision_head(backbone.hidden_size, config.initial_invoke_bias)

    @override
    def bases(self) -> dict[str, Backbone]:
        return {"trigger": self.backbone}

    @override
    def kv_cache(self, rows: int, capacity: int, device: torch.device) -> RowKVCache:
        return RowKVCache(rows, capacity, device)

    @override
    def own_parameters(self) -> dict[str, nn.Parameter]:
        own = {f"output_layer.{name}": p for name, p in self.output_layer.named_parameters()}
        adapter = {
            f"backbone.model.{n}": p for n, p in self.backbone.adapters.parameters(self.adapter).items()
        }
        return own | adapter

    @override
    def invoke_probs(self, boundary: Boundary, cache: KVCache | None) -> Float[Tensor, " rows"]:
        assert cache is not None, "the caller made this trigger's KV cache"
        unread = [list(ids) if self.translate is None else self.translate(ids) for ids in boundary.unread]
        if self.translate is not None and isinstance(cache, RowKVCache):
            # A translation may need more tokens than the reasoner's text has.
            cache.reserve(max(cache.length(r) + len(u) for r, u in zip(boundary.rows, unread, strict=True)))
        hidden = self._read(unread, boundary.rows, cache, [1] * len(unread))
        return self._logits(hidden).softmax(dim=-1)[:, int(Decision.INVOKE)]

    @override
    def logits(
        self,
        batch: TokenBatch,
        at: Bool[Tensor, "batch length"],
        states: Float[Tensor, "places hidden"] | None,
    ) -> Float[Tensor, "places 2"]:
        if self.translate is not None:
            raise ValueError(
                "a trigger with another vocabulary than the reasoner's can decide but not be trained; share the "
                "reasoner's base (model.memgen.trigger.backbone: null)"
            )
        device = self.backbone.device
        rows = batch.rows()
        leader, shared = _shared_beginnings(batch, rows)
        # Leaders first: one pass reads a beginning and what the rows that share it have behind it.
        order = sorted(range(len(rows)), key=lambda row: leader[row] != row)
        cache = PackedKVCache(len(rows), device)
        for row in order:
            if shared[row]:
                cache.share(row, leader[row], shared[row])
        hidden = self._read([rows[row][shared[row] :] for row in order], order, cache, None)
        counts = [len(rows[row]) - shared[row] for row in order]
        starts = dict(zip(order, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        asked = [np.flatnonzero(marks[: len(row)]) for marks, row in zip(at.cpu().numpy(), rows, strict=True)]
        index = [
            np.where(places < shared[row], starts[leader[row]] + places, starts[row] + places - shared[row])
            for row, places in enumerate(asked)
        ]
        return self._logits(hidden).index_select(0, upload(np.concatenate(index), device))

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.output_layer(hidden.to(self.output_layer.weight.dtype))
        return logits.float()

    def _read(
        self,
        unread: Sequence[Sequence[int]],
        rows: Sequence[int],
        cache: KVCache,
        last: Sequence[int] | None,
    ) -> Tensor:
        """Hidden states of the new tokens, packed: of the `last` ones of each row; None: of all."""
        counts = [len(ids) for ids in unread]
        assert min(counts) > 0, "a boundary lies behind a token that the trigger has not read"
        ids = upload([token for row in unread for token in row], self.backbone.device)
        view = cache.open([PassSegment(rows=rows, counts=counts, read=last)])
        hidden: Tensor = self.backbone(self.backbone.embed(ids), view, self.adapter)
        return hidden


def _shared_beginnings(batch: TokenBatch, rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """For each row, the row whose beginning it takes, and how many tokens of it; a row that takes none is its own.

    Raises:
        ValueError: if rows of a group do not share what they claim to.
    """
    count = len(rows)
    if batch.group is None or batch.shared is None:
        return list(range(count)), [0] * count
    group = batch.group.tolist()
    # A row reads at least its last token itself.
    limits = [min(limit, len(row) - 1) for limit, row in zip(batch.shared.tolist(), rows, strict=True)]
    leaders = leaders_of(range(count), limits, group)
    leader = [leaders[number] for number in group]
    shared = [0 if leader[row] == row else limits[row] for row in range(count)]
    for row in range(count):
        if list(rows[row][: shared[row]]) != list(rows[leader[row]][: shared[row]]):
            raise ValueError(
                f"rows {leader[row]} and {row} are of one group but do not begin with the same tokens"
            )
    return leader, shared


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
    def invoke_probs(self, boundary: Boundary, cache: KVCache | None) -> Float[Tensor, " rows"]:
        assert boundary.states is not None, (
            "the caller reads the reasoner first for a trigger that needs states"
        )
        return self._logits(boundary.states).softmax(dim=-1)[:, int(Decision.INVOKE)]

    @override
    def logits(
        self,
        batch: TokenBatch,
        at: Bool[Tensor, "batch length"],
        states: Float[Tensor, "places hidden"] | None,
    ) -> Float[Tensor, "places 2"]:
        assert states is not None, "the caller reads the reasoner first for a trigger that needs states"
        return self._logits(states)

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.output_layer(self.norm(states.to(self.norm.weight.dtype)))
        return logits.float()


def _decision_head(hidden: int, invoke_bias: float) -> nn.Linear:
    head = nn.Linear(hidden, 2)
    with torch.no_grad():
        head.bias[int(Decision.INVOKE)] += invoke_bias
    return head


def build_trigger(
    config: TriggerConfig,
    base: Backbone,
    reasoner_hidden: int,
    translate: Callable[[Sequence[int]], list[int]] | None = None,
) -> Trigger:
    """The trigger that the configuration names, new.

    Args:
        config: which one.
        base: `config.backbone`, else the reasoner's.
        reasoner_hidden: width of the reasoner.
        translate: from the reasoner's token ids to those of the base, where they differ.

    Raises:
        ValueError: if the kind is an import path that cannot be imported or is no `Trigger`.
    """
    match config.kind:
        case "tokens":
            return TokenTrigger(base, config, translate)
        case "hidden_states":
            return StateTrigger(reasoner_hidden, config)
        case "random":
            return ConstantTrigger(config.probability)
        case "always" | "never":
            return ConstantTrigger(float(config.kind == "always"))
        case path:
            trigger: Trigger = _trigger_class(path)(base, **config.arguments)
            return trigger


def _trigger_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model.memgen.trigger.kind {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Trigger)):
        raise ValueError(  # noqa: TRY004 - the setting is wrong, not a type
            f"model.memgen.trigger.kind {path!r} is no memgen.model.trigger.Trigger"
        )
    return found
