"""Advantages against plain Python numbers, and the punishment of overlong episodes."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memgen.objectives.advantages import group_advantages, overlong_penalty
from memgen.objectives.policy_settings import PolicySettings
from tolerance import assert_close


def plain_advantages(
    rewards: list[float], group: list[int], settings: PolicySettings, valid: list[bool] | None = None
) -> list[float]:
    """Each episode's advantage."""
    valid = [True] * len(rewards) if valid is None else valid
    everyone = [r for r, ok in zip(rewards, valid, strict=True) if ok]
    baseline = settings.baseline or {"reinforce": "none", "reinforce_pp": "batch"}.get(settings.loss, "group")
    advantages = []
    for i, reward in enumerate(rewards):
        if not valid[i]:
            advantages.append(0.0)
            continue
        mates = [rewards[j] for j in range(len(rewards)) if group[j] == group[i] and valid[j]]
        others = [rewards[j] for j in range(len(rewards)) if group[j] == group[i] and valid[j] and j != i]
        dead = min(mates) == max(mates)
        if baseline == "none":
            value = reward
        elif baseline == "batch":
            value = reward - statistics.fmean(everyone)
        elif dead:
            value = 0.0
        else:
            value = reward - statistics.fmean(others if settings.leave_one_out else mates)
        if settings.loss != "reinforce_pp" and settings.advantage_scale == "group":
            value = 0.0 if dead else value / statistics.pstdev(mates)
        elif settings.loss != "reinforce_pp" and settings.advantage_scale == "batch":
            spread = statistics.pstdev(everyone)
            value = value / spread if min(everyone) < max(everyone) else 0.0
        advantages.append(value)
    if settings.loss == "reinforce_pp":
        kept = [a for a, ok in zip(advantages, valid, strict=True) if ok]
        if min(kept) == max(kept):
            return [0.0] * len(rewards)
        mean, spread = statistics.fmean(kept), statistics.pstdev(kept)
        advantages = [(a - mean) / spread if ok else 0.0 for a, ok in zip(advantages, valid, strict=True)]
    return advantages


GROUPS = st.integers(1, 5).flatmap(
    lambda count: st.lists(
        st.tuples(st.integers(0, count - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0, -0.7, 3.0]), st.booleans()),
        min_size=1,
        max_size=14,
    )
)
ADVANTAGES = [
    {},
    {"advantage_scale": "group"},
    {"advantage_scale": "batch"},
    {"leave_one_out": True},
    {"leave_one_out": True, "advantage_scale": "group"},
    {"loss": "reinforce"},
    {"loss": "reinforce", "baseline": "batch"},
    {"loss": "reinforce", "baseline": "group", "advantage_scale": "group"},
    {"loss": "reinforce", "advantage_scale": "group"},
    {"loss": "reinforce_pp"},
    {"loss": "reinforce_pp", "baseline": "group"},
]


@pytest.mark.parametrize("options", ADVANTAGES, ids=str)
@hypothesis_settings(max_examples=40)
@given(episodes=GROUPS)
def test_advantages_equal_plain_numbers_for_groups_of_any_size_and_order(options, episodes):
    settings = PolicySettings(**options)
    group, rewards, valid = map(list, zip(*episodes, strict=True))
    if not any(valid):
        valid = [True] * len(valid)
    result = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), settings, torch.tensor(valid)
    )
    expected = torch.tensor(plain_advantages(rewards, group, settings, valid), dtype=torch.float64)
    assert_close("advantages", result.values, expected)


def example(settings: PolicySettings, valid: torch.Tensor | None = None):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.5, 0.7])
    return group_advantages(rewards, torch.tensor([4, 4, 4, 9, 9, 9, 2, 2]), settings, valid)


def test_advantages_add_up_to_zero_in_every_group():
    for scale in ("none", "group", "batch"):
        values = example(PolicySettings(advantage_scale=scale)).values
        for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
            assert abs(float(values[rows].sum())) < 1e-6


def test_leaving_one_out_stretches_the_centred_advantage_by_the_groups_size():
    centred = example(PolicySettings()).values
    stretched = example(PolicySettings(leave_one_out=True)).values
    factor = torch.tensor([1.5, 1.5, 1.5, 0.0, 0.0, 0.0, 2.0, 2.0])
    assert_close("advantages", stretched, factor * centred)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.0, -7.7, 1e6])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(scale, reward, size):
    rewards = torch.cat([torch.full((size,), reward), torch.tensor([0.0, 1.0])])
    group = torch.tensor([0] * size + [1, 1])
    result = group_advantages(rewards, group, PolicySettings(advantage_scale=scale))
    assert result.values[:size].tolist() == [0.0] * size
    assert result.dead.tolist() == [True] * size + [False, False]
    assert (result.groups, result.dead_groups, result.dead_share) == (2, 1, 0.5)
    assert float(result.values[-1]) > 0


def test_rounding_is_no_spread():
    rewards = torch.tensor([0.3, 0.1 + 0.2, 0.30000001, 1.0])
    result = group_advantages(rewards, torch.tensor([0, 0, 0, 1]), PolicySettings(advantage_scale="group"))
    assert result.values.tolist() == [0.0] * 4
    assert result.dead_share == 1.0


def test_scaling_by_the_group_gives_unit_variance_over_the_population():
    result = example(PolicySettings(advantage_scale="group"))
    assert_close("squares", result.values[:3].square().mean(), torch.tensor(1.0))
    assert_close("std", result.group_std, torch.tensor([(2 / 9) ** 0.5] * 3 + [0.0] * 3 + [0.1] * 2))
    assert_close("mean", result.group_mean, torch.tensor([1 / 3] * 3 + [0.1] * 3 + [0.6] * 2))


def test_episodes_that_are_not_valid_have_no_influence():
    valid = torch.tensor([True, True, False, True, False, False, True, True])
    result = example(PolicySettings(), valid)
    assert_close("advantages", result.values, torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0, 0.0, -0.1, 0.1]))
    assert result.dead.tolist() == [False, False, False, True, True, True, False, False]
    nothing = example(PolicySettings(advantage_scale="group"), torch.zeros(8, dtype=torch.bool))
    assert nothing.values.tolist() == [0.0] * 8
    assert (nothing.groups, nothing.dead_share) == (0, 0.0)


def test_a_reward_of_nan_does_not_leak_out_of_an_episode_that_is_not_valid():
    rewards = torch.tensor([torch.nan, 1.0, 0.0])
    result = group_advantages(
        rewards, torch.zeros(3, dtype=torch.int64), PolicySettings(), torch.tensor([False, True, True])
    )
    assert result.values.tolist() == [0.0, 0.5, -0.5]


def test_reinforce_takes_the_reward_itself_and_reinforce_plus_plus_the_batchs_normal_form():
    assert_close(
        "reinforce",
        example(PolicySettings(loss="reinforce")).values,
        torch.tensor([1.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.5, 0.7]),
    )
    values = example(PolicySettings(loss="reinforce_pp")).values
    assert abs(float(values.mean())) < 1e-6
    assert_close("variance", values.square().mean(), torch.tensor(1.0))
    equal = group_advantages(torch.full((3,), 0.1), torch.arange(3), PolicySettings(loss="reinforce_pp"))
    assert equal.values.tolist() == [0.0, 0.0, 0.0]


def test_the_overlong_punishment_grows_over_its_buffer():
    lengths = torch.tensor([0, 60, 70, 80, 95, 100, 101, 500])
    expected = torch.tensor([0.0, 0.0, 0.0, -1 / 3, -25 / 30, -1.0, -1.0, -1.0])
    assert_close("penalty", overlong_penalty(lengths, 100, 30), expected)


def test_reinforce_pp_whitens_over_tokens_as_verl_and_openrlhf_do():
    """Their `masked_whiten` of the rewards spread over (E, N) tokens, written out; an episode left out has no token."""
    rewards, lengths = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5]), torch.tensor([7, 2, 1, 4, 0])
    mask = torch.arange(7) < lengths[:, None]
    returns = (rewards[:, None] * mask).double()
    mean = returns.sum() / mask.sum()
    variance = ((returns - mean).square() * mask).sum() / mask.sum()
    expected = ((returns - mean) / variance.sqrt())[:4, 0].float()
    for baseline in (None, "batch", "none"):
        result = group_advantages(
            rewards, torch.zeros(5, dtype=torch.int64), PolicySettings(loss="reinforce_pp", baseline=baseline),
            valid=torch.tensor([True, True, True, True, False]), tokens=lengths,
        )  # fmt: skip
        torch.testing.assert_close(result.values[:4], expected)
        assert result.values[4] == 0
