"""Advantages of episodes, and DAPO's punishment of overlong ones.

How the advantages differ from their sources:

- A standard deviation is that of the population, without an epsilon (the paper's trigger procedure, and DeepSeekMath);
  TRL takes the unbiased one plus 1e-4. A group without spread has advantage 0 instead.
- The advantage of GRPO is not divided by anything unless asked to (paper, Eq. 15).
- REINFORCE++ normalises over the tokens of the batch, as verl and OpenRLHF do, but these subtract the KL divergence from
  each token's reward; here it is a term of the loss (`PolicySettings.kl`), as in all other objectives.
"""

# E episodes

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen.objectives.policy_settings import PolicySettings, check_overlong

EQUAL_REWARDS = 1e-6
"""Rewards that differ by less than this share of the largest are equal: float32 rounding is no signal."""


@dataclass(frozen=True)
class Advantages:
    """The factor of each episode's tokens in the objective.

    Attributes:
        values: the advantages, 0 for episodes that are not valid.
        group_mean: mean reward of each episode's group.
        group_std: standard deviation of it (of the population).
        dead: True where an episode's group has no signal: equal rewards, or fewer than two valid episodes.
        groups: number of groups with a valid episode.
        dead_groups: how many of them are dead.
    """

    values: Float[Tensor, " episodes"]
    group_mean: Float[Tensor, " episodes"]
    group_std: Float[Tensor, " episodes"]
    dead: Bool[Tensor, " episodes"]
    groups: int
    dead_groups: int

    @property
    def dead_share(self) -> float:
        """Share of groups without a signal; 0 if there is no group."""
        return self.dead_groups / self.groups if self.groups else 0.0


def group_advantages(
    rewards: Float[Tensor, " episodes"],
    group: Int[Tensor, " episodes"],
    settings: PolicySettings,
    valid: Bool[Tensor, " episodes"] | None = None,
    tokens: Int[Tensor, " episodes"] | None = None,
) -> Advantages:
    """How much better each episode did than its baseline.

    Give it all episodes of a rollout, of every rank: groups may have any size and lie in any order, and batch
    statistics are those of the episodes given.

    Args:
        rewards: total reward of each episode.
        group: number of each episode's group (its prompt).
        settings: baseline, scale and leave-one-out.
        valid: False where an episode is left out of all means, with advantage 0; default: all are valid.
        tokens: trained tokens of each episode, over which reinforce_pp normalises; default: one each.
    """
    kept = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    r = torch.where(kept, rewards.detach(), 0.0).double()
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1 if index.numel() else 0

    def per_group(values: Tensor) -> Tensor:
        return values.new_zeros(groups).index_add(0, index, values)

    sizes = per_group(kept.double())
    mean = (per_group(r) / sizes.clamp(min=1))[index]
    centred = torch.where(kept, r - mean, 0.0)
    std = (per_group(centred.square()) / sizes.clamp(min=1)).sqrt()[index]
    dead_group = (sizes < 2) | _equal_in_group(r, kept, index, groups)
    dead = dead_group[index]
    std = torch.where(dead, 0.0, std)

    match settings.used_baseline:
        case "group":
            values = torch.where(dead, 0.0, centred)
            if settings.leave_one_out:
                values = values * (sizes / (sizes - 1).clamp(min=1))[index]
        case "batch":
            values = torch.where(kept, r - r.sum() / kept.sum().clamp(min=1), 0.0)
        case "none":
            values = r
    if settings.loss == "reinforce_pp":
        values = _whitened(values, kept, kept.long() if tokens is None else torch.where(kept, tokens, 0))
    else:
        values = _scaled(values, r, kept, std, dead, settings)
    present = sizes > 0
    return Advantages(
        values=torch.where(kept, values, 0.0).to(rewards.dtype),
        group_mean=mean.to(rewards.dtype),
        group_std=std.to(rewards.dtype),
        dead=dead,
        groups=int(present.sum()),
        dead_groups=int((dead_group & present).sum()),
    )


def overlong_penalty(
    lengths: Int[Tensor, " episodes"], max_length: int, buffer: int
) -> Float[Tensor, " episodes"]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), to be added to the reward.

    Args:
        lengths: tokens of each episode.
        max_length: length from which on the punishment is -1.
        buffer: it grows from 0 over this many tokens before.
    """
    check_overlong(max_length, buffer)
    return ((max_length - buffer - lengths).float() / buffer).clamp(-1.0, 0.0)


def _equal_in_group(r: Tensor, kept: Tensor, index: Tensor, groups: int) -> Tensor:
    """Whether the kept rewards of each group are equal."""
    # Equal rewards are found by their extremes: the mean of equal numbers need not be that number once rounded, and
    # dividing such residues by their own standard deviation would make advantages of 1 out of nothing.
    far = torch.full((groups,), math.inf, dtype=torch.float64, device=r.device)
    top = (-far).scatter_reduce(0, index, torch.where(kept, r, -math.inf), "amax")
    bottom = far.scatter_reduce(0, index, torch.where(kept, r, math.inf), "amin")
    level = torch.maximum(top.abs(), bottom.abs())
    return top - bottom <= EQUAL_REWARDS * level


def _scaled(
    values: Tensor, r: Tensor, kept: Tensor, std: Tensor, dead: Tensor, settings: PolicySettings
) -> Tensor:
    """The advantages divided as the settings say."""
    if settings.advantage_scale == "group":
        return torch.where(dead, 0.0, values / torch.where(dead, 1.0, std))
    if settings.advantage_scale == "batch":
        spread = _std(r, kept)
        return torch.where(spread > 0, values / torch.where(spread > 0, spread, 1.0), 0.0)
    return values


def _std(values: Tensor, kept: Tensor) -> Tensor:
    """Standard deviation of the kept values (of the population), exactly 0 if they are equal."""
    chosen = values[kept]
    if chosen.numel() < 2 or bool(chosen.amax() - chosen.amin() <= EQUAL_REWARDS * chosen.abs().amax()):
        return values.new_zeros(())
    return chosen.std(correction=0)


def _whitened(values: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
    """The values less their mean over tokens, by their standard deviation over tokens; 0 if they are equal."""
    trained = kept & (tokens > 0)
    if _std(values, trained) == 0:
        return torch.zeros_like(values)
    weight = tokens[trained].double() / tokens[trained].sum()
    chosen = values[trained]
    mean = (weight * chosen).sum()
    spread = (weight * (chosen - mean).square()).sum().sqrt()
    return torch.where(kept, (values - mean) / spread, 0.0)
