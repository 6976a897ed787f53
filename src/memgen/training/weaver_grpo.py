"""Stage 1b: the weaver learns from the rewards of its own episodes, through the frozen reasoner (paper, Eq. 14-16).

Differs from the released code: (1) updates replay the rollout's insertion plan, at its temperature, so the first
update's ratio is 1; (2) updates run without dropout, like rollouts; (3) the reference of a KL penalty is a frozen copy
of the weaver that training began with; (4) losses are divided by what the whole optimizer step has, over all of its
micro-batches and ranks; (5) episodes of several turns are trained like answers.
"""

from __future__ import annotations

import logging
from typing import Any, final

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from memgen.data import EnvironmentData, EvalBatch, PromptBatch
from memgen.generation.rollout import Actor, EpisodeSettings, Replay
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.objectives.grpo import PolicySettings, overlong_penalty
from memgen.training.checkpoint import keep_trained, require_trained
from memgen.training.cycle import RolloutCycle, Scored, Shaping
from memgen.training.evaluation import Evaluation
from memgen.training.optimizer import OptimizerSettings
from memgen.training.rollouts import UpdateSettings
from memgen.training.stage import build_model, stage_data
from memgen.types import Trajectory

logger = logging.getLogger(__name__)


@final
class WeaverGRPO(LightningModule):
    """Trains a weaver by reinforcement.

    Args:
        memgen: the model.
        optimizer: AdamW, warm-up and cosine.
        policy: the objective.
        update: how often a rollout is used.
        rollout: how training episodes are drawn; `group_size` of each item.
        generation: how answers are drawn in validation and test.
        episodes: limits of episodes of several turns.
        init_from: a checkpoint directory to start from (test, validate and predict: to score).
        checkpointing: recompute activations in the backward pass: less memory, more time.
        samples_every: rollouts between two pages of sample episodes in MLflow; 0: none.
        seed: of the rollouts' draws; the Trainer's own seed is `seed_everything`.
    """

    exact_kl = False

    def __init__(
        self,
        memgen: MemGenConfig,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 - a frozen record
        policy: PolicySettings = PolicySettings(),  # noqa: B008 - a frozen record
        update: UpdateSettings = UpdateSettings(),  # noqa: B008 - a frozen record
        rollout: GenerationSettings = GenerationSettings(temperature=1.0, group_size=8),  # noqa: B008
        generation: GenerationSettings = GenerationSettings(),  # noqa: B008 - a frozen record
        episodes: EpisodeSettings = EpisodeSettings(),  # noqa: B008 - a frozen record
        init_from: str | None = None,
        checkpointing: bool = False,
        samples_every: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature is 0, so all answers to a prompt are equal and teach nothing; set it above 0"
            )
        self.config = memgen
        self.optimizer_settings = optimizer
        self.rollout = rollout
        self.generation = generation
        self.episodes = episodes
        self.init_from = init_from
        self.recompute = checkpointing
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
            if stage == "fit" and self.init_from is None:
                logger.warning(
                    "no checkpoint was given: the weaver starts untrained, and most likely finds no reward to learn "
                    "from (--checkpoint DIR of weaver SFT)"
                )
            self.memgen = build_model(self.config, data, data.resolve_asset, self.init_from)
        self.memgen.train_only(self.memgen.weaver)
        self.memgen.use_checkpointing(self.recompute)
        self.data.steps_per_rollout = self.cycle.update.steps(self.trainer.accumulate_grad_batches)

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
        """The weaver's tensors."""
        return self.memgen.weaver.own_parameters()

    def units(self, trajectory: Trajectory) -> int:
        """Tokens that the agent wrote."""
        return trajectory.tokens

    def max_units(self) -> int:
        """Most tokens that an episode's agent can write."""
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
        """Rewards less the punishment of overlong episodes."""
        policy = self.cycle.policy
        if policy.overlong_length is None or policy.overlong_buffer is None:
            return Shaping(rewards, {})
        penalty = overlong_penalty(lengths, policy.overlong_length, policy.overlong_buffer)
        return Shaping(rewards + penalty, {"rollout/overlong_penalty": float(penalty.mean())})

    def score(self, replay: Replay, *, entropy: bool, reference: Tensor | None) -> Scored:
        """Log-probabilities of the agent's tokens."""
        scores = self.memgen.label_scores(
            replay.batch, replay.plan, temperature=self.rollout.temperature, entropy=entropy
        )
        logprobs = replay.by_episode(scores.logprobs, replay.tokens)
        device = logprobs.device
        return Scored(
            logprobs=logprobs,
            mask=replay.tokens.to(device),
            recorded=replay.logprobs.to(device),
            entropy=None if scores.entropy is None else replay.by_episode(scores.entropy, replay.tokens),
            reference=logprobs.detach(),
            reference_logprobs=None if reference is None else reference.to(device),
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
        self.evaluation.finish(self, "val", f"step_{self.global_step:06d}")

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
