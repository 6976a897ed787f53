"""Callback that records what a run is: configuration, parameters, tags and data sets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from memgen.environments.base import Environment
from memgen.lightning_internals import set_logged_step
from memgen.tracking.datasets import dataset_record
from memgen.tracking.run_description import RunDescription, installed_packages, model_name, run_name, run_tags
from memgen.tracking.run_file import RUN_KEY
from memgen.tracking.run_logger import RunLogger, run_loggers


@runtime_checkable
class RecordedData(Protocol):
    """Data module whose splits are recorded."""

    environment: Environment
    path: str | None
    items: Mapping[str, Sequence[Any]]


@final
class RunRecord(Callback):
    """Logs configuration, parameters, tags and data sets at the start of a run.

    Lightning's own SaveConfigCallback needs a log folder, which a run in MLflow does not have.
    """

    def __init__(self, description: RunDescription) -> None:
        self.description = description
        self._written = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        for found in run_loggers(trainer.loggers):
            found.describe(run_name(self.description), run_tags(self.description))
            found.log_tags({"strategy": type(trainer.strategy).__name__, "ranks": str(trainer.world_size)})
            found.model_name = model_name(self.description)
            _write_configuration(found, self.description)
            found.log_hyperparams(dict(self.description.resolved))
            found.watch_system()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_data(trainer, ("train", "val"))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._log_data(trainer, ("val",))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_data(trainer, ("test",))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        set_logged_step(trainer)
        if trainer.loggers and trainer.optimizers:
            pl_module.log("train/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A requested stop carries the exit status of the process.
        if isinstance(exception, KeyboardInterrupt) or hasattr(exception, "status"):
            for found in run_loggers(trainer.loggers):
                found.end_as(found.ends_as or "KILLED")

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for found in run_loggers(trainer.loggers):
            if trainer.is_global_zero and found.store.run_id is not None:
                checkpoint[RUN_KEY] = found.store.run_id

    def _log_data(self, trainer: Trainer, splits: Sequence[str]) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not isinstance(data, RecordedData):
            return
        for split in splits:
            if split in data.items:
                examples = [item.example for item in data.items[split]]
                for found in run_loggers(trainer.loggers):
                    found.log_dataset(dataset_record(data.environment, data.path, split, examples))


def _write_configuration(found: RunLogger, description: RunDescription) -> None:
    for index, (name, text) in enumerate(description.raw.items()):
        found.log_text(text, f"config/raw/{index:02d}_{Path(name).name}")
    found.log_text(shlex.join(description.arguments) + "\n", "config/arguments.txt")
    found.log_text(description.resolved_yaml, "config/resolved.yaml")
    found.log_text(installed_packages(), "config/packages.txt")
