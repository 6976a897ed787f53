"""Supervised objective of the weaver (paper, Eq. 11-13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def token_loss(
    logprobs: Float[Tensor, " labels"], step_tokens: int, micro_batches: int = 1
) -> Float[Tensor, ""]:
    """Negative log-likelihood per token of a whole optimizer step.

    Divided by the tokens of the step (all micro-batches, all ranks), not of this batch: short batches do not weigh
    more, and N micro-batches give exactly the gradient of one big batch.

    Args:
        logprobs: log-probability of each supervised token of this batch.
        step_tokens: supervised tokens of the whole optimizer step.
        micro_batches: of the step, over all ranks: what the caller's framework divides the sum of their losses by.

    Returns:
        A scalar whose sum over all micro-batches, divided by their number, is the step's mean loss.
    """
    return -logprobs.sum() * (micro_batches / step_tokens)


@dataclass(frozen=True)
class Curriculum:
    """Where latents are inserted while the weaver learns: one of four rules, sampled for each answer.

    The end of the prompt always has latents. The released code always takes the first delimiters; the paper names
    all boundaries, or a random subset of them, whose probability it does not give.
    """

    first: float = 1.0
    """Share of answers with latents at their first delimiters, up to the cap."""
    all: float = 0.0
    """Share with latents at all their delimiters, beyond the cap."""
    random: float = 0.0
    """Share with latents at a random subset of their delimiters, up to the cap."""
    none: float = 0.0
    """Share with latents at the end of the prompt only."""
    probability: float = 0.5
    """Chance of each delimiter in a random subset."""

    def __post_init__(self) -> None:
        shares = {"first": self.first, "all": self.all, "random": self.random, "none": self.none}
        if min(shares.values()) < 0 or abs(sum(shares.values()) - 1.0) > 1e-6:
            raise ValueError(f"the shares of a curriculum must be 0 or more and add up to 1, got {shares}")
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"curriculum.probability must be in [0, 1], got {self.probability}")

    def inserts_inside(self, cap: int) -> bool:
        """Whether any answer gets latents behind a delimiter.

        Args:
            cap: most insertions inside an answer (for the rules that have a cap).
        """
        return self.all > 0 or (cap > 0 and (self.first > 0 or self.random * self.probability > 0))


def choose_points(
    points: Sequence[int], cap: int, curriculum: Curriculum, generator: torch.Generator
) -> list[int]:
    """Samples the delimiters of one answer that get latents.

    Args:
        points: all of its candidates, ascending.
        cap: most insertions inside an answer (for the rules that have a cap).
        curriculum: the shares of the four rules.
        generator: of the rule, then of one number per candidate.
    """
    rule, *draws = torch.rand(1 + len(points), generator=generator).tolist()
    if rule < curriculum.first:
        return list(points[:cap])
    if rule < curriculum.first + curriculum.all:
        return list(points)
    if rule < curriculum.first + curriculum.all + curriculum.random:
        sampled = [point for point, draw in zip(points, draws, strict=True) if draw < curriculum.probability]
        return sampled[:cap]
    return []
