"""The loss on tokens ahead of random positions: differentiable cache augmentation (arXiv 2412.17747, section 3).

    for each text, sample positions; at each position p
        insert latents woven from what lies in front of p
        predict the n tokens behind p, which see the text in front of p and these latents, no others

Differs from the paper: (1) positions are sampled among the answer's tokens, whose prompt's end is one, instead of anywhere in
pretraining text; (2) each position is a row of its own, and rows of one text share the reading of what lies in front of
them, where the paper makes one sequence with a mask; (3) texts weigh as much as their supervised tokens, whatever number of
positions each has, so that a step's loss does not depend on how it is split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memgen.types import InsertionKind, InsertionPlan, TokenBatch


@dataclass(frozen=True)
class AheadSettings:
    """How far latents are trained to look ahead, and from where."""

    tokens: int = 16
    """Tokens that are predicted behind each position."""
    positions: int = 128
    """Positions of each answer at most; an answer with fewer tokens has one at each of them."""

    def __post_init__(self) -> None:
        for name in ("tokens", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"ahead.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class AheadBatch:
    """Rows that each predict the tokens behind one position.

    Attributes:
        tokens: the rows, supervised behind their position; those of one text share what lies in front of theirs.
        plan: latents at each row's position, of the kind of a prompt's end.
        weights: of each supervised token of all rows, row by row, (N,): a text's weights add up to its supervised tokens.
    """

    tokens: TokenBatch
    plan: InsertionPlan
    weights: Float[Tensor, " labels"]


def rows_ahead(
    batch: TokenBatch, settings: AheadSettings, generator: Callable[[int], torch.Generator]
) -> AheadBatch:
    """Makes the rows of the loss on tokens ahead.

    Args:
        batch: texts with supervised tokens.
        settings: how far ahead, and from how many positions.
        generator: of the positions of a row of `batch`.
    """
    if not batch.supervised_tokens:
        return AheadBatch(batch, InsertionPlan.empty(len(batch.ids)), torch.zeros(0))
    rows, marks, points, group, shared, weights = [], [], [], [], [], []
    for number, text in enumerate(batch.rows()):
        supervised = batch.supervised[number, : len(text)].tolist()
        candidates = [p for p in range(1, len(text)) if supervised[p]]
        order = torch.randperm(len(candidates), generator=generator(number)).tolist()
        chosen = sorted(candidates[index] for index in order[: settings.positions])
        labels = 0
        for point in chosen:
            end = min(point + settings.tokens, len(text))
            rows.append(text[:end])
            marks.append([p >= point and supervised[p] for p in range(end)])
            points.append([(point, int(InsertionKind.PROMPT))])
            group.append(number)
            shared.append(point)
            labels += sum(marks[-1])
        weights += [len(candidates) / labels] * labels if labels else []
    tokens = TokenBatch.from_rows(rows, marks)
    return AheadBatch(
        TokenBatch(
            ids=tokens.ids,
            lengths=tokens.lengths,
            supervised=tokens.supervised,
            group=torch.tensor(group),
            shared=torch.tensor(shared),
        ),
        InsertionPlan(points),
        torch.tensor(weights),
    )
