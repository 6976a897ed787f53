"""Stage 2: the trigger learns when to invoke, weaver and reasoner frozen (paper, Eq. 8-9; REV, Eq. 17-20).

Differs from the released code, whose trigger trainer cannot generate and has no penalty: (1) rewards carry the
reward-adaptive penalty on invocations; (2) every boundary at which the trigger was asked is a decision, the prompt's end
included; (3) the weaver must have been trained; (4) episodes of several turns are trained like answers; (5) the KL
divergence from the reference is exact, both outcomes of a decision being known.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from memgen.generation.rollout import EpisodeSettings, Replay
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig
from memgen.model.trigger import Trigger
from memgen.objectives.policy_gradient import TokenScores
from memgen.objectives.policy_settings import PolicySettings
from memgen.objectives.trigger import (
    TriggerSettings,
    decision_entropy,
    decision_kl,
    decision_logprobs,
    shaped_rewards,
)
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from memgen.training.playing import Episodes
from memgen.training.policy_stage import PolicyStage, Shaping
from memgen.types import Trajectory

INSERTION_COST = 0.01
"""What an insertion costs in `val/net_reward`, by which the best checkpoint is chosen."""


@final
class TriggerRL(PolicyStage):
    """Trains a trigger by reinforcement. The trained units are the decisions that it was asked for.

    `memgen oracle` says beforehand whether there is anything to gain by deciding (docs/analysis.md).

    Args:
        memgen: the model; `trigger.kind` is tokens or hidden_states.
        optimizer: AdamW, warm-up and cosine.
        objective: the penalty on invocations.
        policy: the surrogate, with decisions in place of tokens.
        update: how often a rollout is used.
        rollout: how training episodes are sampled; `group_size` of each item. Decisions are sampled, tokens need not be.
        generation: how answers are sampled in validation and test.
        episodes: limits of episodes of several turns.
        init_from: a checkpoint directory with a trained weaver (test, validate and predict: to score).
        allow_untrained_weaver: start although the weaver was never trained.
        checkpointing: recompute activations in the backward pass: less memory, more time.
        samples_every: rollouts between two pages of sample episodes in MLflow; 0: none.
        seed: of the rollouts; the Trainer's own seed is `seed_everything`.

    Raises:
        ValueError: if the trigger cannot learn with these settings, or the policy's loss is unknown.
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
        super().__init__(
            memgen, optimizer, policy, update, rollout, generation, episodes, init_from, checkpointing,
            samples_every, seed,
        )  # fmt: skip
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
        self.objective = objective
        self.allow_untrained_weaver = allow_untrained_weaver

    @override
    def check_start(self) -> None:
        """Refuses an untrained weaver: a trigger that learns from what it does would learn never to invoke."""
        if self.memgen.reasoner.adapter is not None:
            raise ValueError(
                f"model.memgen.weaver.kind {self.config.weaver.kind} writes no latents, so a trigger has nothing to decide"
            )
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
    @override
    def component(self) -> Trigger:
        return self.memgen.trigger

    @override
    def units(self, trajectory: Trajectory) -> int:
        return trajectory.offered

    @override
    def shape(self, episodes: Episodes) -> Shaping:
        """Rewards less the penalty on invocations."""
        valid = episodes.valid
        shaped = shaped_rewards(
            episodes.rewards, episodes.invocations, episodes.offered, episodes.group, self.objective, valid
        )
        metrics = {
            "trigger/p_bar": float(shaped.p_bar[valid].mean()) if bool(valid.any()) else float("nan"),
            "trigger/penalty": float(shaped.penalty[valid].mean()) if bool(valid.any()) else float("nan"),
        }
        return Shaping(shaped.rewards, metrics)

    @override
    def score(self, replay: Replay, *, entropy: bool, reference: Tensor | None) -> TokenScores:
        logits = self._logits(replay)  # (M, 2)
        device = logits.device
        mask = replay.decided.to(device)
        decisions = replay.decisions.to(device)
        probs = replay.invoke_probs.to(device)
        # Greatest care at 0 and 1: a sampled decision had a probability above 0.
        chosen = torch.where(decisions.bool(), probs, 1.0 - probs).clamp(min=torch.finfo(probs.dtype).tiny)
        return TokenScores(
            # Which there are is known on the host.
            logprobs=replay.by_episode(decision_logprobs(logits, replay.decisions[replay.decided]), mask),
            mask=mask,
            entropy=replay.by_episode(decision_entropy(logits), mask) if entropy else None,
            rollout_logprobs=torch.where(mask, chosen.log(), 0.0),
            exact_kl=None
            if reference is None
            else replay.by_episode(decision_kl(logits, reference.to(device)), mask),
        )

    @override
    def reference_values(self, replay: Replay) -> Tensor:
        """The logits of the decisions, (M, 2): with both outcomes known, the divergence is exact."""
        return self._logits(replay)

    def _logits(self, replay: Replay) -> Tensor:
        return self.memgen.decision_logits(replay.batch, replay.plan, replay.at)

    @override
    def on_validation_epoch_end(self) -> None:
        means = self.finish_validation()
        # What is best by rewards alone would pay any number of insertions for one item more. Training's own penalty would
        # refuse those that success needs: greedy answers do not show which these are.
        if "reward" in means:  # Not if every episode failed in the environment.
            cost = INSERTION_COST * means["insertions_per_answer"]
            self.log("val/net_reward", means["reward"] - cost, sync_dist=True)
