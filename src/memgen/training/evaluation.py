"""What validation, test and predict do in every stage: play the items, score them, show some."""

from __future__ import annotations

from typing import Any, final

from lightning.pytorch import LightningModule
from torch import nn

from memgen.data import EvalBatch
from memgen.environments.base import InteractiveEnvironment
from memgen.generation.rollout import Actor, Rollouts, rollout
from memgen.model.weaver import WeaverConfig
from memgen.tracking.metrics import AnswerMetrics
from memgen.tracking.mlflow import Sample, log_samples
from memgen.tracking.samples import marked_trajectory

SHOWN = 16
"""Episodes kept for the page that each evaluation writes."""


@final
class Evaluation(nn.Module):
    """Metrics and sample episodes of an evaluation. A submodule of a stage, so that its counts lie where the stage does.

    Args:
        weaver: how many latents an insertion has.
    """

    def __init__(self, weaver: WeaverConfig) -> None:
        super().__init__()
        self.weaver = weaver
        self.metrics = AnswerMetrics(weaver)
        self._samples: list[Sample] = []

    def play(self, actor: Actor, batch: EvalBatch) -> Rollouts:
        """Plays the items of a batch. An item's draws depend on the item alone, not on its batch."""
        settings = actor.generation
        seeds = [
            settings.seed * 1_000_003 + index * settings.group_size + member
            for index in batch.indices
            for member in range(settings.group_size)
        ]
        return rollout(actor, batch.examples, seeds)

    def update(self, actor: Actor, batch: EvalBatch) -> None:
        """Plays the items of a batch and adds them to the metrics and samples."""
        trajectories = self.play(actor, batch).trajectories
        self.metrics.update(trajectories)
        for index in range(min(len(trajectories), SHOWN - len(self._samples))):
            example = batch.examples[index // actor.generation.group_size]
            self._samples.append(
                marked_trajectory(actor.tokenizer, self.weaver, example, trajectories[index])
            )

    def records(self, actor: Actor, batch: EvalBatch) -> list[dict[str, Any]]:
        """Plays the items of a batch. One record per episode, for `memgen predict`."""
        group = actor.generation.group_size
        records = []
        for index, trajectory in enumerate(self.play(actor, batch).trajectories):
            example = batch.examples[index // group]
            insertions = [
                [point - len(turn.context) for point, _ in turn.insertions] for turn in trajectory.turns
            ]
            single = not isinstance(actor.environment, InteractiveEnvironment)
            texts = actor.tokenizer.batch_decode(
                [turn.tokens for turn in trajectory.turns], skip_special_tokens=True
            )
            records.append(
                {
                    "id": example.id,
                    "question": example.question,
                    "answer": texts[0] if single else texts,
                    "reward": trajectory.reward,
                    "parts": dict(trajectory.parts),
                    "insertions": insertions[0] if single else insertions,
                    "tokens": trajectory.tokens,
                    "finished": not trajectory.truncated,
                    "fault": trajectory.fault,
                }
            )
        return records

    def finish(self, stage: LightningModule, split: str, name: str) -> None:
        """Logs the means and the page of samples, and begins anew.

        Args:
            stage: whose Trainer logs.
            split: prefix of the metrics' names.
            name: of the page.
        """
        for key, value in self.metrics.compute().items():
            # Every rank has the same means already; the flag only says so to Lightning.
            stage.log(f"{split}/{key}", value, prog_bar=key in ("reward", "exact_match"), sync_dist=True)
        self.metrics.reset()
        if stage.trainer.is_global_zero and not stage.trainer.sanity_checking:
            log_samples(stage.trainer.loggers, self._samples, f"{split}_{name}")
        self._samples = []
