"""What the data module hands to a stage, and the places from which it is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memgen.chat import ConversationTokens
from memgen.environments.base import Example
from memgen.types import TokenBatch


@dataclass(frozen=True)
class Item:
    """An example and its tokens."""

    example: Example
    """The environment's item."""
    conversation: ConversationTokens | None
    """Prompt and reference completion, for the loss. None where nothing is learned from reference completions."""
    prompt_tokens: int = 0
    """Tokens of the prompt; 0 of an interactive task, whose first observation may belong to it."""


@dataclass(frozen=True)
class BatchIndex:
    """One micro-batch of one rank, before it is built."""

    indices: tuple[int, ...]
    """Items, as indices into `EnvironmentData.items`."""
    window_tokens: int
    """Supervised tokens of the accumulation window, over its micro-batches and all ranks."""
    epoch: int
    """The epoch whose order this is."""


@dataclass(frozen=True)
class SFTBatch:
    """One micro-batch of one rank."""

    tokens: TokenBatch
    """Rows to learn from. A conversation of several turns gives one row per turn, of which that turn is supervised;
    its rows share a number in `tokens.group`, their position in `examples`, and what lies before a row's turn counts
    as shared. `group` is None if each item gives one row."""
    examples: tuple[int, ...]
    """The items in the batch, as indices into `EnvironmentData.items`."""
    epoch: int
    """The epoch whose order this is; 0 in evaluation."""
    window_tokens: int
    """Supervised tokens of the whole gradient-accumulation window over all ranks, at least 1: what a summed loss is
    divided by. In evaluation: of this batch."""

    def to(self, device: torch.device | str) -> SFTBatch:
        """The same: rows stay on the host, where plans are made; a pass makes its own tensors."""
        return self


@dataclass(frozen=True)
class PromptIndex:
    """One training step of one rank on its rollouts, before the items are looked up."""

    indices: tuple[int, ...]
    """Items, as indices into `EnvironmentData.items`."""
    epoch: int
    """The epoch whose order this is."""
    rollout: int
    """Number of the rollout within the epoch."""
    part: int
    """Number of the step within those that one rollout serves. The first one rolls out."""


@dataclass(frozen=True)
class PromptBatch:
    """One training step of one rank on its rollouts."""

    examples: list[Example]
    """What to roll out. The same for every step that one rollout serves."""
    place: PromptIndex
    """Where in the run this step is."""

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same: items are text."""
        return self


@dataclass(frozen=True)
class EvalBatch:
    """Items to answer, and in the validation of SFT the reference completions to score by their loss."""

    examples: list[Example]
    """What to reward against. Empty where this rank has fewer items than others."""
    indices: tuple[int, ...]
    """The items, as indices into `EnvironmentData.items`: what their random sampling depends on."""
    sft: SFTBatch | None
    """The same items with their reference completions; None where there is no such loss, or no item."""

    def to(self, device: torch.device | str) -> EvalBatch:
        """The same: items are text, and rows stay on the host."""
        return self
