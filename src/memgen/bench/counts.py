"""Exact work from an insertion plan alone, to hold the engine's own counts against, and to price a position.

Reasoner: a prompt and its latents once, then each token but the last and K latents per later insertion. Weaver: each
token and latent up to a row's last insertion once, and K queries per insertion. Trigger: the text up to the last boundary
at which it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memgen.types import Decision, Generation, InsertionKind


@dataclass(frozen=True)
class Counts:
    """Positions, and the pairs of a query and a key that it attends to (what a longer stream makes dearer)."""

    reasoner_positions: int
    weaver_positions: int
    trigger_positions: int
    reasoner_pairs: int
    weaver_pairs: int
    trigger_pairs: int
    latents: int
    """Latents inserted."""
    prompt_positions: int
    """Tokens of all prompts."""
    insertions: int
    """The ones at prompt ends included."""


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def stream_counts(
    lengths: Sequence[int],
    prompts: Sequence[int],
    plan: Sequence[Sequence[tuple[int, int]]],
    latents: Callable[[InsertionKind], int],
    asked: Sequence[int] | None = None,
) -> Counts:
    """Work on rows that are read up to, and without, their last token.

    Args:
        lengths: tokens of each row, prompt included.
        prompts: prompt tokens of each row.
        plan: (point, kind) pairs of each row.
        latents: K of a kind.
        asked: tokens of each row that a trigger with a pass of its own has read; None: there is none.
    """
    reasoner = weaver = inserted = insertions = reasoner_pairs = weaver_pairs = 0
    for length, row in zip(lengths, plan, strict=True):
        sizes = [latents(InsertionKind(kind)) for _, kind in row]
        stream = length - 1 + sum(sizes)
        reasoner += stream
        reasoner_pairs += _triangle(stream)
        inserted += sum(sizes)
        insertions += len(sizes)
        if not sizes:
            continue
        text = row[-1][0] + sum(sizes[:-1])
        weaver += text + sum(sizes)
        weaver_pairs += _triangle(text)
        before = 0
        for (point, _), size in zip(row, sizes, strict=True):
            weaver_pairs += size * (point + before) + _triangle(size)
            before += size
    return Counts(
        reasoner_positions=reasoner,
        weaver_positions=weaver,
        trigger_positions=sum(asked or []),
        reasoner_pairs=reasoner_pairs,
        weaver_pairs=weaver_pairs,
        trigger_pairs=sum(_triangle(count) for count in asked or []),
        latents=inserted,
        prompt_positions=sum(prompts),
        insertions=insertions,
    )


def generation_counts(
    generation: Generation, latents: Callable[[InsertionKind], int], *, trigger_reads: bool
) -> Counts:
    """The work that a generation should have taken, one prompt per answer.

    Args:
        generation: the answers.
        latents: K of a kind.
        trigger_reads: whether the trigger has a pass of its own over the text.
    """
    prompts = [len(turn.context) for turn in generation.turns]
    lengths = [p + n for p, n in zip(prompts, generation.lengths, strict=True)]
    asked = None
    if trigger_reads:
        asked = []
        for prompt, turn in zip(prompts, generation.turns, strict=True):
            steps = [step for step, made in enumerate(turn.decisions) if made != Decision.NOT_ASKED]
            asked.append(prompt + steps[-1] if steps else 0)
    return stream_counts(lengths, prompts, generation.plan.rows(), latents, asked)


def prompt_reads(reasoner_positions: int, counts: Counts, tokens_fed: int) -> float:
    """How often the prompts were read: what new tokens and latents do not explain, over the prompts' size.

    Args:
        reasoner_positions: as counted by the engine.
        counts: of the same run.
        tokens_fed: new tokens that were read back.
    """
    return (reasoner_positions - tokens_fed - counts.latents) / counts.prompt_positions
