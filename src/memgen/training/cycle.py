"""A reinforcement stage's training step: roll out when it is time, then one policy update on a part of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memgen.data import EnvironmentData, PromptBatch, PromptIndex
from memgen.distributed.collectives import (
    objects_of_all_ranks,
    of_all_ranks,
    over_ranks,
    rank,
    stats_over_ranks,
    world_size,
)
from memgen.distributed.zero import whole_weights
from memgen.environments.base import Example
from memgen.generation.rollout import Actor, Replay, Rollouts, rollout
from memgen.generation.sampling import seed_of
from memgen.model.memgen import MemGenModel
from memgen.objectives.grpo import (
    EQUAL_REWARDS,
    PolicySettings,
    group_advantages,
    policy_loss,
    read_stats,
)
from memgen.tracking.mlflow import log_samples
from memgen.tracking.samples import marked_trajectory
from memgen.tracking.signals import (
    Advice,
    latent_metrics,
    memory_metrics,
    rollout_means,
    rollout_sums,
    values_of_some,
)
from memgen.training.evaluation import SHOWN
from memgen.training.rollouts import FrozenCopy, Part, RolloutBuffer, UpdateSettings, cut, focused
from memgen.training.stage import tied_to_all
from memgen.types import Trajectory

# E episodes, M trained units (tokens, or decisions) of an episode


@dataclass(frozen=True)
class Scored:
    """What a policy says about the units of some episodes.

    Attributes:
        logprobs: log-probability of each, float32 (E, M), with its graph.
        mask: True where an episode has a unit that is trained, bool (E, M).
        recorded: the rollout's log-probabilities, float32 (E, M).
        entropy: of the policy at each, float32 (E, M); None if not asked for.
        reference: what a pass of the reference policy leaves for later: its values in any layout.
        reference_logprobs: of the reference policy, float32 (E, M).
        exact_kl: divergence from the reference at each, float32 (E, M), where it can be computed.
    """

    logprobs: Float[Tensor, "episodes units"]
    mask: Bool[Tensor, "episodes units"]
    recorded: Float[Tensor, "episodes units"]
    entropy: Float[Tensor, "episodes units"] | None = None
    reference: Tensor | None = None
    reference_logprobs: Float[Tensor, "episodes units"] | None = None
    exact_kl: Float[Tensor, "episodes units"] | None = None


@dataclass(frozen=True)
class Shaping:
    """Rewards as the objective sees them.

    Attributes:
        rewards: of each episode of all ranks.
        metrics: what to report about it.
    """

    rewards: Float[Tensor, " episodes"]
    metrics: dict[str, float]


class Learner(Protocol):
    """What a cycle asks of its stage, a LightningModule."""

    memgen: MemGenModel
    trainer: Any
    exact_kl: bool
    """Whether the divergence from the reference is computed rather than estimated."""

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""

    def log(self, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None) -> None:
        """Logs a metric."""

    def log_dict(self, dictionary: Mapping[str, Any]) -> None:
        """Logs metrics."""

    @property
    def actor(self) -> Actor:
        """Who rolls out."""

    @property
    def data(self) -> EnvironmentData:
        """The items."""

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""

    def units(self, trajectory: Trajectory) -> int:
        """How many units of an episode are trained."""

    def max_units(self) -> int:
        """The most that an episode can have."""

    def shape(
        self,
        rewards: Tensor,
        lengths: Tensor,
        invocations: Tensor,
        offered: Tensor,
        group: Tensor,
        valid: Tensor,
    ) -> Shaping:
        """Turns the rewards of all ranks' episodes into those that are trained on."""

    def score(self, replay: Replay, *, entropy: bool, reference: Tensor | None) -> Scored:
        """What the policy says about the units of a replay."""


@final
class RolloutCycle:
    """Rollouts and the updates that they serve.

    Args:
        policy: the objective.
        update: how often a rollout is used.
        seed: of the episodes' draws.
        samples_every: rollouts between two pages of sample episodes; 0: none.
    """

    def __init__(self, policy: PolicySettings, update: UpdateSettings, seed: int, samples_every: int) -> None:
        self.policy = policy
        self.update = update
        self.seed = seed
        self.samples_every = samples_every
        self.advice = Advice()
        self.buffer: RolloutBuffer | None = None
        self.reference: FrozenCopy | None = None
        self.rollouts = 0
        self._update_began: float | None = None
        self._update_seconds = 0.0
        self._update_tokens = 0
        self._loss = 0.0

    # Rolling out

    def step(self, stage: Learner, batch: PromptBatch) -> Tensor:
        """The loss of one training step.

        Args:
            stage: who trains.
            batch: the items, and where in the run this is.
        """
        place = batch.place
        # The same network rolls out and is updated: dropout would make two of it.
        stage.memgen.eval()
        if self.buffer is None or not self.buffer.serves(place):
            if place.part:
                raise RuntimeError(
                    f"step {place.part} of a rollout comes before its first; the checkpoint to resume from is broken"
                )
            self._log_update_speed(stage)
            with whole_weights(stage.trainer):
                self.buffer = self._roll_out(stage, batch)
        self._update_began = time.perf_counter()
        part = self.buffer.part(place)
        self._update_tokens += sum(trajectory.tokens for trajectory in part.trajectories)
        return self._update(stage, part, place)

    def on_step_end(self) -> None:
        """After a training step, its backward pass and its optimizer step: stops the clock of updates."""
        if self._update_began is not None:
            self._update_seconds += time.perf_counter() - self._update_began
            self._update_began = None

    def _roll_out(self, stage: Learner, batch: PromptBatch) -> RolloutBuffer:
        actor: Actor = stage.actor
        place = batch.place
        if self.policy.kl > 0 and self.update.reference == "start" and self.reference is None:
            self.reference = FrozenCopy(stage.trained())
        rollouts, examples = self._play(stage, batch)
        trajectories = rollouts.trajectories
        size = actor.generation.group_size
        groups = [rank() * 1_000_000 + index // size for index in range(len(trajectories))]

        valid = of_all_ranks(torch.tensor([t.fault is None for t in trajectories]).long()).bool()
        all_groups = of_all_ranks(torch.tensor(groups))
        rewards = of_all_ranks(torch.tensor([t.reward for t in trajectories]))
        shaping: Shaping = stage.shape(
            rewards,
            of_all_ranks(torch.tensor([t.tokens for t in trajectories])),
            of_all_ranks(torch.tensor([t.invocations for t in trajectories])),
            of_all_ranks(torch.tensor([t.offered for t in trajectories])),
            all_groups,
            valid,
        )
        advantages = group_advantages(shaping.rewards, all_groups, self.policy, valid)
        begin = rank() * len(trajectories)
        accumulate: int = stage.trainer.accumulate_grad_batches
        parts = cut(
            trajectories,
            groups,
            advantages.values[begin : begin + len(trajectories)],
            [self._units(stage, trajectory) for trajectory in trajectories],
            self.update,
            accumulate,
            stage.max_units(),
        )
        parts = self._with_earlier_policies(stage, parts)
        dead = group_advantages(rewards, all_groups, PolicySettings(), valid).dead_share
        teaches = bool(advantages.values.any())
        self._log_rollout(stage, rollouts, dead, shaping.metrics, teaches=teaches)
        self._log_samples(stage, examples, trajectories)
        self.rollouts += 1
        return RolloutBuffer(place, parts)

    def _units(self, stage: Learner, trajectory: Trajectory) -> int:
        left_out = trajectory.fault is not None or (self.policy.mask_truncated and trajectory.truncated)
        units: int = 0 if left_out else stage.units(trajectory)
        return units

    def _play(self, stage: Learner, batch: PromptBatch) -> tuple[Rollouts, list[Example]]:
        """Rolls out, and again with other items in place of groups that teach nothing, if the settings say so."""
        place = batch.place
        keep = self._is_logged(stage, self.update.iterations * self.update.minibatches)
        rollouts = self._episodes(stage.actor, batch.examples, place.indices, place, 0, keep_latents=keep)
        examples = list(batch.examples)
        size = stage.actor.generation.group_size
        for number in range(1, self.update.dynamic_sampling + 1):
            dead = [
                group
                for group in range(len(examples))
                if _equal(rollouts.trajectories[group * size : (group + 1) * size])
            ]
            if not dead:
                break
            items = stage.data.items["train"]
            random = np.random.default_rng((self.seed, place.epoch, place.rollout, rank(), number))
            indices = random.choice(len(items), len(dead), replace=len(items) < len(dead)).tolist()
            fresh = [items[index].example for index in indices]
            more = self._episodes(stage.actor, fresh, indices, place, number, keep_latents=keep)
            rollouts = _replaced(rollouts, more, dead, size)
            for group, example in zip(dead, fresh, strict=True):
                examples[group] = example
        return rollouts, examples

    def _episodes(
        self,
        actor: Actor,
        examples: Sequence[Example],
        indices: Sequence[int],
        place: PromptIndex,
        number: int,
        *,
        keep_latents: bool,
    ) -> Rollouts:
        seeds = [
            seed_of(self.seed, place.epoch, place.rollout, index, number, member)
            for index in indices
            for member in range(actor.generation.group_size)
        ]
        return rollout(actor, examples, seeds, keep_latents=keep_latents)

    @torch.no_grad()
    def _with_earlier_policies(self, stage: Learner, parts: list[Part]) -> list[Part]:
        """Adds what the rollout's weights and the reference's say, where a later step will ask for it."""
        several = self.update.iterations * self.update.minibatches > 1
        focuses = self.policy.top_entropy < 1
        if several or focuses:
            scores = [self._score(stage, part, entropy=focuses) for part in parts]
            if several:
                parts = [
                    part if scored is None else _with(part, old=scored.logprobs)
                    for part, scored in zip(parts, scores, strict=True)
                ]
            if focuses:
                entropies = [
                    None if scored is None or scored.entropy is None else (scored.entropy, scored.mask)
                    for scored in scores
                ]
                accumulate: int = stage.trainer.accumulate_grad_batches
                parts = focused(parts, entropies, self.policy.top_entropy, accumulate)
        if self.policy.kl > 0:
            copy = self.reference if self.update.reference == "start" else FrozenCopy(stage.trained())
            assert copy is not None, "made before the first rollout"
            with copy.applied(stage.trained()):
                parts = [
                    part
                    if (scored := self._score(stage, part)) is None
                    else _with(part, reference=scored.reference)
                    for part in parts
                ]
        return parts

    # Updates

    def _score(self, stage: Learner, part: Part, *, entropy: bool = False) -> Scored | None:
        replay = part.replay(keep_turn_latents=stage.memgen.boundaries.config.keep_turn_latents)
        if replay is None:
            return None
        scored: Scored = stage.score(replay, entropy=entropy, reference=part.reference)
        if self.policy.mask_truncated:
            kept = scored.mask & ~part.truncated[:, None].to(scored.mask.device)
            scored = dataclasses.replace(scored, mask=kept)
        return scored

    def _update(self, stage: Learner, part: Part, place: PromptIndex) -> Tensor:
        wants_entropy = self.policy.entropy_bonus > 0
        logs = self._is_logged(stage, 1)
        nothing = tied_to_all(stage.trained().values())
        scored = self._score(stage, part, entropy=wants_entropy or logs)
        focus = part.focus
        if scored is None:
            scored = _empty(
                len(part.trajectories),
                nothing,
                entropy=wants_entropy or logs,
                kl=self.policy.kl > 0,
                exact_kl=stage.exact_kl,
            )
            focus = scored.mask
        assert focus is not None or self.policy.top_entropy == 1, "found when the rollout was cut into parts"
        outcome = policy_loss(
            scored.logprobs,
            scored.logprobs.detach() if part.old is None else part.old.to(scored.logprobs.device),
            part.advantages.to(scored.logprobs.device),
            scored.mask,
            self.policy,
            part.window,
            reference_logprobs=scored.reference_logprobs,
            exact_kl=scored.exact_kl,
            entropy=scored.entropy,
            rollout_logprobs=scored.recorded,
            focus=None if focus is None else focus.to(scored.logprobs.device),
        )
        self._loss = float(outcome.loss.detach())
        self._log_step(stage, outcome.stats, place)
        return outcome.loss + nothing

    # Signals

    def _log_rollout(
        self,
        stage: Learner,
        rollouts: Rollouts,
        dead: float,
        shaped: Mapping[str, float],
        *,
        teaches: bool,
    ) -> None:
        weaver = stage.memgen.weaver.config
        sums = stats_over_ranks(rollout_sums(rollouts.trajectories, weaver))
        metrics = rollout_means(sums) | {"rollout/dead_groups": dead} | dict(shaped)
        metrics |= self._of_some(rollouts.trajectories)
        seconds = max(rollouts.seconds, 1e-9)
        metrics["perf/rollout_tokens_per_second"] = float(sums.get("tokens", torch.tensor(0.0))) / seconds
        metrics["perf/environment_seconds"] = rollouts.environment_seconds
        if rollouts.latents is not None:
            blocks = [block for row in rollouts.latents for block in row]
            metrics |= latent_metrics(blocks, stage.memgen.reasoner.backbone.embedding)
        metrics |= memory_metrics()
        stage.log_dict(metrics)
        stage.log("reward", metrics.get("rollout/reward", float("nan")), prog_bar=True, logger=False)
        drawn = stage.actor.generation
        greedy = drawn.temperature == 0 and not drawn.sample_decisions
        self.advice.on_rollout(metrics, teaches=teaches, greedy=greedy)
        if stage.memgen.trigger.own_parameters() and any(
            parameter.requires_grad for parameter in stage.memgen.trigger.parameters()
        ):
            self.advice.on_decisions(metrics.get("trigger/invocation_rate"))

    def _of_some(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Means and spreads of what only some episodes have, over all ranks: they may have seen other names."""
        mine = values_of_some(trajectories)
        names = sorted({name for found in objects_of_all_ranks(sorted(mine)) for name in found})
        if not names:
            return {}
        totals = [
            [sum(values), sum(v * v for v in values), float(len(values))]
            for values in (mine.get(name, []) for name in names)
        ]
        metrics: dict[str, float] = {}
        for name, (total, squares, count) in zip(
            names, over_ranks(torch.tensor(totals, dtype=torch.float64), "sum").tolist(), strict=True
        ):
            mean = total / count
            metrics |= {name: mean, f"{name}_std": max(0.0, squares / count - mean * mean) ** 0.5}
        return metrics

    def _is_logged(self, stage: Learner, steps: int) -> bool:
        """Whether the Trainer hands metrics to its loggers within so many optimizer steps from here."""
        every: int = stage.trainer.log_every_n_steps
        now: int = stage.trainer.global_step
        return every > 0 and (now + steps) // every > now // every

    def _log_samples(
        self, stage: Learner, examples: Sequence[Example], trajectories: Sequence[Trajectory]
    ) -> None:
        if not self.samples_every or self.rollouts % self.samples_every or not stage.trainer.is_global_zero:
            return
        actor: Actor = stage.actor
        size = actor.generation.group_size
        samples = [
            marked_trajectory(
                actor.tokenizer, stage.memgen.weaver.config, examples[index // size], trajectory
            )
            for index, trajectory in enumerate(trajectories[:SHOWN])
        ]
        log_samples(stage.trainer.loggers, samples, f"rollout_step_{stage.global_step:06d}")

    def _log_step(self, stage: Learner, stats: dict[str, Tensor], place: PromptIndex) -> None:
        values = read_stats(stats_over_ranks(stats))
        loss = over_ranks(torch.tensor(self._loss, dtype=torch.float64), "sum")
        stage.log("train/loss", float(loss) / world_size(), prog_bar=True)
        if "ratio" not in values:
            return
        same_weights = place.part < stage.trainer.accumulate_grad_batches
        drift = {name: values.pop(name) for name in ("drift", "drift_max") if name in values}
        if same_weights:
            # Later in a cycle the weights have moved, and the difference is no longer the engine's.
            stage.log_dict({f"rollout/logprob_{name}": value for name, value in drift.items()})
        for name in ("tokens", "episodes"):
            values.pop(name)
        stage.log_dict({f"train/{name}": value for name, value in values.items()})

    def _log_update_speed(self, stage: Learner) -> None:
        """Tokens a second of the updates since the last rollout, over all ranks: the agent's, observations not counted."""
        tokens = over_ranks(torch.tensor([float(self._update_tokens)], dtype=torch.float64), "sum")
        seconds = over_ranks(torch.tensor([self._update_seconds], dtype=torch.float64), "max")
        if seconds > 0:
            stage.log("perf/update_tokens_per_second", float(tokens / seconds))
        self._update_seconds, self._update_tokens = 0.0, 0

    def on_gradient(self, stage: Learner) -> None:
        """Before an optimizer step: logs the gradient's norm and explains a loss near 0."""
        grads = [p.grad for p in stage.trained().values() if p.grad is not None]
        if not grads:  # A strategy that keeps gradients to itself.
            return
        norm = float(torch.stack([grad.detach().float().norm() for grad in grads]).norm())
        stage.log("train/gradient_norm", norm)
        first = self.update.iterations * self.update.minibatches == 1
        self.advice.on_update(self._loss, norm, first_pass=first)

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the rollout in use and the reference. All ranks must call it."""
        buffers = objects_of_all_ranks(None if self.buffer is None else self.buffer.state_dict())
        return {
            "buffers": buffers,
            "rollouts": self.rollouts,
            "reference": None if self.reference is None else self.reference.tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any], trained: Mapping[str, nn.Parameter]) -> None:
        """Goes on from there.

        Raises:
            ValueError: if the run had another number of ranks.
        """
        buffers = state["buffers"]
        mine = rank()
        if len(buffers) != world_size():
            raise ValueError(
                f"the checkpoint was written by {len(buffers)} ranks; resume with as many, or start a new run from its "
                "weights (--checkpoint)"
            )
        self.buffer = None if buffers[mine] is None else RolloutBuffer.from_state_dict(buffers[mine])
        self.rollouts = int(state["rollouts"])
        if state["reference"] is not None:
            self.reference = FrozenCopy(trained)
            self.reference.tensors = {name: tensor.clone() for name, tensor in state["reference"].items()}


def _with(part: Part, *, old: Tensor | None = None, reference: Tensor | None = None) -> Part:
    return dataclasses.replace(
        part,
        old=part.old if old is None else old.detach().cpu(),
        reference=part.reference if reference is None else reference.detach().cpu(),
    )


def _equal(trajectories: Sequence[Trajectory]) -> bool:
    rewards = [t.reward for t in trajectories if t.fault is None]
    return len(rewards) < 2 or max(rewards) - min(rewards) <= EQUAL_REWARDS * max(map(abs, rewards))


def _replaced(rollouts: Rollouts, more: Rollouts, groups: Sequence[int], size: int) -> Rollouts:
    """The rollouts with some groups taken from others."""
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


def _empty(episodes: int, nothing: Tensor, *, entropy: bool, kl: bool, exact_kl: bool) -> Scored:
    """No unit at all, with a graph."""
    values = nothing.float().expand(episodes, 0)
    none = torch.zeros(episodes, 0, dtype=torch.bool, device=values.device)
    return Scored(
        logprobs=values,
        mask=none,
        recorded=values.detach(),
        entropy=values if entropy else None,
        reference_logprobs=values.detach() if kl and not exact_kl else None,
        exact_kl=values.detach() if kl and exact_kl else None,
    )
