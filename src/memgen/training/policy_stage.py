"""Reinforcement learning by policy gradients: roll out when it is time, then one update on a micro-batch of the rollout.

A stage of your own says which component it trains, what its trained units are, and what the policy says about them:
`component`, `units` and `score`; and, where it differs, `shape`, `reference_values` and `max_units`.
tests/training/test_own_stage.py has an example.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from memgen.data import PromptBatch
from memgen.distributed.collectives import objects_of_all_ranks, of_all_ranks, over_ranks, rank, world_size
from memgen.distributed.zero import whole_weights
from memgen.environments.base import Example
from memgen.generation.rollout import Actor, EpisodeSettings, Replay
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig
from memgen.objectives.advantages import Advantages, group_advantages
from memgen.objectives.policy_gradient import TokenScores, policy_loss
from memgen.objectives.policy_losses import loss_function
from memgen.objectives.policy_settings import PolicySettings
from memgen.tracking.episodes import marked_trajectory
from memgen.tracking.page import log_samples
from memgen.tracking.signals import Advice
from memgen.training.evaluation import SHOWN
from memgen.training.micro_batches import (
    FrozenCopy,
    MicroBatch,
    RolloutBuffer,
    UpdateSettings,
    split_into_micro_batches,
    with_focus,
)
from memgen.training.optimizer import OptimizerSettings
from memgen.training.playing import Episodes, local_groups, play
from memgen.training.policy_signals import UpdateSpeed, gradient_norm, rollout_metrics, update_metrics
from memgen.training.stage import Stage, require_context, zero_loss
from memgen.types import Trajectory

# E episodes, N trained units (tokens, or decisions) of an episode


@dataclass(frozen=True)
class Shaping:
    """Rewards that the advantages are made of.

    Attributes:
        rewards: of each episode of all ranks.
        metrics: to log, by name.
    """

    rewards: Float[Tensor, " episodes"]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


class PolicyStage(Stage):
    """Trains a component of the model by the rewards of its own episodes.

    Args:
        memgen: the model.
        optimizer: AdamW, warm-up and cosine.
        policy: the objective.
        update: how often a rollout is used.
        rollout: how training episodes are sampled; `group_size` of each item.
        generation: how answers are sampled in validation and test.
        episodes: limits of episodes of several turns.
        init_from: a checkpoint directory to start from (test, validate and predict: to score).
        checkpointing: recompute activations in the backward pass: less memory, more time.
        samples_every: rollouts between two pages of sample episodes in MLflow; 0: none.
        seed: of the rollouts; the Trainer's own seed is `seed_everything`.
    """

    learns_from = "rollouts"
    exact_kl: ClassVar[bool] = False
    """Whether `score` computes the divergence from the reference rather than the reference's log-probabilities."""

    def __init__(
        self,
        memgen: MemGenConfig,
        optimizer: OptimizerSettings,
        policy: PolicySettings,
        update: UpdateSettings,
        rollout: GenerationSettings,
        generation: GenerationSettings,
        episodes: EpisodeSettings,
        init_from: str | None,
        checkpointing: bool,
        samples_every: int,
        seed: int,
    ) -> None:
        super().__init__(memgen, optimizer, generation, episodes, init_from, checkpointing)
        loss_function(policy.loss)  # An unknown name is refused before anything is built.
        self.policy = policy
        self.update = update
        self.rollout = rollout
        self.samples_every = samples_every
        self.seed = seed
        self.advice = Advice()
        self.buffer: RolloutBuffer | None = None
        self.reference: FrozenCopy | None = None
        self.rollouts = 0
        self._speed = UpdateSpeed()
        self._loss = 0.0

    # What a stage says

    @abstractmethod
    def units(self, trajectory: Trajectory) -> int:
        """Trained units (tokens, or decisions) of an episode."""

    @abstractmethod
    def score(self, replay: Replay, *, entropy: bool, reference: Tensor | None) -> TokenScores:
        """Scores the units of a replay under the policy in training.

        Args:
            replay: the episodes as rows.
            entropy: whether the policy's entropy is wanted.
            reference: `reference_values` of the same replay; None without a KL penalty.
        """

    def reference_values(self, replay: Replay) -> Tensor:
        """What `score` needs of the reference policy, whose weights are in place; default: the log-probabilities."""
        return self.score(replay, entropy=False, reference=None).logprobs

    def max_units(self) -> int:
        """Most units that an episode can have."""
        return self.actor.max_turns * self.rollout.max_new_tokens

    def shape(self, episodes: Episodes) -> Shaping:
        """The rewards to train on, of all ranks' episodes; default: the environment's."""
        return Shaping(episodes.rewards)

    @override
    def check_context(self, stage: str) -> None:
        super().check_context(stage)
        if stage == "fit":
            require_context(self.memgen, self.data, "train", self.rollout.max_new_tokens, "rollout")

    # Training

    @property
    def actor(self) -> Actor:
        """The model as it plays training episodes."""
        return self.actor_with(self.rollout)

    @property
    def steps_per_rollout(self) -> int:
        """Training steps that one rollout serves."""
        accumulate: int = self.trainer.accumulate_grad_batches
        return self.update.optimizer_steps * accumulate

    @override
    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        place = batch.place
        # The same network rolls out and is updated: dropout would make two of it.
        self.memgen.eval()
        if self.buffer is None or not self.buffer.serves(place):
            if place.part:
                raise RuntimeError(
                    f"step {place.part} of a rollout comes before its first; the checkpoint to resume from is broken"
                )
            self._log_speed()
            with whole_weights(self.trainer):
                self.buffer = self._roll_out(batch)
        micro_batch = self.buffer.micro_batch(place)
        self._speed.begin(micro_batch.trajectories)
        return self._update(micro_batch, rollout_weights=place.part < self.trainer.accumulate_grad_batches)

    def _roll_out(self, batch: PromptBatch) -> RolloutBuffer:
        if self.policy.kl > 0 and self.update.reference == "start" and self.reference is None:
            self.reference = FrozenCopy(self.trained())
        rollouts, examples = play(
            self.actor,
            batch,
            self.data.items["train"],
            self.seed,
            self.update.dynamic_sampling,
            lambda played: self._judge(played)[1].dead,
            keep_latents=self._is_logged(self.update.optimizer_steps),
        )
        trajectories = rollouts.trajectories
        shaping, advantages = self._judge(trajectories)
        micro_batches = self._with_earlier_policies(self._split(trajectories, advantages))
        metrics = rollout_metrics(rollouts, self.memgen) | dict(shaping.metrics)
        metrics["rollout/dead_groups"] = advantages.dead_share
        self._log_rollout(metrics, teaches=bool(advantages.values.any()))
        self._log_samples(examples, trajectories)
        self.rollouts += 1
        return RolloutBuffer(batch.place, micro_batches)

    def _judge(self, trajectories: Sequence[Trajectory]) -> tuple[Shaping, Advantages]:
        """The rewards to train on and the advantages of all ranks' episodes. All ranks must call it."""
        episodes = Episodes.gather(trajectories, self.rollout.group_size)
        shaping = self.shape(episodes)
        units = of_all_ranks(torch.tensor(self._units(trajectories)))
        return shaping, group_advantages(shaping.rewards, episodes.group, self.policy, episodes.valid, units)

    def _units(self, trajectories: Sequence[Trajectory]) -> list[int]:
        """Trained units of each episode, 0 of one that is left out."""
        return [0 if self._left_out(trajectory) else self.units(trajectory) for trajectory in trajectories]

    def _split(self, trajectories: Sequence[Trajectory], advantages: Advantages) -> list[MicroBatch]:
        count = len(trajectories)
        begin = rank() * count
        return split_into_micro_batches(
            trajectories,
            local_groups(count, self.rollout.group_size),
            advantages.values[begin : begin + count],
            self._units(trajectories),
            self.update,
            self.trainer.accumulate_grad_batches,
            self.max_units(),
        )

    def _left_out(self, trajectory: Trajectory) -> bool:
        return trajectory.fault is not None or (self.policy.mask_truncated and trajectory.truncated)

    @torch.no_grad()
    def _with_earlier_policies(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Adds the log-probabilities of the rollout's weights and the reference's values, where later steps need them."""
        several = self.update.optimizer_steps > 1
        focuses = self.policy.top_entropy < 1
        if several or focuses:
            scores = [self._score(micro_batch, entropy=focuses) for micro_batch in micro_batches]
            if several:
                micro_batches = [
                    one if scored is None else dataclasses.replace(one, old=scored.logprobs.detach().cpu())
                    for one, scored in zip(micro_batches, scores, strict=True)
                ]
            if focuses:
                accumulate: int = self.trainer.accumulate_grad_batches
                micro_batches = with_focus(micro_batches, scores, self.policy.top_entropy, accumulate)
        if self.policy.kl > 0:
            copy = self.reference if self.update.reference == "start" else FrozenCopy(self.trained())
            assert copy is not None, "made before the first rollout"
            with copy.applied(self.trained()):
                micro_batches = [self._with_reference(micro_batch) for micro_batch in micro_batches]
        return micro_batches

    def _with_reference(self, micro_batch: MicroBatch) -> MicroBatch:
        replay = self._replay(micro_batch)
        if replay is None:
            return micro_batch
        return dataclasses.replace(micro_batch, reference=self.reference_values(replay).detach().cpu())

    def _replay(self, micro_batch: MicroBatch) -> Replay | None:
        return micro_batch.replay(keep_turn_latents=self.memgen.boundaries.config.keep_turn_latents)

    def _score(self, micro_batch: MicroBatch, *, entropy: bool) -> TokenScores | None:
        replay = self._replay(micro_batch)
        if replay is None:
            return None
        scores = self.score(replay, entropy=entropy, reference=micro_batch.reference)
        if self.policy.mask_truncated:
            kept = scores.mask & ~micro_batch.truncated[:, None].to(scores.mask.device)
            scores = dataclasses.replace(scores, mask=kept)
        return scores

    def _update(self, micro_batch: MicroBatch, *, rollout_weights: bool) -> Tensor:
        entropy = self.policy.entropy_bonus > 0 or self._is_logged(1)
        zero = zero_loss(self.trained().values())
        scores = self._score(micro_batch, entropy=entropy)
        focus = micro_batch.focus
        if scores is None:
            scores = self._no_scores(len(micro_batch.trajectories), zero, entropy=entropy)
            focus = scores.mask
        assert focus is not None or self.policy.top_entropy == 1, "found when the rollout was split"
        device, old = scores.logprobs.device, micro_batch.old
        result = policy_loss(
            scores,
            scores.logprobs.detach() if old is None else old.to(device),
            micro_batch.advantages.to(device),
            self.policy,
            micro_batch.totals,
            focus=None if focus is None else focus.to(device),
        )
        self._loss = float(result.loss.detach())
        self._log_update(result.stats, rollout_weights=rollout_weights)
        return result.loss + zero

    def _no_scores(self, episodes: int, zero: Tensor, *, entropy: bool) -> TokenScores:
        """Scores of no unit at all, with a graph."""
        values = zero.float().expand(episodes, 0)
        kl = self.policy.kl > 0
        return TokenScores(
            logprobs=values,
            mask=torch.zeros(episodes, 0, dtype=torch.bool, device=values.device),
            entropy=values if entropy else None,
            rollout_logprobs=values.detach(),
            reference_logprobs=values.detach() if kl and not self.exact_kl else None,
            exact_kl=values.detach() if kl and self.exact_kl else None,
        )

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norm = gradient_norm(self.trained().values())
        if norm is not None:
            self.log("train/gradient_norm", norm)
            self.advice.on_update(self._loss, norm, first_pass=self.update.optimizer_steps == 1)

    @override
    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        self._speed.end()

    # Signals

    def _is_logged(self, steps: int) -> bool:
        """Whether the Trainer hands metrics to its loggers within so many optimizer steps from here."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        now = self.trainer.global_step
        return every > 0 and (now + steps) // every > now // every

    def _log_rollout(self, metrics: dict[str, float], *, teaches: bool) -> None:
        self.log_dict(metrics)
        self.log("reward", metrics.get("rollout/reward", float("nan")), prog_bar=True, logger=False)
        greedy = self.rollout.temperature == 0 and not self.rollout.sample_decisions
        self.advice.on_rollout(metrics, teaches=teaches, greedy=greedy)
        if self.component is self.memgen.trigger:
            self.advice.on_decisions(metrics.get("trigger/invocation_rate"))

    def _log_samples(self, examples: Sequence[Example], trajectories: Sequence[Trajectory]) -> None:
        if not self.samples_every or self.rollouts % self.samples_every or not self.trainer.is_global_zero:
            return
        size = self.rollout.group_size
        samples = [
            marked_trajectory(self.tokenizer, self.memgen.weaver.config, examples[index // size], trajectory)
            for index, trajectory in enumerate(trajectories[:SHOWN])
        ]
        log_samples(self.trainer.loggers, samples, f"rollout_step_{self.global_step:06d}")

    def _log_update(self, stats: dict[str, Tensor], *, rollout_weights: bool) -> None:
        metrics = update_metrics(stats, rollout_weights=rollout_weights)
        loss = over_ranks(torch.tensor(self._loss, dtype=torch.float64), "sum")
        self.log("train/loss", float(loss) / world_size(), prog_bar=True)
        self.log_dict(metrics)

    def _log_speed(self) -> None:
        speed = self._speed.read()
        if speed is not None:
            self.log("perf/update_tokens_per_second", speed)

    # Lightning's own checkpoint

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        buffers = objects_of_all_ranks(None if self.buffer is None else self.buffer.state_dict())
        checkpoint["rollout_cycle"] = {
            "buffers": buffers,
            "rollouts": self.rollouts,
            "reference": None if self.reference is None else self.reference.tensors,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "rollout_cycle" not in checkpoint:
            raise ValueError(
                f"the .ckpt was not written by {type(self).__name__}: it has no rollout; start from its weights instead: "
                "--checkpoint RUN/last"
            )
        state = checkpoint["rollout_cycle"]
        buffers = state["buffers"]
        if len(buffers) != world_size():
            raise ValueError(
                f"the checkpoint was written by {len(buffers)} ranks; resume with as many, or start a new run from its "
                "weights (--checkpoint)"
            )
        mine = buffers[rank()]
        self.buffer = None if mine is None else RolloutBuffer.from_state_dict(mine)
        self.rollouts = int(state["rollouts"])
        if state["reference"] is not None:
            self.reference = FrozenCopy(self.trained())
            self.reference.tensors = {name: tensor.clone() for name, tensor in state["reference"].items()}
