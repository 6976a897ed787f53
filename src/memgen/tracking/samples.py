"""Episodes as text with the places where memory was woven in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memgen.environments.base import Example
from memgen.model.weaver import WeaverConfig
from memgen.tracking.mlflow import Sample, Segment
from memgen.types import AgentTurn, InsertionKind, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def marked_trajectory(
    tokenizer: PreTrainedTokenizerBase, weaver: WeaverConfig, example: Example, trajectory: Trajectory
) -> Sample:
    """An episode, the agent's turns cut at their insertion points; a mark says how many latents stand there.

    Args:
        tokenizer: the reasoner's.
        weaver: how many latents an insertion of each kind has.
        example: the item.
        trajectory: what the agent did with it.
    """
    segments: list[Segment] = []
    behind = 0
    for number, turn in enumerate(trajectory.turns):
        if number:
            segments.append(Segment(tokenizer.decode(turn.context[behind:])))
        segments += _marked_turn(tokenizer, weaver, turn)
        behind = len(turn.context) + len(turn.tokens)
    outcome = f"reward {trajectory.reward:g}" if trajectory.fault is None else f"failed: {trajectory.fault}"
    parts = ", ".join(f"{name} {value:g}" for name, value in trajectory.parts.items())
    title = (
        f"{example.id}: {outcome}{f' ({parts})' if parts else ''}{', cut' if trajectory.truncated else ''}"
    )
    return Sample(example.question, segments, title)


def _marked_turn(tokenizer: PreTrainedTokenizerBase, weaver: WeaverConfig, turn: AgentTurn) -> list[Segment]:
    segments = []
    begin = 0
    for point, kind in turn.insertions:
        place = point - len(turn.context)
        if place > begin:
            segments.append(Segment(tokenizer.decode(turn.tokens[begin:place])))
        segments.append(Segment(f"{weaver.latents(InsertionKind(kind))} latents", is_insertion=True))
        begin = place
    segments.append(Segment(tokenizer.decode(turn.tokens[begin:])))
    return segments
