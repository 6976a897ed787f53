"""Where a run's files go: the trained parts, best and last, and Lightning's own checkpoints for resuming."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from typing_extensions import override

from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.tracking.mlflow import log_checkpoint
from memgen.training.checkpoint import save_checkpoint

logger = logging.getLogger(__name__)

RESUME = "resume"
"""Folder of a run that holds Lightning's own checkpoints."""


@final
class AdapterCheckpoint(Callback):
    """Writes the trained parts to `<root>/<run>/last` after each validation and at the end, and the best to `best`.

    `<root>/latest` points to the newest run. Lightning checkpoints of a ModelCheckpoint that names no directory go
    to `<root>/<run>/resume`. At the end the best (or last) is copied into the MLflow run.

    Args:
        root: folder of this stage's runs.
        monitor: metric that decides what is best; None keeps only the last.
        mode: whether a larger or a smaller value is better.
        with_trigger: whether the trigger is trained too.
    """

    def __init__(
        self,
        root: str = "runs/weaver_sft",
        monitor: str | None = "val/exact_match",
        mode: Literal["max", "min"] = "max",
        with_trigger: bool = False,
    ) -> None:
        self.root = Path(root)
        self.monitor = monitor
        self.mode = mode
        self.with_trigger = with_trigger
        self.best: float | None = None
        self.run: Path | None = None
        self.resumed_from: str | None = None
        """The .ckpt that the run goes on from. The Trainer knows it only after set-up, so the command line says it."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.run = Path(trainer.strategy.broadcast(str(self._folder(trainer))))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.run / RESUME).absolute())

    def _folder(self, trainer: Trainer) -> Path:
        """A resumed run goes on in its folder; a new one is named after its MLflow run, or the time."""
        resumed = Path(self.resumed_from) if self.resumed_from else None
        if resumed is not None and resumed.parent.name == RESUME:
            return resumed.parent.parent
        for run_logger in trainer.loggers:
            if isinstance(run_logger, MLFlowLogger) and run_logger.run_id is not None:
                return self.root / str(run_logger.run_id)
        return self.root / datetime.now().strftime("%Y%m%d-%H%M%S")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._save(trainer, pl_module, "last")
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if value is None:
            return
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if better:
            self.best = float(value)
            self._save(trainer, pl_module, "best")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._save(trainer, pl_module, "last")
        if not trainer.is_global_zero or self.run is None:
            return
        final = self.run / ("best" if self.best is not None else "last")
        log_checkpoint(trainer.loggers, final)
        score = f" ({self.monitor} {self.best:.4f})" if self.best is not None else ""
        logger.warning("checkpoint: %s%s", final, score)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        if not trainer.is_global_zero or self.run is None:
            return
        model, config = pl_module.memgen, pl_module.config
        assert isinstance(model, MemGenModel), "every stage has a MemGenModel"
        assert isinstance(config, MemGenConfig), "and its configuration"
        save_checkpoint(model, config, self.run / name, with_trigger=self.with_trigger)
        _point(self.run.parent / "latest", self.run)


def _point(link: Path, target: Path) -> None:
    """Makes or moves a symbolic link in one step."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name, target_is_directory=True)
    temporary.replace(link)
