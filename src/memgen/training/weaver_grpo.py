"""Stage 1b: the weaver learns from the rewards of its own episodes, through the frozen reasoner (paper, Eq. 14-16).

Differs from the released code: (1) updates replay the rollout's insertion plan, at its temperature, so the first
update's ratio is 1; (2) updates run without dropout, like rollouts; (3) the reference of a KL penalty is a frozen copy
of the weaver that training began with; (4) losses are divided by the totals of the whole optimizer step, over all of its
micro-batches and ranks; (5) episodes of several turns are trained like answers.
"""

from __future__ import annotations

import logging
from typing import final

from torch import Tensor
from typing_extensions import override

from memgen.generation.rollout import EpisodeSettings, Replay
from memgen.generation.sampling import GenerationSettings
from memgen.model.latent_source import LatentSource
from memgen.model.memgen import MemGenConfig
from memgen.objectives.advantages import overlong_penalty
from memgen.objectives.policy_gradient import TokenScores
from memgen.objectives.policy_settings import PolicySettings
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from memgen.training.playing import Episodes
from memgen.training.policy_stage import PolicyStage, Shaping
from memgen.types import Trajectory

logger = logging.getLogger(__name__)


@final
class WeaverGRPO(PolicyStage):
    """Trains a weaver, or another latent source in its place, by reinforcement. The trained units are the agent's tokens.

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

    Raises:
        ValueError: if all answers to a prompt would be equal, or the policy's loss is unknown.
    """

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
        super().__init__(
            memgen, optimizer, policy, update, rollout, generation, episodes, init_from, checkpointing,
            samples_every, seed,
        )  # fmt: skip
        if rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature is 0, so all answers to a prompt are equal and teach nothing; set it above 0"
            )

    @override
    def check_start(self) -> None:
        if self.init_from is None and self.memgen.reasoner.adapter is None:
            logger.warning(
                "no checkpoint was given: the weaver starts untrained, and most likely finds no reward to learn "
                "from (--checkpoint DIR of weaver SFT)"
            )

    @property
    @override
    def component(self) -> LatentSource:
        return self.memgen.weaver

    @override
    def units(self, trajectory: Trajectory) -> int:
        return trajectory.tokens

    @override
    def shape(self, episodes: Episodes) -> Shaping:
        """Rewards less the punishment of overlong episodes."""
        policy = self.policy
        if policy.overlong_length is None or policy.overlong_buffer is None:
            return Shaping(episodes.rewards)
        penalty = overlong_penalty(episodes.tokens, policy.overlong_length, policy.overlong_buffer)
        return Shaping(episodes.rewards + penalty, {"rollout/overlong_penalty": float(penalty.mean())})

    @override
    def score(self, replay: Replay, *, entropy: bool, reference: Tensor | None) -> TokenScores:
        scores = self.memgen.label_scores(
            replay.batch, replay.plan, temperature=self.rollout.temperature, entropy=entropy
        )
        logprobs = replay.by_episode(scores.logprobs, replay.tokens)
        device = logprobs.device
        return TokenScores(
            logprobs=logprobs,
            mask=replay.tokens.to(device),
            entropy=None if scores.entropy is None else replay.by_episode(scores.entropy, replay.tokens),
            rollout_logprobs=replay.logprobs.to(device),
            reference_logprobs=None if reference is None else reference.to(device),
        )
