"""What makes two runs of an agent the same run, and the callback that records a test item by item."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

import memgen
from memgen.data import EnvironmentData, EvalBatch
from memgen.distributed.collectives import objects_of_all_ranks
from memgen.environments.base import Example, InteractiveEnvironment, Split
from memgen.generation.rollout import Actor, EpisodeSettings, Rollouts, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.weaver import WeaverConfig
from memgen.results.cost import Cost, costs
from memgen.results.records import Answered, Records, Row, Summary, data_hash, item_hash, summarise
from memgen.tracking.metrics import Measured
from memgen.training.evaluation import Recorder
from memgen.types import Trajectory

logger = logging.getLogger(__name__)

FOLDER = "tests"
"""Below the folder of runs: records of tests."""


@cache
def code_hash() -> str:
    """Tells versions of this package's source apart."""
    digest = hashlib.sha256()
    root = Path(memgen.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def weights_hash(model: MemGenModel) -> str:
    """Tells agents apart: their frozen bases, and every tensor of weaver and trigger if anything is ever woven."""
    digest = hashlib.sha256()
    for base in model.bases():
        digest.update(base.fingerprint.encode())
    weaves = model.trigger.probability != 0.0
    for part in (model.weaver, model.trigger) if weaves else ():
        for name, tensor in sorted(part.own_parameters().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return raw.numpy().tobytes()


def run_settings(
    model: MemGenModel,
    config: MemGenConfig,
    generation: GenerationSettings,
    episodes: EpisodeSettings,
    data: EnvironmentData,
    split: Split,
    precision: str,
    environment: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that decides what an agent answers and what that is worth, as JSON values.

    What only decides how fast (batch sizes, devices, workers of the loader) is not in it.

    Args:
        model: who plays.
        config: its configuration.
        generation: how answers are drawn.
        episodes: limits of episodes.
        data: whose items, set up.
        split: which of them.
        precision: of the Trainer.
        environment: the environment's own settings, as they are configured.
    """
    examples = [item.example for item in data.items[split]]
    return {
        "data": {
            "environment": data.environment.name,
            "split": split,
            "items": len(examples),
            "hash": data_hash(examples),
        },
        "agent": {"weights": weights_hash(model), **asdict(config)},
        "generation": asdict(generation),
        "episodes": asdict(episodes),
        "environment": dict(environment or {}),
        "chat_template": data.chat_template,
        "precision": precision,
    }


@final
class ItemRecorder(Recorder):
    """Plays the items of a test that are not recorded yet, and records them.

    Args:
        records: where.
        weaver: how many latents an insertion has.
    """

    def __init__(self, records: Records, weaver: WeaverConfig) -> None:
        self.records = records
        self.weaver = weaver
        self.rows: list[Row] = []
        """Scores of the items that were asked for so far, played now or before."""

    @override
    def remaining(self, batch: EvalBatch) -> EvalBatch:
        """The items of a batch that have to be played."""
        places = [i for i, index in enumerate(batch.indices) if index not in self.records.done]
        return dataclasses.replace(
            batch,
            examples=[batch.examples[i] for i in places],
            indices=tuple(batch.indices[i] for i in places),
        )

    @override
    def recorded(self, batch: EvalBatch) -> list[Measured]:
        """What was measured on the items of a batch that were played before."""
        rows = [row for index in batch.indices for row in self.records.done.get(index, ())]
        self.rows += rows
        return [Measured.from_record(row) for row in rows]

    @override
    def play(self, actor: Actor, batch: EvalBatch, seeds: Sequence[int], *, keep_latents: bool) -> Rollouts:
        """Plays the items of a batch and writes them down."""
        rollouts = rollout(actor, batch.examples, seeds, keep_latents=keep_latents)
        size = actor.generation.group_size
        cost = costs(actor.model, rollouts.trajectories, size)
        seconds = (rollouts.seconds + rollouts.environment_seconds) / len(rollouts.trajectories)
        single = not isinstance(actor.environment, InteractiveEnvironment)
        items = []
        for number, (index, example) in enumerate(zip(batch.indices, batch.examples, strict=True)):
            answers, scores = [], []
            for sample in range(size):
                place = number * size + sample
                trajectory = rollouts.trajectories[place]
                name = {"index": index, "id": example.id, "sample": sample}
                answers.append(name | _answer(trajectory, seeds[place], single=single))
                scores.append(name | _score(trajectory, example, self.weaver, cost[place], seconds))
            items.append(Answered(index, answers, scores))
        self.records.add(items)
        self.rows += [row for item in items for row in item.scores]
        return rollouts


def _answer(trajectory: Trajectory, seed: int, *, single: bool) -> dict[str, Any]:
    texts = [turn.text for turn in trajectory.turns]
    return {
        "seed": seed,
        "prompt": list(trajectory.prompt),
        "answer": texts[0] if single else texts,
        "observations": [turn.observation for turn in trajectory.turns[1:]],
        "insertion_points": [turn.insertion_points for turn in trajectory.turns],
        "token_ids": [turn.tokens for turn in trajectory.turns],
    }


def _score(
    trajectory: Trajectory, example: Example, weaver: WeaverConfig, cost: Cost, seconds: float
) -> dict[str, Any]:
    return {
        "item": item_hash(example),
        **asdict(Measured.of(trajectory, weaver)),
        "reasoner_positions": cost.reasoner,
        "weaver_positions": cost.weaver,
        "trigger_positions": cost.trigger,
        "seconds": seconds,
    }


@final
class RecordedTest(Callback):
    """Records a test item by item, and goes on where an earlier test of the same agent and settings stopped.

    Args:
        root: the folder of runs. Records go to `<root>/tests/<environment>-<hash of the settings and the code>`.
        folder: another folder, for this test alone. Under other settings than its records' the test is refused.
        environment: the environment's settings, so that others are noticed.
        about: anything else to be kept with the records.
    """

    def __init__(
        self,
        root: str = "runs",
        folder: str | None = None,
        environment: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.root = Path(root)
        self.chosen = None if folder is None else Path(folder)
        self.environment = environment
        self.about = dict(about or {})
        self.records: Records | None = None
        """Where the test is recorded; None before it has begun."""
        self.total = 0
        """Items of the test."""
        self.summary: Summary | None = None
        """What the test added up to, over all ranks."""
        self._recorder: ItemRecorder | None = None

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        recorded = isinstance(data, EnvironmentData) and hasattr(pl_module, "evaluation")
        if trainer.fast_dev_run or not recorded:  # type: ignore[attr-defined]
            return
        model, config, generation, episodes = (
            getattr(pl_module, name) for name in ("memgen", "config", "generation", "episodes")
        )
        require_different_answers(model, generation, "model.generation.temperature")
        settings = run_settings(
            model, config, generation, episodes, data, "test", str(trainer.precision), self.environment
        )
        self.total = settings["data"]["items"]
        about = {
            "memgen": memgen.__version__,
            "code": code_hash(),
            "init_from": getattr(pl_module, "init_from", None),
            "ckpt_path": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            **self.about,
        }
        folder = self.chosen or self._default(data.environment.name, settings)
        self.records = Records(folder, settings, about, trainer.global_rank)
        self._recorder = ItemRecorder(self.records, config.weaver)
        evaluation: Any = pl_module.evaluation
        evaluation.recorder = self._recorder
        self._tell(trainer)

    def _default(self, name: str, settings: Mapping[str, Any]) -> Path:
        text = json.dumps([settings, code_hash()], sort_keys=True)
        return self.root / FOLDER / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _tell(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self.records is None or not self.records.done:
            return
        records = self.records
        logger.warning(
            "%d of %d items are recorded in %s and are not played again (--records DIR: another folder)",
            len(records.done),
            self.total,
            records.folder,
        )
        if records.about.get("code") != code_hash():
            logger.warning("%s was begun with another version of memgen's code", records.folder)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None or self.records is None:
            return
        rows = [row for rows in objects_of_all_ranks(self._recorder.rows) for row in rows]
        self.summary = summarise(rows)
        for name, value in self.summary.metrics().items():
            # Every rank has the same numbers already; the flag only says so to Lightning.
            pl_module.log(f"test/{name}", value, sync_dist=True)
        if trainer.is_global_zero and len({row["index"] for row in rows}) == self.total:
            self.records.write_summary(self.summary)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.records is not None and isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            logger.warning(
                "what was played is recorded in %s; the same command goes on from there", self.records.folder
            )
        self._close(pl_module)

    def _close(self, pl_module: LightningModule) -> None:
        if self.records is not None:
            self.records.close()
            evaluation: Any = pl_module.evaluation
            evaluation.recorder = None
            self._recorder = None


def require_different_answers(model: MemGenModel, generation: GenerationSettings, keys: str) -> None:
    """Refuses to draw several answers where all would be equal.

    Args:
        model: who answers.
        generation: how.
        keys: what to change, for the message.

    Raises:
        ValueError: if nothing is left to chance.
    """
    # Of a constant trigger nothing is drawn if its probability is 0 or 1.
    decided = model.trigger.probability in (0.0, 1.0) or not (
        generation.sample_decisions or model.trigger.stochastic
    )
    if generation.group_size > 1 and generation.temperature == 0 and decided:
        raise ValueError(
            f"{generation.group_size} answers to each item are to be drawn, but the temperature is 0, so all of them "
            f"would be equal; set the temperature above 0 ({keys})"
        )
