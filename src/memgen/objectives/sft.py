"""Supervised objective of the weaver (paper, Eq. 11-13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


def token_loss(logprobs: Float[Tensor, " labels"], window_tokens: int, parts: int = 1) -> Float[Tensor, ""]:
    """Negative log-likelihood per token of a whole optimizer step.

    Divided by the tokens of the step (all micro-batches, all ranks), not of this batch: short batches do not weigh
    more, and N micro-batches give exactly the gradient of one big batch.

    Args:
        logprobs: log-probability of each supervised token of this batch.
        window_tokens: supervised tokens of the whole optimizer step.
        parts: what the caller's framework divides by (micro-batches per step times ranks).

    Returns:
        A scalar whose sum over all parts, divided by `parts`, is the step's mean loss.
    """
    return -logprobs.sum() * (parts / window_tokens)


@dataclass(frozen=True)
class Curriculum:
    """Where latents go while the weaver learns. The end of the prompt always has them."""

    first: float = 1.0
    """Chance that an answer gets latents at its first delimiters, up to the cap (the released code: always)."""
    all: float = 0.0
    """Chance that it gets them at all its delimiters, beyond the cap."""
    random: float = 0.0
    """Chance that it gets them at a random subset of its delimiters, up to the cap (REV, the random inserter)."""
    none: float = 0.0
    """Chance that it gets them at the end of the prompt only."""
    probability: float = 0.5
    """Chance of each delimiter in a random subset."""

    def __post_init__(self) -> None:
        total = self.first + self.all + self.random + self.none
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares of a curriculum (first, all, random, none) must add up to 1, got {total}")

    def mode(self, draw: float) -> Literal["first", "all", "random", "none"]:
        """The insertion rule for an answer, from a uniform draw in [0, 1)."""
        if draw < self.first:
            return "first"
        if draw < self.first + self.all:
            return "all"
        return "random" if draw < self.first + self.all + self.random else "none"
