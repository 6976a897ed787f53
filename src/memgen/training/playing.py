"""Rolling out for a training step: a rank's episodes, their rewards beside those of all ranks, dynamic sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen.data import Item, PromptBatch, PromptIndex
from memgen.distributed.collectives import of_all_ranks, rank
from memgen.environments.base import Example
from memgen.generation.rollout import Actor, Rollouts, rollout
from memgen.seeds import seed_of
from memgen.types import Trajectory

_GROUPS_PER_RANK = 1_000_000


@dataclass(frozen=True)
class Episodes:
    """Episodes of a rollout, of all ranks, one rank behind the other.

    Attributes:
        rewards: total reward of each, float32 (E,).
        tokens: that the agent wrote in each.
        invocations: of the weaver in each.
        offered: decisions that the trigger was asked for in each.
        group: a number for each; those of one number began with the same prompt.
        valid: False where the environment failed.
    """

    rewards: Float[Tensor, " episodes"]
    tokens: Int[Tensor, " episodes"]
    invocations: Int[Tensor, " episodes"]
    offered: Int[Tensor, " episodes"]
    group: Int[Tensor, " episodes"]
    valid: Bool[Tensor, " episodes"]

    @classmethod
    def gather(cls, trajectories: Sequence[Trajectory], group_size: int) -> Episodes:
        """Gathers the episodes of all ranks, of which every rank has equally many. All ranks must call it."""

        def gathered(values: list[int]) -> Tensor:
            return of_all_ranks(torch.tensor(values))

        return cls(
            rewards=of_all_ranks(torch.tensor([t.reward for t in trajectories])),
            tokens=gathered([t.tokens for t in trajectories]),
            invocations=gathered([t.invocations for t in trajectories]),
            offered=gathered([t.offered for t in trajectories]),
            group=gathered(local_groups(len(trajectories), group_size)),
            valid=gathered([int(t.fault is None) for t in trajectories]).bool(),
        )


def local_groups(episodes: int, group_size: int) -> list[int]:
    """The group of each of this rank's episodes; no two ranks have a group in common."""
    return [rank() * _GROUPS_PER_RANK + index // group_size for index in range(episodes)]


def play(
    actor: Actor,
    batch: PromptBatch,
    items: Sequence[Item],
    seed: int,
    dynamic_sampling: int,
    dead: Callable[[Sequence[Trajectory]], Bool[Tensor, " episodes"]],
    *,
    keep_latents: bool,
) -> tuple[Rollouts, list[Example]]:
    """Plays a group of episodes of each item, and of other items in place of dead groups. All ranks must call it.

    Args:
        actor: plays the episodes.
        batch: the items, and where in the run this is.
        items: all training items, to replace some.
        seed: of the episodes.
        dynamic_sampling: most rounds of replacement; 0: none.
        dead: given this rank's episodes, which episodes of all ranks belong to a group that teaches nothing, by the
            rewards that training uses. It is called on all ranks together.
        keep_latents: whether to return the inserted latents.

    Returns:
        The episodes, and the item of each group.
    """
    place = batch.place
    rollouts = _episodes(actor, batch.examples, place.indices, seed, place, 0, keep_latents=keep_latents)
    examples = list(batch.examples)
    size = actor.generation.group_size
    for number in range(1, dynamic_sampling + 1):
        everywhere = dead(rollouts.trajectories)
        if not bool(everywhere.any()):
            break
        begin = rank() * len(rollouts.trajectories)
        groups = [group for group in range(len(examples)) if everywhere[begin + group * size]]
        if not groups:
            continue
        random = np.random.default_rng((seed, place.epoch, place.rollout, rank(), number))
        indices = random.choice(len(items), len(groups), replace=len(items) < len(groups)).tolist()
        fresh = [items[index].example for index in indices]
        more = _episodes(actor, fresh, indices, seed, place, number, keep_latents=keep_latents)
        rollouts = _replaced(rollouts, more, groups, size)
        for group, example in zip(groups, fresh, strict=True):
            examples[group] = example
    return rollouts, examples


def _episodes(
    actor: Actor,
    examples: Sequence[Example],
    indices: Sequence[int],
    seed: int,
    place: PromptIndex,
    number: int,
    *,
    keep_latents: bool,
) -> Rollouts:
    seeds = [
        seed_of(seed, place.epoch, place.rollout, index, number, member)
        for index in indices
        for member in range(actor.generation.group_size)
    ]
    return rollout(actor, examples, seeds, keep_latents=keep_latents)


def _replaced(rollouts: Rollouts, more: Rollouts, groups: Sequence[int], size: int) -> Rollouts:
    """The rollouts with some groups replaced by others."""
    trajectories = list(rollouts.trajectories)
    latents = None if rollouts.latents is None else list(rollouts.latents)
    for number, group in enumerate(groups):
        here, there = slice(group * size, (group + 1) * size), slice(number * size, (number + 1) * size)
        trajectories[here] = more.trajectories[there]
        if latents is not None and more.latents is not None:
            latents[here] = more.latents[there]
    return Rollouts(
        trajectories=trajectories,
        latents=latents,
        work=rollouts.work,
        seconds=rollouts.seconds + more.seconds,
        environment_seconds=rollouts.environment_seconds + more.environment_seconds,
    )
