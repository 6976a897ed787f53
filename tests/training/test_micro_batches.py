"""Rollouts split into micro-batches, and the form in which a .ckpt holds them."""

from __future__ import annotations

import pytest
import torch

from memgen.data import PromptIndex
from memgen.objectives.policy_losses import StepTotals
from memgen.training.micro_batches import RolloutBuffer, UpdateSettings, split_into_micro_batches
from memgen.types import AgentTurn, Trajectory


def episode(number: int, tokens: int) -> Trajectory:
    turn = AgentTurn(
        context=[1, 2],
        tokens=[3] * tokens,
        logprobs=[-0.5] * tokens,
        decisions=[1] * tokens,
        invoke_probs=[0.25] * tokens,
        insertions=[(2, 0)],
        finished=True,
    )
    return Trajectory(example=f"item-{number}", turns=(turn,), reward=float(number), parts={"right": 1.0})


def test_totals_are_those_of_an_optimizer_step_without_the_episodes_left_out():
    episodes = [episode(number, tokens) for number, tokens in enumerate([1, 2, 3, 4, 5, 6, 7, 8])]
    units = [1, 2, 0, 4, 5, 6, 7, 8]
    split = split_into_micro_batches(
        episodes, [0] * 4 + [1] * 4, torch.arange(8.0), units, UpdateSettings(minibatches=2), 2, max_units=9
    )
    assert [one.advantages.tolist() for one in split] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    first, second = StepTotals(7, 3, 2, 9), StepTotals(26, 4, 2, 9)
    assert [one.totals for one in split] == [first, first, second, second]
    with pytest.raises(ValueError, match="8 episodes per rank and rollout cannot be shared out evenly"):
        split_into_micro_batches(
            episodes, [0] * 8, torch.arange(8.0), units, UpdateSettings(minibatches=3), 1, max_units=9
        )


def test_a_ckpt_of_the_first_release_is_read():
    turn = vars(episode(0, 2).turns[0]) | {"insertions": [[2, 0]]}
    for name in ("text", "observation", "work"):  # The first release did not keep them.
        turn.pop(name, None)
    trajectory = {
        "example": "item-0",
        "turns": [turn],
        "reward": 0.0,
        "parts": {"right": 1.0},
        "truncated": False,
        "fault": None,
    }
    micro_batch = {
        "trajectories": [trajectory],
        "groups": [0],
        "advantages": torch.tensor([0.5]),
        "window": {"tokens": 2, "episodes": 1, "parts": 4, "max_tokens": 9},
        "old": None,
        "reference": None,
        "focus": None,
    }
    place = {"indices": [0], "epoch": 1, "rollout": 2, "part": 0}
    buffer = RolloutBuffer.from_state_dict({"place": place, "parts": [micro_batch]})
    assert buffer.place == PromptIndex((0,), 1, 2, 0)
    (one,) = buffer.micro_batches
    assert one.trajectories[0].turns == episode(0, 2).turns
    assert one.totals == StepTotals(tokens=2, episodes=1, micro_batches=4, max_tokens=9)
    state = buffer.state_dict()
    assert set(state["parts"][0]) == set(micro_batch)
    assert state["parts"][0]["window"] == micro_batch["window"]
