"""A rollout split into the micro-batches that train on it.

A reinforcement stage's training steps come in cycles. The first step of a cycle rolls out; all of them train on that
rollout: `iterations` passes over it, each in `minibatches` optimizer steps, each of them in as many micro-batches as the
Trainer accumulates. Every rank takes the same steps and takes part in every collective, whatever its episodes were like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memgen.data import PromptIndex
from memgen.distributed.collectives import over_ranks, ragged_of_all_ranks, world_size
from memgen.generation.rollout import Replay, replay
from memgen.objectives.policy_gradient import TokenScores, entropy_threshold
from memgen.objectives.policy_losses import StepTotals
from memgen.types import AgentTurn, RowWork, Trajectory

# E episodes of a micro-batch, N trained units (tokens, or decisions) of an episode


@dataclass(frozen=True)
class UpdateSettings:
    """How often a rollout is used."""

    iterations: int = 1
    """Passes over a rollout (mu in GRPO)."""
    minibatches: int = 1
    """Optimizer steps of a pass."""
    dynamic_sampling: int = 0
    """Rounds in which groups whose rewards are all equal are replaced by those of other items (DAPO). 0: none is."""
    reference: Literal["start", "rollout"] = "start"
    """The reference policy of a KL penalty: the weights that training began with, or those that rolled out (the
    trigger's KL in REV)."""

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("minibatches", 1), ("dynamic_sampling", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"update.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of a cycle."""
        return self.iterations * self.minibatches


@dataclass(frozen=True)
class MicroBatch:
    """The episodes that one training step learns from.

    Attributes:
        trajectories: the episodes.
        groups: a number for each; those of one number began with the same prompt.
        advantages: of each, float32 (E,).
        totals: of the whole optimizer step, over its micro-batches and ranks.
        old: log-probabilities under the weights of the rollout, float32 (E, N); None if those are the step's own.
        reference: values of the reference policy, in the stage's layout (see `PolicyStage.reference_values`); None
            without a KL penalty.
        focus: True at the units whose surrogate is trained, bool (E, N); None: all.
    """

    trajectories: list[Trajectory]
    groups: list[int]
    advantages: Float[Tensor, " episodes"]
    totals: StepTotals
    old: Tensor | None = None
    reference: Tensor | None = None
    focus: Tensor | None = None

    def replay(self, *, keep_turn_latents: bool) -> Replay | None:
        """The episodes as rows; None if the environment failed in all of them."""
        return replay(self.trajectories, self.groups, keep_turn_latents=keep_turn_latents)

    @property
    def truncated(self) -> Bool[Tensor, " episodes"]:
        """True at the episodes that were truncated."""
        return torch.tensor([trajectory.truncated for trajectory in self.trajectories])

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, under the names that .ckpt files have had from the first release on."""
        state = dataclasses.asdict(self)
        totals = state.pop("totals")
        totals["parts"] = totals.pop("micro_batches")
        return state | {"window": totals}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MicroBatch:
        """The micro-batch that `state_dict` described."""
        state = dict(state)
        totals = dict(state.pop("window"))
        totals["micro_batches"] = totals.pop("parts")
        trajectories = []
        for trajectory in state["trajectories"]:
            turns = tuple(_turn(turn) for turn in trajectory["turns"])
            trajectories.append(Trajectory(**{**trajectory, "turns": turns}))
        return cls(**{**state, "trajectories": trajectories, "totals": StepTotals(**totals)})


def _turn(state: Mapping[str, Any]) -> AgentTurn:
    insertions = [(point, kind) for point, kind in state["insertions"]]
    return AgentTurn(**{**state, "insertions": insertions, "work": RowWork(**state.get("work", {}))})


@final
class RolloutBuffer:
    """One rank's rollout as the micro-batches of a cycle.

    Args:
        place: the training step that rolled out.
        micro_batches: those of a pass; a further pass takes them again.
    """

    def __init__(self, place: PromptIndex, micro_batches: Sequence[MicroBatch]) -> None:
        self.place = place
        self.micro_batches = list(micro_batches)

    def serves(self, place: PromptIndex) -> bool:
        """Whether a training step belongs to this cycle."""
        return (self.place.epoch, self.place.rollout) == (place.epoch, place.rollout)

    def micro_batch(self, place: PromptIndex) -> MicroBatch:
        """The micro-batch of a training step of this cycle."""
        return self.micro_batches[place.part % len(self.micro_batches)]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, as `torch.load(weights_only=True)` takes them."""
        return {
            "place": dataclasses.asdict(self.place),
            "parts": [micro_batch.state_dict() for micro_batch in self.micro_batches],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RolloutBuffer:
        """The buffer that `state_dict` described."""
        place = PromptIndex(**{**state["place"], "indices": tuple(state["place"]["indices"])})
        return cls(place, [MicroBatch.from_state_dict(part) for part in state["parts"]])


def split_into_micro_batches(
    trajectories: Sequence[Trajectory],
    groups: Sequence[int],
    advantages: Float[Tensor, " episodes"],
    units: Sequence[int],
    update: UpdateSettings,
    accumulate: int,
    max_units: int,
) -> list[MicroBatch]:
    """Splits a rank's episodes into the micro-batches of a pass. All ranks must call it.

    Args:
        trajectories: the rank's episodes.
        groups: the group of each.
        advantages: of each.
        units: trained units of each, 0 for an episode that is left out.
        update: optimizer steps of a pass.
        accumulate: micro-batches of an optimizer step.
        max_units: most units that an episode can have.

    Raises:
        ValueError: if the episodes cannot be shared out evenly.
    """
    count = update.minibatches * accumulate
    if len(trajectories) % count:
        raise ValueError(
            f"{len(trajectories)} episodes per rank and rollout cannot be shared out evenly among update.minibatches "
            f"{update.minibatches} x trainer.accumulate_grad_batches {accumulate}; change these, data.batch_size or "
            "rollout.group_size"
        )
    size = len(trajectories) // count
    sums = torch.zeros(update.minibatches, 2, dtype=torch.float64)
    for index, amount in enumerate(units):
        sums[index // (size * accumulate)] += torch.tensor([float(amount), float(amount > 0)])
    ranks = world_size()
    totals = [
        StepTotals(
            tokens=int(tokens), episodes=int(episodes), micro_batches=accumulate * ranks, max_tokens=max_units
        )
        for tokens, episodes in over_ranks(sums, "sum").tolist()
    ]
    return [
        MicroBatch(
            trajectories=list(trajectories[begin : begin + size]),
            groups=list(groups[begin : begin + size]),
            advantages=advantages[begin : begin + size].cpu(),
            totals=totals[begin // (size * accumulate)],
        )
        for begin in range(0, len(trajectories), size)
    ]


def with_focus(
    micro_batches: Sequence[MicroBatch], scores: Sequence[TokenScores | None], share: float, accumulate: int
) -> list[MicroBatch]:
    """Marks in each micro-batch the units that belong to the given share of its optimizer step, by highest entropy.

    A threshold of each micro-batch's own would choose other units whenever the micro-batches or ranks change. All ranks
    must call it.

    Args:
        micro_batches: those of a pass.
        scores: of each micro-batch, with the entropy; None if it has no unit.
        share: how many to mark, in (0, 1].
        accumulate: micro-batches of an optimizer step.
    """
    marked = list(micro_batches)
    for begin in range(0, len(micro_batches), accumulate):
        step = range(begin, begin + accumulate)
        known = {
            index: (scored.entropy.cpu(), scored.mask.cpu())
            for index in step
            if (scored := scores[index]) is not None and scored.entropy is not None
        }
        own = torch.cat([torch.zeros(0), *(entropy[mask].float() for entropy, mask in known.values())])
        threshold = entropy_threshold(ragged_of_all_ranks(own), share)
        for index, (entropy, mask) in known.items():
            focus = mask & (entropy.float() >= threshold)
            marked[index] = dataclasses.replace(micro_batches[index], focus=focus)
    return marked


@final
class FrozenCopy:
    """Trained tensors as they were, to compute with again: the reference policy.

    Not "adapter off": that would be another policy than the one that training began with (TRL issue 3194).

    Args:
        parameters: the tensors to copy, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @contextmanager
    def applied(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Replaces the parameters' values by the copy for the block. No gradient flows meanwhile."""
        current = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            try:
                for name, parameter in parameters.items():
                    parameter.copy_(self.tensors[name])
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.copy_(current[name])
