"""A short pipeline that leaves runs to look at: a few steps of each stage on a tiny model, by the code of long runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from memgen.data import EnvironmentData
from memgen.generation.sampling import GenerationSettings
from memgen.tracking.family import PARENT_VARIABLE
from memgen.tracking.run_description import RunDescription
from memgen.tracking.run_logger import open_parent, run_logger
from memgen.tracking.run_record import RunRecord
from memgen.training.callbacks import AdapterCheckpoint
from rl_runs import Countdown, make_grpo, make_trigger
from rl_runs import make_data as make_rl_data
from sft_runs import Letters, make_data, make_stage, make_trainer
from tiny import byte_tokenizer, tiny_causal_lm


@dataclass(frozen=True)
class Pipeline:
    """What was made.

    Attributes:
        experiment: id of the experiment.
        parent: run id of the pipeline.
        stages: run id of each stage, by its name.
    """

    experiment: str
    parent: str
    stages: dict[str, str]


def save_readable(directory: Path) -> Path:
    """A tiny random model that writes letters: text that a person can look at, if not read."""
    model, tokenizer = tiny_causal_lm(max_position_embeddings=1024), byte_tokenizer()
    table = model.get_input_embeddings().weight
    others = [i for i in range(len(table)) if tokenizer.decode([i]) not in " ,.abcdefghijklmnopqrstuvwxyz"]
    with torch.no_grad():
        # Tied to the head: what they get as logits is small, too.
        table[others] *= 0.05
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def run_pipeline(root: Path, uri: str) -> Pipeline:
    """Runs the three stages as children of one run."""
    base = save_readable(root / "base")
    settings: dict[str, Any] = {"tracking_uri": uri, "root": str(root / "runs"), "system_seconds": 0.5}
    parent = open_parent("pipeline", "pipeline", run_logger(**settings))
    assert parent.run_id is not None, "the store answers"
    os.environ[PARENT_VARIABLE] = parent.run_id
    greedy = GenerationSettings(max_new_tokens=12)
    made = {
        "weaver_sft": (make_stage(base, generation=greedy), make_data(base, Letters(val=8)), "Letters", 12),
        "weaver_grpo": (make_grpo(base, generation=greedy), make_rl_data(base, Countdown()), "Countdown", 6),
        "trigger_rl": (
            make_trigger(base, generation=greedy),
            make_rl_data(base, Countdown()),
            "Countdown",
            6,
        ),
    }
    stages = {}
    try:
        for name, (stage, data, environment, steps) in made.items():
            logger = run_logger(**settings)
            trainer = _trainer(root, name, environment, logger, steps)
            trainer.fit(stage, data)
            _test(trainer, stage, data)
            assert logger.outbox.flush(120) == 0
            stages[name] = logger.run_id
    finally:
        del os.environ[PARENT_VARIABLE]
    parent.finalize()
    return Pipeline(parent.store.experiment_id, parent.run_id, stages)


def _trainer(root: Path, name: str, environment: str, logger: Any, steps: int) -> Trainer:
    resolved = {
        "seed_everything": 0,
        "model": {
            "class_path": f"memgen.training.{name}.Stage",
            "memgen": {"backbone": {"name": "tiny"}},
        },
        "data": {"environment": {"class_path": f"tasks.{environment}"}},
    }
    description = RunDescription(
        "fit",
        arguments=("--config", f"conf/{name}.yaml"),
        raw={f"conf/{name}.yaml": "seed_everything: 0\n"},
        resolved_yaml="seed_everything: 0\n",
        resolved=resolved,
    )
    return make_trainer(
        root,
        max_steps=steps,
        logger=logger,
        limit_val_batches=1.0,
        val_check_interval=steps // 3,
        check_val_every_n_epoch=None,
        callbacks=[
            AdapterCheckpoint(
                root=str(root / "runs" / name), monitor="val/reward", with_trigger=name == "trigger_rl"
            ),
            RunRecord(description),
        ],
    )


def _test(trainer: Trainer, stage: LightningModule, data: EnvironmentData) -> None:
    """Scores what was trained, in the same run."""
    trainer.test(stage, data, verbose=False)
