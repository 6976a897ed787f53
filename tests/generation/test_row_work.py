"""The work counted for each answer against a formula, and against the exact counts of the rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from memgen.chat import CHATML
from memgen.generation.rollout import Actor, EpisodeSettings, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenModel
from memgen.types import AgentTurn, Decision, InsertionKind, RowWork, Trajectory
from rl_runs import Countdown, Vowels
from tiny import byte_tokenizer, tiny_memgen

TOKENIZER = byte_tokenizer()


def played(environment, group_size, keep, **model):
    agent = tiny_memgen(cap=2, **model)
    agent.boundaries.config = dataclasses.replace(agent.boundaries.config, keep_turn_latents=keep)
    for token in range(60):  # Answers of unequal length.
        agent.reasoner.end_at(token)
    settings = GenerationSettings(
        max_new_tokens=9, temperature=1.0, group_size=group_size, sample_decisions=True
    )
    player = Actor(agent, TOKENIZER, environment, settings, EpisodeSettings(), CHATML)
    examples = environment.examples("train")[:3]
    return agent, rollout(player, examples, [7 * i for i in range(len(examples) * group_size)])


@pytest.mark.parametrize("environment", [Vowels(), Countdown((1, 2, 3))], ids=["one turn", "several turns"])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("keep", [False, True], ids=["latents of a turn", "latents of all turns"])
@pytest.mark.parametrize(
    "model",
    [
        {"trigger": "always"},
        {"trigger": "never"},
        {"trigger": "random"},
        {"trigger": "tokens"},
        {"trigger": "tokens", "prompt_latents": 0},
        {"trigger": "random", "prompt_latents": 0},
        {"trigger": "random", "inference_latents": 0},
        {"trigger": "hidden_states", "reads": "hidden_states"},
    ],
    ids=lambda model: " ".join(map(str, model.values())),
)
def test_the_work_of_answers_is_that_of_the_formula_and_adds_up_to_the_rollouts(
    environment, group_size, keep, model
):
    agent, rollouts = played(environment, group_size, keep, **model)
    expected = work_by_formula(agent, rollouts.trajectories, group_size)
    for name in ("reasoner", "weaver", "trigger"):
        found = [getattr(work, name) for work in (t.work for t in rollouts.trajectories)]
        assert found == pytest.approx([getattr(work, name) for work in expected])
        assert sum(found) == pytest.approx(getattr(rollouts.work, f"{name}_positions"))


def test_a_single_answer_to_a_prompt_has_whole_work():
    _, rollouts = played(Vowels(), 1, False)
    (turn,) = rollouts.trajectories[0].turns
    inside = len(turn.insertions) - 1
    assert rollouts.trajectories[0].work.reasoner == len(turn.context) + 3 + len(turn.tokens) - 1 + 2 * inside


# The formula


def work_by_formula(model: MemGenModel, trajectories: Sequence[Trajectory], group_size: int) -> list[RowWork]:
    """Each trajectory's work by formula, from what the trajectories say alone."""
    groups = [trajectories[i : i + group_size] for i in range(0, len(trajectories), group_size)]
    # A prompt is read once for its group if every group of the rollout begins with equal prompts; later turns are read for
    # each answer.
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
            found.append(RowWork(*total))
    return found


def _turn(
    model: MemGenModel, turn: AgentTurn, sharing: Sequence[AgentTurn], earlier: int
) -> tuple[float, float, float]:
    """Reasoner, weaver and trigger positions of a turn.

    `sharing` are the turns written after one reading of the prompt, this one among them; `earlier` counts the latents of
    earlier turns in the prompt.
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
        # A prompt is read once for its answers, as soon as one of them is asked.
        any_asked = any(d != Decision.NOT_ASKED for other in sharing for d in other.decisions[1:])
        trigger = len(turn.context) / len(sharing) if at_prompt or any_asked else 0.0
        if asked:
            trigger += asked[-1]
    return reasoner, read, trigger


def _at_prompt(turn: AgentTurn) -> bool:
    return any(kind == InsertionKind.PROMPT for _, kind in turn.insertions)
