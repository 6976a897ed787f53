"""Episodes as MLflow shows them: a row of a table, a trace, and text with marks for a page (`page.py`).

A trace has a span for each turn of the agent and for each answer of the environment. Episodes are played in a batch and
written down afterwards, so only the batch's start and end are known. The time is divided among an episode's turns in
proportion to their tokens: a trace shows order and size of the turns, not their speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memgen.environments.base import Example
from memgen.model.weaver import WeaverConfig
from memgen.tracking.traces import Trace, TraceEvent, TraceSpan
from memgen.types import AgentTurn, InsertionKind, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "⟦{}⟧"
"""Mark of inserted latents in plain text."""


@dataclass(frozen=True)
class TextSegment:
    """Text between two insertion points, or the mark of an insertion.

    Attributes:
        text: the text; of a mark, its label ("8 latents").
        is_insertion: True for a mark, False for text.
    """

    text: str
    is_insertion: bool = False


@dataclass(frozen=True)
class Sample:
    """An episode's text with its insertion points.

    Attributes:
        prompt: the question.
        segments: answers and observations, split at the insertion points.
        title: the item's name and its reward, for example.
    """

    prompt: str
    segments: Sequence[TextSegment]
    title: str = ""

    @property
    def answer(self) -> str:
        """The segments as one text, insertions marked as in `MARK`."""
        return _plain(self.segments)


def marked_trajectory(
    tokenizer: PreTrainedTokenizerBase, weaver: WeaverConfig, example: Example, trajectory: Trajectory
) -> Sample:
    """An episode's text, the agent's turns split at their insertion points.

    Args:
        tokenizer: the reasoner's tokenizer.
        weaver: tells how many latents an insertion of each kind has.
        example: the item.
        trajectory: the episode.
    """
    segments: list[TextSegment] = []
    read = 0
    for number, turn in enumerate(trajectory.turns):
        if number:
            segments.append(TextSegment(tokenizer.decode(turn.context[read:])))
        segments += _marked_turn(tokenizer, weaver, turn)
        read = len(turn.context) + len(turn.tokens)
    outcome = f"reward {trajectory.reward:g}" if trajectory.fault is None else f"failed: {trajectory.fault}"
    components = ", ".join(f"{name} {value:g}" for name, value in trajectory.parts.items())
    title = (
        f"{example.id}: {outcome}{f' ({components})' if components else ''}"
        f"{', truncated' if trajectory.truncated else ''}"
    )
    return Sample(example.question, segments, title)


def episode_row(sample: Sample, example: Example, trajectory: Trajectory) -> dict[str, Any]:
    """An episode as a row of a table: numbers to sort by, and its text with marks."""
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
        "answer": sample.answer,
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
        tokenizer: the reasoner's tokenizer.
        weaver: tells how many latents an insertion of each kind has.
        example: the item.
        trajectory: the episode.
        begin: start of the episode's batch, in nanoseconds since 1970.
        end: end of the batch, likewise.
        tags: further tags of the trace, such as split and step.
    """
    spans: list[TraceSpan] = []
    clock = begin
    total = max(1, trajectory.tokens)
    for number, turn in enumerate(trajectory.turns):
        read = [dict(message) for message in trajectory.prompt]
        if number:
            written = trajectory.turns[number - 1].text
            spans.append(TraceSpan("environment", "TOOL", clock, clock, written, turn.observation))
            read = [{"role": "user", "content": turn.observation}]
        until = clock + (end - begin) * len(turn.tokens) // total
        marked = _plain(_marked_turn(tokenizer, weaver, turn))
        spans.append(_turn_span(weaver, turn, f"turn {number + 1}", read, marked, clock, until))
        clock = until
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
            "times": "those of the batch, divided in proportion to tokens",
        },
    )
    return Trace(
        root=root,
        spans=tuple(spans),
        tags={"example": example.id, **tags},
        reward=None if trajectory.fault is not None else trajectory.reward,
    )


def _turn_span(
    weaver: WeaverConfig,
    turn: AgentTurn,
    name: str,
    read: Sequence[Mapping[str, Any]],
    marked: str,
    begin: int,
    end: int,
) -> TraceSpan:
    return TraceSpan(
        name=name,
        kind="CHAT_MODEL",
        begin=begin,
        end=end,
        # The format of chat models, so that MLflow shows the turn as a chat.
        inputs={"messages": read},
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


def _marked_turn(
    tokenizer: PreTrainedTokenizerBase, weaver: WeaverConfig, turn: AgentTurn
) -> list[TextSegment]:
    segments = []
    begin = 0
    for point, kind in turn.insertions:
        place = point - len(turn.context)
        if place > begin:
            segments.append(TextSegment(tokenizer.decode(turn.tokens[begin:place])))
        segments.append(TextSegment(f"{weaver.latents(InsertionKind(kind))} latents", is_insertion=True))
        begin = place
    segments.append(TextSegment(tokenizer.decode(turn.tokens[begin:])))
    return segments


def _plain(segments: Sequence[TextSegment]) -> str:
    return "".join(MARK.format(part.text) if part.is_insertion else part.text for part in segments)
