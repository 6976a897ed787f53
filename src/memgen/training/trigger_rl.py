"""Stage 2: the trigger learns when to invoke, weaver and reasoner frozen (paper, Eq. 8-9; REV, Eq. 17-20).

Differs from the released code, whose trigger trainer cannot generate and has no penalty: (1) rewards carry the
reward-adaptive penalty on invocations; (2) every boundary at which the trigger was asked is a decision, the prompt's end
included; (3) the weaver must have been trained; (4) episodes of several turns are trained like answers; (5) the KL
divergence from the reference is exact, both outcomes of a decision being known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from memgen.data import EnvironmentData, EvalBatch, PromptBatch, no_assets
from memgen.generation.rollout import Actor, EpisodeSettings, Replay
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.objectives.grpo import PolicySettings
from memgen.objectives.trigger import (
    TriggerSettings,
    decision_entropy,
    decision_kl,
    decision_logprobs,
    shaped_rewards,
)
from memgen.training.checkpoint import keep_trained, require_trained
from memgen.training.cycle import RolloutCycle, Scored, Shaping
from memgen.training.evaluation import Evaluation
from memgen.training.optimizer import OptimizerSettings
from memgen.training.rollouts import UpdateSettings
from memgen.training.stage import build_model, stage_data
from memgen.types import Trajectory

logger = logging.getLogger(__name__)

INSERTION_COST = 0.01
"""What an insertion costs in `val/net_reward`, by which the best checkpoint is chosen."""


@final
class TriggerRL(LightningModule):
    """Trains a trigger by reinforcement.

    Args:
        memgen: the model; `trigger.kind` is tokens or hidden_states.
        optimizer: AdamW, warm-up and cosine.
        objective: what invocations cost.
        policy: the surrogate; a decision stands for a token.
        update: how often a rollout is used.
        rollout: how training episodes are drawn; `group_size` of each item. Decisions are drawn, tokens need not be.
        generation: how answers are drawn in validation and test.
        episodes: limits of episodes of several turns.
        init_from: a checkpoint directory with a trained weaver (test, validate and predict: to score).
        allow_untrained_weaver: start although the weaver was never trained.
        checkpointing: recompute activations in the backward pass: less memory, more time.
        samples_every: rollouts between two pages of sample episodes in MLflow; 0: none.
        seed: of the rollouts' draws; the Trainer's own seed is `seed_everything`.
    """

    exact_kl = True

    def __init__(
        self,
        memgen: MemGenConfig,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 - a frozen record
        objective: TriggerSettings = TriggerSettings(),  # noqa: B008 - a frozen record
        policy: PolicySettings = PolicySettings(),  # noqa: B008 - a frozen record
        update: UpdateSettings = UpdateSettings(),  # noqa: B008 - a frozen record
        rollout: GenerationSettings = GenerationSettings(group_size=8, sample_decisions=True),  # noqa: B008
        generation: GenerationSettings = GenerationSettings(),  # noqa: B008 - a frozen record
        episodes: EpisodeSettings = EpisodeSettings(),  # noqa: B008 - a frozen record
        init_from: str | None = None,
        allow_untrained_weaver: bool = False,
        checkpointing: bool = False,
        samples_every: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not memgen.trigger.learned:
            raise ValueError(
                f"trigger.kind {memgen.trigger.kind!r} has nothing to learn; set model.memgen.trigger.kind to tokens or "
                "hidden_states"
            )
        if not rollout.sample_decisions:
            raise ValueError(
                "rollout.sample_decisions is false, so the trigger would never try another decision; set it to true"
            )
        if policy.overlong_length is not None:
            raise ValueError(
                "policy.overlong_length punishes long answers, which are not the trigger's; set it to null"
            )
        self.config = memgen
        self.optimizer_settings = optimizer
        self.objective = objective
        self.rollout = rollout
        self.generation = generation
        self.episodes = episodes
        self.init_from = init_from
        self.allow_untrained_weaver = allow_untrained_weaver
        self.recompute = checkpointing
        self.resolve_asset: Callable[[str], str] = no_assets
        # A .ckpt holds what is trained; the frozen base is loaded from where it came.
        self.strict_loading = False
        self.memgen: MemGenModel
        self.cycle = RolloutCycle(policy, update, seed, samples_every)
        self.evaluation = Evaluation(memgen.weaver)

    # Set-up

    @override
    def setup(self, stage: str) -> None:
        if not hasattr(self, "memgen"):
            data = stage_data(self, "rollouts" if stage == "fit" else None)
            self.memgen = build_model(self.config, data, self.resolve_asset, self.init_from)
            if stage == "fit":
                self._require_trained_weaver()
        self.memgen.train_only(self.memgen.trigger)
        self.memgen.use_checkpointing(self.recompute)
        self.data.steps_per_rollout = self.cycle.update.steps(self.trainer.accumulate_grad_batches)

    def _require_trained_weaver(self) -> None:
        """A trigger that learns from what an untrained weaver does would learn never to invoke."""
        if self.allow_untrained_weaver or not self.memgen.weaver.is_untrained():
            return
        start = (
            "no checkpoint was given"
            if self.init_from is None
            else f"the one of {self.init_from} is untouched"
        )
        raise ValueError(
            f"the weaver is untrained ({start}), so no decision of the trigger can be right; train it first (memgen fit "
            "--config conf/weaver_sft.yaml) and give its checkpoint (--checkpoint DIR), or set "
            "model.allow_untrained_weaver to true"
        )

    @property
    def data(self) -> EnvironmentData:
        """The Trainer's data module."""
        return stage_data(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reasoner's."""
        return self.data.tokenizer_object

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_settings.build(list(self.trained().values()), self.data.optimizer_steps())

    # What the cycle asks for

    @property
    def actor(self) -> Actor:
        """Who rolls out."""
        return self._actor(self.rollout)

    def _actor(self, settings: GenerationSettings) -> Actor:
        data = self.data
        return Actor(self.memgen, self.tokenizer, data.environment, settings, self.episodes, data.template)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trigger's tensors."""
        return self.memgen.trigger.own_parameters()

    def units(self, trajectory: Trajectory) -> int:
        """Decisions that were offered."""
        return trajectory.offered

    def max_units(self) -> int:
        """Most decisions that an episode can have: every prompt's end, and every token but a turn's last."""
        return self.actor.max_turns * self.rollout.max_new_tokens

    def shape(
        self,
        rewards: Tensor,
        lengths: Tensor,
        invocations: Tensor,
        offered: Tensor,
        group: Tensor,
        valid: Tensor,
    ) -> Shaping:
        """Rewards less the penalty on invocations."""
        shaped = shaped_rewards(rewards, invocations, offered, group, self.objective, valid)
        metrics = {
            "trigger/p_bar": float(shaped.p_bar[valid].mean()) if bool(valid.any()) else float("nan"),
            "trigger/penalty": float(shaped.penalty[valid].mean()) if bool(valid.any()) else float("nan"),
        }
        return Shaping(shaped.rewards, metrics)

    def score(self, replay: Replay, *, entropy: bool, reference: Tensor | None) -> Scored:
        """Log-probabilities of the decisions."""
        logits = self.memgen.decision_logits(replay.batch, replay.plan, replay.at)  # (M, 2)
        device = logits.device
        mask = replay.decided.to(device)
        decisions = replay.decisions.to(device)
        probs = replay.invoke_probs.to(device)
        # Greatest care at 0 and 1: what was drawn had a probability above 0.
        chosen = torch.where(decisions.bool(), probs, 1.0 - probs).clamp(min=torch.finfo(probs.dtype).tiny)
        return Scored(
            logprobs=replay.by_episode(decision_logprobs(logits, decisions[mask]), mask),
            mask=mask,
            recorded=torch.where(mask, chosen.log(), 0.0),
            entropy=replay.by_episode(decision_entropy(logits), mask) if entropy else None,
            reference=logits.detach(),
            exact_kl=None
            if reference is None
            else replay.by_episode(decision_kl(logits, reference.to(device)), mask),
        )

    # Training and evaluation

    @override
    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        return self.cycle.step(self, batch)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.cycle.on_gradient(self)

    @override
    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        self.cycle.on_step_end()

    @override
    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluation.update(self._actor(self.generation), batch)

    @override
    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluation.update(self._actor(self.generation), batch)

    @override
    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[dict[str, Any]]:
        return self.evaluation.records(self._actor(self.generation), batch)

    @override
    def on_validation_epoch_end(self) -> None:
        means = self.evaluation.finish(self, "val", f"step_{self.global_step:06d}")
        # What is best by rewards alone would pay any number of insertions for one item more. Training's own penalty would
        # refuse those that success needs: greedy answers do not show which these are.
        cost = INSERTION_COST * means["insertions_per_answer"]
        self.log("val/net_reward", means["reward"] - cost, sync_dist=True)

    @override
    def on_test_epoch_end(self) -> None:
        self.evaluation.finish(self, "test", "test")

    # Lightning's own checkpoint

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(self, checkpoint)
        checkpoint["rollout_cycle"] = self.cycle.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_trained(self, checkpoint)
        self.cycle.load_state_dict(checkpoint["rollout_cycle"], self.trained())
