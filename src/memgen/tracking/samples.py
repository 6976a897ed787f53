"""Answers as text with the places where memory was woven in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memgen.model.weaver import WeaverConfig
from memgen.tracking.mlflow import Segment
from memgen.types import Generation, InsertionKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def marked_answer(
    tokenizer: PreTrainedTokenizerBase, weaver: WeaverConfig, generation: Generation, row: int
) -> list[Segment]:
    """One row's answer, cut at its insertion points; a mark says how many latents stand there.

    Args:
        tokenizer: the reasoner's.
        weaver: how many latents an insertion of each kind has.
        generation: the answers.
        row: which one.
    """
    prompt_length = int(generation.prompt.lengths[row])
    answer = generation.answers()[row]
    segments = []
    begin = 0
    for point, kind in generation.plan.rows()[row]:
        place = point - prompt_length
        if place > begin:
            segments.append(Segment(tokenizer.decode(answer[begin:place])))
        segments.append(Segment(f"{weaver.latents(InsertionKind(kind))} latents", is_insertion=True))
        begin = place
    segments.append(Segment(tokenizer.decode(answer[begin:])))
    return segments
