"""What each answer cost: its share of the exact work counts of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memgen.model.memgen import MemGenModel
from memgen.types import AgentTurn, Decision, InsertionKind, Trajectory

# G answers to one prompt


@dataclass(frozen=True)
class Cost:
    """Positions that were read for one answer. What was read once for G answers counts a G-th for each.

    Attributes:
        reasoner: tokens and latents read by the reasoner.
        weaver: tokens, latents and queries read by the weaver.
        trigger: tokens read by a trigger with a pass of its own.
    """

    reasoner: float
    weaver: float
    trigger: float


def costs(model: MemGenModel, trajectories: Sequence[Trajectory], group_size: int) -> list[Cost]:
    """The cost of each trajectory of one rollout; they add up to the rollout's `WorkCount`.

    Args:
        model: who played.
        trajectories: all of the rollout, those of an item one behind the other.
        group_size: of them for each item.
    """
    groups = [trajectories[i : i + group_size] for i in range(0, len(trajectories), group_size)]
    # Prompts are read once for their group if that holds for every group of a rollout; later turns, for each answer.
    alike = all(
        member.turns and member.turns[0].context == group[0].turns[0].context
        for group in groups
        for member in group
        if group[0].turns
    )
    found = []
    for group in groups:
        together = [t.turns[0] for t in group if t.turns] if alike else []
        for trajectory in group:
            total = [0.0, 0.0, 0.0]
            earlier = 0
            for number, turn in enumerate(trajectory.turns):
                sharing = together if number == 0 and alike else [turn]
                for part, amount in enumerate(_turn(model, turn, sharing, earlier)):
                    total[part] += amount
                if model.boundaries.config.keep_turn_latents:
                    weaver = model.weaver.config
                    earlier += sum(weaver.latents(InsertionKind(kind)) for _, kind in turn.insertions)
            found.append(Cost(*total))
    return found


def _turn(
    model: MemGenModel, turn: AgentTurn, sharing: Sequence[AgentTurn], earlier: int
) -> tuple[float, float, float]:
    """Reasoner, weaver and trigger positions of a turn.

    Args:
        model: who wrote it.
        turn: what was written.
        sharing: the turns that were written behind one reading of the prompt, this one among them.
        earlier: latents of earlier turns in the prompt.
    """
    weaver = model.weaver.config
    latents, queries = weaver.inference_latents, weaver.prompt_latents
    woven = any(_at_prompt(other) for other in sharing)
    prompt = len(turn.context) + earlier
    inside = [point for point, kind in turn.insertions if kind == InsertionKind.INFERENCE]

    reasoner = (prompt + woven * queries) / len(sharing) + len(turn.tokens) - 1 + latents * len(inside)

    read = woven * (prompt + queries) / len(sharing)
    if inside:
        # Tokens and latents up to the last insertion, and the queries of each; the prompt if nothing was woven behind it.
        read += inside[-1] - len(turn.context) + latents * (len(inside) - 1) + latents * len(inside)
        read += queries if _at_prompt(turn) else 0
        read += 0 if woven else prompt

    trigger = 0.0
    if model.trigger.reads_text:
        at_prompt = bool(queries)
        asked = [i for i, decision in enumerate(turn.decisions) if i and decision != Decision.NOT_ASKED]
        trigger = len(turn.context) / len(sharing) if at_prompt else 0.0
        if asked:
            trigger += asked[-1] + (0 if at_prompt else len(turn.context))
    return reasoner, read, trigger


def _at_prompt(turn: AgentTurn) -> bool:
    return any(kind == InsertionKind.PROMPT for _, kind in turn.insertions)
