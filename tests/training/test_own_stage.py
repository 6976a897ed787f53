"""A reinforcement stage of a user's own: it registers nothing and edits no file of the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from memgen.generation.rollout import EpisodeSettings, Replay
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig
from memgen.model.weaver import Weaver
from memgen.objectives.policy_gradient import TokenScores
from memgen.objectives.policy_settings import PolicySettings
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from memgen.training.playing import Episodes
from memgen.training.policy_stage import PolicyStage, Shaping
from memgen.types import Trajectory
from rl_runs import make_data, memgen_config
from sft_runs import make_trainer, save_tiny
from training_records import Recorded, SaveAt


class RankedAnswers(PolicyStage):
    """Trains the weaver on each answer as one unit, by the answer's rank in its group instead of its reward."""

    def __init__(
        self,
        memgen: MemGenConfig,
        optimizer: OptimizerSettings,
        update: UpdateSettings,
        rollout: GenerationSettings,
        temperature_of_ranks: float = 1.0,
    ) -> None:
        super().__init__(
            memgen,
            optimizer,
            PolicySettings(kl=0.01),
            update,
            rollout,
            generation=GenerationSettings(max_new_tokens=4),
            episodes=EpisodeSettings(),
            init_from=None,
            checkpointing=False,
            samples_every=0,
            seed=0,
        )
        self.temperature_of_ranks = temperature_of_ranks

    @property
    @override
    def component(self) -> Weaver:
        return self.memgen.weaver

    @override
    def units(self, trajectory: Trajectory) -> int:
        return 1

    @override
    def max_units(self) -> int:
        return 1

    @override
    def shape(self, episodes: Episodes) -> Shaping:
        mates = episodes.group[:, None] == episodes.group
        worse = mates & (episodes.rewards[:, None] > episodes.rewards)
        ranks = worse.sum(dim=1).float() / self.temperature_of_ranks
        return Shaping(ranks, {"rollout/rank": float(ranks.mean())})

    @override
    def score(self, replay: Replay, *, entropy: bool, reference: Tensor | None) -> TokenScores:
        scores = self.memgen.label_scores(
            replay.batch, replay.plan, temperature=self.rollout.temperature, entropy=False
        )
        logprobs = replay.by_episode(scores.logprobs, replay.tokens).sum(dim=1, keepdim=True)  # (E, 1)
        return TokenScores(
            logprobs=logprobs,
            mask=replay.tokens.any(dim=1, keepdim=True),
            rollout_logprobs=replay.logprobs.sum(dim=1, keepdim=True),
            reference_logprobs=reference,
        )


def stage(base) -> RankedAnswers:
    torch.manual_seed(0)
    return RankedAnswers(
        memgen_config(base),
        OptimizerSettings(lr=1e-2, warmup_ratio=0.0),
        UpdateSettings(minibatches=2),
        GenerationSettings(max_new_tokens=6, temperature=1.0, group_size=4),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def test_it_trains_validates_and_resumes(base, tmp_path):
    recorded = Recorded()
    trainer = make_trainer(
        tmp_path, max_steps=6, callbacks=[recorded], limit_val_batches=1, val_check_interval=2
    )
    whole = stage(base)
    trainer.fit(whole, make_data(base))
    first = recorded.metrics[0]
    assert first["train/ratio_min"] == pytest.approx(1.0, abs=1e-4)
    # With four answers in a group and no ties, ranks are 0 to 3.
    assert 0 < first["rollout/rank"] <= 1.5
    assert [one.totals.tokens for one in recorded.micro_batches] == [4] * 6
    assert all(torch.isfinite(torch.tensor(recorded.losses)))
    assert "val/reward" in recorded.metrics[-1]
    saver = SaveAt(3, tmp_path / "a.ckpt")
    make_trainer(tmp_path / "first", max_steps=6, callbacks=[saver]).fit(stage(base), make_data(base))
    again, resumed = Recorded(), stage(base)
    trainer = make_trainer(tmp_path / "second", max_steps=6, callbacks=[again])
    trainer.fit(resumed, make_data(base), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.losses == recorded.losses[3:]
