"""An evaluation's episodes as MLflow traces and as rows of a table.

A trace has a span for each turn of the agent and for each answer of the environment. An episode is played in a batch
with others and written down afterwards. Of its times only the batch's are known; they are shared out among its turns by
the number of tokens, so a trace shows the order and the size of the turns, not their speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memgen.environments.base import Example
from memgen.model.weaver import WeaverConfig
from memgen.tracking.samples import marked_trajectory
from memgen.tracking.traces import Trace, TraceEvent, TraceSpan
from memgen.types import AgentTurn, InsertionKind, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "⟦{}⟧"
"""How woven latents stand in the text of a turn."""


def episode_row(
    tokenizer: PreTrainedTokenizerBase, weaver: WeaverConfig, example: Example, trajectory: Trajectory
) -> dict[str, Any]:
    """An episode as a row of a table: numbers to sort by, and its text with marks."""
    sample = marked_trajectory(tokenizer, weaver, example, trajectory)
    return {
        "example": example.id,
        "reward": trajectory.reward,
        "turns": len(trajectory.turns),
        "tokens": trajectory.tokens,
        "insertions": sum(len(turn.insertions) for turn in trajectory.turns),
        "offered": trajectory.offered,
        "invoked": trajectory.invocations,
        "truncated": trajectory.truncated,
        "fault": trajectory.fault or "",
        "question": example.question,
        "answer": "".join(
            MARK.format(segment.text) if segment.is_insertion else segment.text for segment in sample.segments
        ),
    }


def episode_trace(
    tokenizer: PreTrainedTokenizerBase,
    weaver: WeaverConfig,
    example: Example,
    trajectory: Trajectory,
    begin: int,
    end: int,
    tags: Mapping[str, str],
) -> Trace:
    """An episode as a trace.

    Args:
        tokenizer: the reasoner's.
        weaver: how many latents an insertion of each kind has.
        example: the item.
        trajectory: what the agent did with it.
        begin: when its batch began, in nanoseconds since 1970.
        end: when its batch was over.
        tags: such as the split and the step.
    """
    spans: list[TraceSpan] = []
    clock = begin
    behind = 0
    total = max(1, trajectory.tokens)
    for number, turn in enumerate(trajectory.turns, start=1):
        read = tokenizer.decode(turn.context[behind:], skip_special_tokens=True).strip()
        if number > 1:
            spans.append(
                TraceSpan("environment", "TOOL", clock, clock, _text(tokenizer, trajectory, number - 2), read)
            )
        until = clock + (end - begin) * len(turn.tokens) // total
        spans.append(_turn_span(tokenizer, weaver, example, trajectory, number, read, clock, until))
        clock = until
        behind = len(turn.context) + len(turn.tokens)
    outcome: dict[str, Any] = {"reward": trajectory.reward, **trajectory.parts}
    if trajectory.fault is not None:
        outcome = {"fault": trajectory.fault}
    root = TraceSpan(
        name="episode",
        kind="AGENT",
        begin=begin,
        end=max(end, clock),
        inputs={"question": example.question},
        outputs={**outcome, "truncated": trajectory.truncated},
        attributes={
            "turns": len(trajectory.turns),
            "tokens": trajectory.tokens,
            "insertions": sum(len(turn.insertions) for turn in trajectory.turns),
            "times": "the batch's, shared out by tokens",
        },
    )
    return Trace(
        root=root,
        spans=tuple(spans),
        tags={"example": example.id, **tags},
        reward=None if trajectory.fault is not None else trajectory.reward,
    )


def _text(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory, turn: int) -> str:
    text: str = tokenizer.decode(trajectory.turns[turn].tokens, skip_special_tokens=True)
    return text


def _turn_span(
    tokenizer: PreTrainedTokenizerBase,
    weaver: WeaverConfig,
    example: Example,
    trajectory: Trajectory,
    number: int,
    read: str,
    begin: int,
    end: int,
) -> TraceSpan:
    turn = trajectory.turns[number - 1]
    alone = marked_trajectory(tokenizer, weaver, example, dataclasses.replace(trajectory, turns=(turn,)))
    marked = "".join(
        MARK.format(segment.text) if segment.is_insertion else segment.text for segment in alone.segments
    )
    return TraceSpan(
        name=f"turn {number}",
        kind="CHAT_MODEL",
        begin=begin,
        end=end,
        # As chat models log it, so that MLflow shows the turn as a chat.
        inputs={"messages": [{"role": "user", "content": read}]},
        outputs={"choices": [{"message": {"role": "assistant", "content": marked}}]},
        attributes={
            "mlflow.chat.tokenUsage": {
                "input_tokens": len(turn.context),
                "output_tokens": len(turn.tokens),
                "total_tokens": len(turn.context) + len(turn.tokens),
            },
            "insertions": len(turn.insertions),
            "offered": turn.offered,
            "finished": turn.finished,
        },
        events=tuple(_insertion_events(weaver, turn, begin, end)),
    )


def _insertion_events(weaver: WeaverConfig, turn: AgentTurn, begin: int, end: int) -> list[TraceEvent]:
    events = []
    for point, kind in turn.insertions:
        place = point - len(turn.context)
        attributes: dict[str, Any] = {
            "before_token": place,
            "latents": weaver.latents(InsertionKind(kind)),
            "kind": InsertionKind(kind).name.lower(),
        }
        if place < len(turn.invoke_probs):
            attributes["invoke_probability"] = turn.invoke_probs[place]
        time = begin + (end - begin) * place // max(1, len(turn.tokens))
        events.append(TraceEvent("latent_insertion", time, attributes))
    return events
