"""What lies between a rollout and the optimizer steps that it serves.

A stage's training steps come in cycles. The first step of a cycle rolls out; all of them train on what came of it:
`iterations` passes over it, each in `minibatches` optimizer steps, each of them in as many micro-batches as the Trainer
accumulates. Every rank takes the same steps and takes part in every collective, whatever its episodes were like.
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
from memgen.objectives.grpo import Window, entropy_threshold
from memgen.types import AgentTurn, Trajectory

# E episodes of a rank, W ranks


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
    """What a KL penalty is measured from: the weights that training began with, or those that rolled out (the
    trigger's KL in REV)."""

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("minibatches", 1), ("dynamic_sampling", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"update.{name} must be at least {least}, got {getattr(self, name)}")

    def steps(self, accumulate: int) -> int:
        """Training steps of a cycle."""
        return self.iterations * self.minibatches * accumulate


@dataclass(frozen=True)
class Part:
    """What one training step learns from: some of a rank's episodes.

    Attributes:
        trajectories: the episodes.
        groups: a number for each; those of one number began with the same prompt.
        advantages: of each, float32 (E,).
        window: what the whole optimizer step has, over its micro-batches and ranks.
        old: log-probabilities under the weights of the rollout, float32 (E, N); None if those are the step's own.
        reference: under the reference policy, float32 (E, N) (for a trigger: its logits); None without a penalty.
        focus: True at the units whose surrogate is trained, bool (E, N); None: all.
    """

    trajectories: list[Trajectory]
    groups: list[int]
    advantages: Float[Tensor, " episodes"]
    window: Window
    old: Tensor | None = None
    reference: Tensor | None = None
    focus: Tensor | None = None

    def replay(self, *, keep_turn_latents: bool) -> Replay | None:
        """The episodes as rows; None if the environment failed all of them."""
        return replay(self.trajectories, self.groups, keep_turn_latents=keep_turn_latents)

    @property
    def truncated(self) -> Bool[Tensor, " episodes"]:
        """Which episodes were cut."""
        return torch.tensor([trajectory.truncated for trajectory in self.trajectories])


@final
class RolloutBuffer:
    """One rank's rollout, cut into the parts of a cycle.

    Args:
        place: the training step that rolled out.
        parts: one for each micro-batch of a pass; a further pass takes them again.
    """

    def __init__(self, place: PromptIndex, parts: Sequence[Part]) -> None:
        self.place = place
        self.parts = list(parts)

    def serves(self, place: PromptIndex) -> bool:
        """Whether a training step belongs to this cycle."""
        return (self.place.epoch, self.place.rollout) == (place.epoch, place.rollout)

    def part(self, place: PromptIndex) -> Part:
        """What a training step of this cycle learns from."""
        return self.parts[place.part % len(self.parts)]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, as `torch.load(weights_only=True)` takes them."""
        return {"place": dataclasses.asdict(self.place), "parts": [dataclasses.asdict(p) for p in self.parts]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RolloutBuffer:
        """The buffer that `state_dict` described."""
        place = PromptIndex(**{**state["place"], "indices": tuple(state["place"]["indices"])})
        return cls(place, [_part(part) for part in state["parts"]])


def _part(state: Mapping[str, Any]) -> Part:
    trajectories = []
    for trajectory in state["trajectories"]:
        turns = [
            AgentTurn(**{**turn, "insertions": [(point, kind) for point, kind in turn["insertions"]]})
            for turn in trajectory["turns"]
        ]
        trajectories.append(Trajectory(**{**trajectory, "turns": tuple(turns)}))
    return Part(**{**state, "trajectories": trajectories, "window": Window(**state["window"])})


def cut(
    trajectories: Sequence[Trajectory],
    groups: Sequence[int],
    advantages: Float[Tensor, " episodes"],
    units: Sequence[int],
    update: UpdateSettings,
    accumulate: int,
    max_units: int,
) -> list[Part]:
    """Cuts a rank's episodes into the micro-batches of a pass. All ranks must call it.

    Args:
        trajectories: the rank's episodes.
        groups: the group of each.
        advantages: of each.
        units: trained tokens (or decisions) of each, 0 for an episode that is left out.
        update: optimizer steps of a pass.
        accumulate: micro-batches of an optimizer step.
        max_units: most of them that an episode can have.

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
    totals = torch.zeros(update.minibatches, 2, dtype=torch.float64)
    for index, amount in enumerate(units):
        step = index // (size * accumulate)
        totals[step] += torch.tensor([float(amount), float(amount > 0)])
    ranks = world_size()
    totals = over_ranks(totals, "sum")
    windows = [
        Window(tokens=int(tokens), episodes=int(episodes), parts=accumulate * ranks, max_tokens=max_units)
        for tokens, episodes in totals.tolist()
    ]
    return [
        Part(
            trajectories=list(trajectories[begin : begin + size]),
            groups=list(groups[begin : begin + size]),
            advantages=advantages[begin : begin + size].cpu(),
            window=windows[begin // (size * accumulate)],
        )
        for begin in range(0, len(trajectories), size)
    ]


def focused(
    parts: Sequence[Part], entropies: Sequence[tuple[Tensor, Tensor] | None], share: float, accumulate: int
) -> list[Part]:
    """Marks in each part the units that belong to the given share of its optimizer step, those of highest entropy.

    A threshold of each part's own would focus on other units whenever the micro-batches or ranks change. All ranks must
    call it.

    Args:
        parts: the micro-batches of a pass.
        entropies: of each part, what the policy's entropy is at each unit, (E, N), and where there is one, bool (E, N);
            None if it has no unit.
        share: how many to mark, in (0, 1].
        accumulate: micro-batches of an optimizer step.
    """
    marked = list(parts)
    for begin in range(0, len(parts), accumulate):
        step = range(begin, begin + accumulate)
        known = [found for index in step if (found := entropies[index]) is not None]
        own = torch.cat([torch.zeros(0), *(entropy[mask].float().cpu() for entropy, mask in known)])
        threshold = entropy_threshold(ragged_of_all_ranks(own), share)
        for index in step:
            found = entropies[index]
            if found is not None:
                entropy, mask = (tensor.cpu() for tensor in found)
                marked[index] = dataclasses.replace(parts[index], focus=mask & (entropy.float() >= threshold))
    return marked


@final
class FrozenCopy:
    """Trained tensors as they were, to compute with again: the reference policy.

    Not "adapter off": that would be another policy than the one that training began with (TRL issue 3194).

    Args:
        parameters: what to copy, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @contextmanager
    def applied(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Puts the copy in the place of the parameters for a while. No gradient flows meanwhile."""
        current = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            try:
                for name, parameter in parameters.items():
                    parameter.copy_(self.tensors[name])
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.copy_(current[name])
