"""Validation, test and predict of every stage: plays the items, scores them, keeps some episodes to show."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

from lightning.pytorch import LightningModule
from torch import nn

from memgen.data import EvalBatch
from memgen.environments.base import InteractiveEnvironment
from memgen.generation.rollout import Actor, Rollouts, rollout
from memgen.model.weaver import WeaverConfig
from memgen.seeds import episode_seeds
from memgen.tracking.episodes import Sample, episode_row, episode_trace, marked_trajectory
from memgen.tracking.metrics import AnswerMetrics, Measured
from memgen.tracking.page import log_samples
from memgen.tracking.run_logger import run_loggers
from memgen.tracking.traces import Trace
from memgen.types import Trajectory

SHOWN = 16
"""Episodes kept for the page that each evaluation writes."""
ROWS = 256
"""Episodes in its table."""


class Recorder(ABC):
    """Records a test item by item, so that an interrupted one can be resumed; see `memgen.results.recorded_test`."""

    @abstractmethod
    def remaining(self, batch: EvalBatch) -> EvalBatch:
        """The items of a batch that are not recorded yet."""

    @abstractmethod
    def recorded(self, batch: EvalBatch) -> list[Measured]:
        """Measurements of the items of a batch that are recorded."""

    @abstractmethod
    def play(self, actor: Actor, batch: EvalBatch, seeds: Sequence[int]) -> Rollouts:
        """Plays the items of a batch and records them."""


@final
class Evaluation(nn.Module):
    """Metrics and sample episodes of an evaluation. A submodule of a stage, so that its counts are on its device.

    Args:
        weaver: says how many latents an insertion has.
    """

    def __init__(self, weaver: WeaverConfig) -> None:
        super().__init__()
        self.weaver = weaver
        self.metrics = AnswerMetrics(weaver)
        self._samples: list[Sample] = []
        self._rows: list[dict[str, Any]] = []
        self._traces: list[Trace] = []
        self.recorder: Recorder | None = None
        """Records a test item by item; recorded items are not played again."""

    def play(self, actor: Actor, batch: EvalBatch) -> Rollouts:
        """Plays the items of a batch. An item's samples depend on the item alone, not on its batch."""
        settings = actor.generation
        seeds = episode_seeds(settings.seed, batch.indices, settings.group_size)
        if self.recorder is not None:
            return self.recorder.play(actor, batch, seeds)
        return rollout(actor, batch.examples, seeds)

    def update(self, actor: Actor, batch: EvalBatch) -> None:
        """Plays the items of a batch and adds them to the metrics, the table and the samples."""
        if self.recorder is not None:
            self.metrics.update(self.recorder.recorded(batch))
            batch = self.recorder.remaining(batch)
        if not batch.examples:
            return
        begin = time.time_ns()
        trajectories = self.play(actor, batch).trajectories
        self.metrics.update(trajectories)
        self._show(actor, batch, trajectories, (begin, time.time_ns()))

    def _show(
        self, actor: Actor, batch: EvalBatch, trajectories: list[Trajectory], times: tuple[int, int]
    ) -> None:
        interactive = isinstance(actor.environment, InteractiveEnvironment)
        for index, trajectory in enumerate(trajectories[: ROWS - len(self._rows)]):
            item = (
                actor.tokenizer,
                self.weaver,
                batch.examples[index // actor.generation.group_size],
                trajectory,
            )
            sample = marked_trajectory(*item)
            self._rows.append(episode_row(sample, item[2], trajectory))
            if len(self._samples) < SHOWN:
                self._samples.append(sample)
                if interactive:
                    self._traces.append(episode_trace(*item, *times, tags={}))

    def records(self, actor: Actor, batch: EvalBatch) -> list[dict[str, Any]]:
        """Plays the items of a batch. One record per episode, for `memgen predict`."""
        if not batch.examples:
            return []
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

    def finish(self, stage: LightningModule, split: str, name: str) -> dict[str, Any]:
        """Logs the means and the page of samples, and starts over.

        Args:
            stage: whose Trainer logs.
            split: prefix of the metrics' names.
            name: of the page.

        Returns:
            The means by their names.
        """
        means = self.metrics.compute()
        for key, value in means.items():
            # Every rank has the same means already; the flag only says so to Lightning.
            stage.log(f"{split}/{key}", value, prog_bar=key in ("reward", "exact_match"), sync_dist=True)
        self.metrics.reset()
        if stage.trainer.is_global_zero and not stage.trainer.sanity_checking:
            self._write(stage, split, f"{split}_{name}")
        self._samples, self._rows, self._traces = [], [], []
        return means

    def _write(self, stage: LightningModule, split: str, name: str) -> None:
        """Writes page, table and traces, if the run is recorded."""
        if not stage.trainer.loggers or not self._rows:
            return
        log_samples(stage.trainer.loggers, self._samples, name)
        columns = {key: [row[key] for row in self._rows] for key in self._rows[0]}
        for one in run_loggers(stage.trainer.loggers):
            one.log_table(columns, f"tables/{name}.json")
            for trace in self._traces[: one.settings.traces]:
                one.log_trace(
                    dataclasses.replace(
                        trace, tags={**trace.tags, "split": split, "step": str(stage.global_step)}
                    )
                )
