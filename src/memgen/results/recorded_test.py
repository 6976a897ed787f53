"""Records a test item by item, and resumes it: run identity (settings, weights and code) and the callback."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
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
from memgen.generation.latent_bank import bank_to_write, remember_episodes
from memgen.generation.rollout import Actor, EpisodeSettings, Rollouts, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.model.external import SOURCES as EXTERNAL
from memgen.model.external import External
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.weaver import WeaverConfig
from memgen.results.score_files import Answered, Records, data_hash, item_hash
from memgen.results.summary import Row, Summary, summarise
from memgen.tracking.metrics import Measured
from memgen.training.evaluation import Recorder
from memgen.types import RowWork, Trajectory

logger = logging.getLogger(__name__)

FOLDER = "tests"
"""Folder of recorded tests below the folder of runs."""


@cache
def code_hash() -> str:
    """Hash of this package's source."""
    digest = hashlib.sha256()
    root = Path(memgen.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def weights_hash(model: MemGenModel) -> str:
    """Hash of an agent: its frozen bases, and all tensors of weaver and trigger unless it is the bare reasoner."""
    digest = hashlib.sha256()
    for base in model.bases():
        digest.update(base.fingerprint.encode())
    for part in () if model.bare else (model.weaver, model.trigger):
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
    """Run identity: everything that decides an agent's answers and their scores, as JSON values.

    Settings that only affect speed (batch sizes, devices, loader workers) are not in it.

    Args:
        model: the agent.
        config: its configuration.
        generation: sampling settings.
        episodes: limits of episodes.
        data: the data, set up.
        split: the split that is played.
        precision: precision of the Trainer.
        environment: the environment's settings, as configured.
    """
    examples = [item.example for item in data.items[split]]
    return {
        "data": {
            "environment": data.environment.name,
            "split": split,
            "items": len(examples),
            "hash": data_hash(examples),
        },
        "agent": {"weights": weights_hash(model), **_recorded_config(config), **_external_content(model)},
        "generation": asdict(generation),
        "episodes": asdict(episodes),
        "environment": dict(environment or {}),
        "chat_template": data.chat_template,
        # Only where there are some: records that were made before there were any go on.
        **({"template_arguments": dict(data.template.arguments)} if data.template.arguments else {}),
        "precision": precision,
    }


def _external_content(model: MemGenModel) -> dict[str, Any]:
    """What of the content of the memories that the weaver reads decides its answers."""
    memories: Sequence[External] = getattr(model.weaver, "external", ())
    content = [found for memory in memories if (found := memory.content())]
    return {"external": content} if content else {}


def _recorded_config(config: MemGenConfig) -> dict[str, Any]:
    values = asdict(config)
    # Only where they are set: records that were made before there were any go on.
    for key, unset in (("skip_inside", ()), ("cooldown", 0)):
        if values["boundaries"][key] == unset:
            del values["boundaries"][key]
    for key in EXTERNAL:
        if values["weaver"][key] is None:
            del values["weaver"][key]
    return values


@final
class ItemRecorder(Recorder):
    """Plays the items of a test that are not recorded yet, and records them.

    Args:
        records: the folder of records.
        weaver: tells how many latents an insertion of each kind has.
    """

    def __init__(self, records: Records, weaver: WeaverConfig) -> None:
        self.records = records
        self.weaver = weaver
        self.rows: list[Row] = []
        """Scores of the items seen so far, played now or in an earlier run."""
        self.further: dict[str, Any] = {}
        """What else is to stand in the scores of what is recorded next."""

    @override
    def remaining(self, batch: EvalBatch) -> EvalBatch:
        """The items of a batch that are not recorded yet."""
        places = [i for i, index in enumerate(batch.indices) if index not in self.records.done]
        return dataclasses.replace(
            batch,
            examples=[batch.examples[i] for i in places],
            indices=tuple(batch.indices[i] for i in places),
        )

    @override
    def recorded(self, batch: EvalBatch) -> list[Measured]:
        """Measurements of the items of a batch that were recorded by an earlier run."""
        rows = [row for index in batch.indices for row in self.records.done.get(index, ())]
        self.rows += rows
        return [Measured.from_record(row) for row in rows]

    @override
    def play(self, actor: Actor, batch: EvalBatch, seeds: Sequence[int]) -> Rollouts:
        """Plays the items of a batch and records them."""
        bank = bank_to_write(actor.model)
        clock = time.process_time()
        rollouts = rollout(actor, batch.examples, seeds, keep_latents=bank is not None)
        self.record(actor, batch, seeds, rollouts, time.process_time() - clock)
        if bank is not None:
            # Behind the record: an item that is played again after an interruption does not find its own blocks.
            remember_episodes(bank, actor.environment.name, rollouts)
        return rollouts

    def record(
        self, actor: Actor, batch: EvalBatch, seeds: Sequence[int], rollouts: Rollouts, cpu_seconds: float
    ) -> None:
        """Records a batch of items that were played.

        Args:
            actor: who played.
            batch: the items.
            seeds: of the episodes.
            rollouts: the episodes.
            cpu_seconds: CPU time of this process that they took.
        """
        size, count = actor.generation.group_size, len(rollouts.trajectories)
        costs = {
            "seconds": (rollouts.seconds + rollouts.environment_seconds) / count,
            "cpu_seconds": cpu_seconds / count,
            **self.further,
        }
        single = not isinstance(actor.environment, InteractiveEnvironment)
        items = []
        for number, (index, example) in enumerate(zip(batch.indices, batch.examples, strict=True)):
            answers, scores = [], []
            for sample in range(size):
                place = number * size + sample
                trajectory = rollouts.trajectories[place]
                name = {"index": index, "id": example.id, "sample": sample}
                answers.append(name | _answer(trajectory, seeds[place], single=single))
                scores.append(name | _score(trajectory, example, self.weaver, trajectory.work) | costs)
            items.append(Answered(index, answers, scores))
        self.records.add(items)
        self.rows += [row for item in items for row in item.scores]


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


def _score(trajectory: Trajectory, example: Example, weaver: WeaverConfig, work: RowWork) -> dict[str, Any]:
    return {
        "item": item_hash(example),
        **asdict(Measured.of(trajectory, weaver)),
        "reasoner_positions": work.reasoner,
        "weaver_positions": work.weaver,
        "trigger_positions": work.trigger,
        "prompt_tokens": len(trajectory.turns[0].context) if trajectory.turns else 0,
    }


@final
class RecordedTest(Callback):
    """Records a test item by item, and resumes an earlier test of the same agent and settings.

    Args:
        root: the folder of runs. Records go to `<root>/tests/<environment>-<hash of the settings and the code>`.
        folder: another folder for the records. Records with other settings there are an error.
        environment: the environment's settings, as part of the run identity.
        about: further facts to keep with the records.
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
        """The folder of records; None before the test has started."""
        self.total = 0
        """Number of items of the test."""
        self.summary: Summary | None = None
        """Summary of the test, over all ranks."""
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
                "finished items are recorded in %s; the same command continues from there",
                self.records.folder,
            )
        self._close(pl_module)

    def _close(self, pl_module: LightningModule) -> None:
        if self.records is not None:
            self.records.close()
            evaluation: Any = pl_module.evaluation
            evaluation.recorder = None
            self._recorder = None


def require_different_answers(model: MemGenModel, generation: GenerationSettings, keys: str) -> None:
    """Refuses several answers per item if all of them would be equal.

    Args:
        model: the agent.
        generation: sampling settings.
        keys: names of the settings to change, for the message.

    Raises:
        ValueError: if nothing is sampled.
    """
    # Of a constant trigger nothing is drawn if its probability is 0 or 1.
    decided = model.trigger.probability in (0.0, 1.0) or not (
        generation.sample_decisions or model.trigger.stochastic
    )
    if generation.group_size > 1 and generation.temperature == 0 and decided:
        raise ValueError(
            f"{generation.group_size} answers to each item are to be sampled, but the temperature is 0, so all of them "
            f"would be equal; set the temperature above 0 ({keys})"
        )
