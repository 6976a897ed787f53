"""Writes a run's checkpoints: the trained components, best and last; says where Lightning's own go."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from memgen.data import EnvironmentData
from memgen.distributed.zero import whole_weights
from memgen.files import hold, point_to, release, timed_path
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.run_context import run_context
from memgen.tracking.run_logger import log_best, log_checkpoint, run_loggers
from memgen.training.checkpoint import CONFIG_FILE, save_checkpoint
from memgen.training.stage import text_settings

logger = logging.getLogger(__name__)

RESUME = "resume"
"""Folder of a run that holds Lightning's own checkpoints."""


@final
class AdapterCheckpoint(Callback):
    """Writes the trained components to `<root>/<run>/last` after each validation and at the end, the best to `best`.

    `<root>/latest` points to the newest run. Lightning checkpoints of a ModelCheckpoint that names no directory go
    to `<root>/<run>/resume`. At the end the best (or last) is copied into the MLflow run.

    Args:
        root: folder of this stage's runs.
        monitor: metric that chooses the best; None keeps only the last.
        mode: whether a larger or a smaller value is better; of equal ones the later is kept. One
            that is not finite is never the best.
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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        folder = problem = None
        if trainer.is_global_zero:
            try:
                folder = str(self._folder(trainer))
                if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                    hold(Path(folder))
            except OSError as error:
                problem = str(error) if error.errno is None else f"the run's folder cannot be used: {error}"
        # All ranks stop if the first cannot write.
        folder, problem = trainer.strategy.broadcast((folder, problem))
        if folder is None or problem is not None:
            raise OSError(problem)
        self.run = Path(folder)
        for name in ("last", "best") if not trainer.fast_dev_run else ():  # type: ignore[attr-defined]
            taken = self.run / name
            if taken.exists() and not (taken.is_dir() and _replaceable(taken)):
                raise FileExistsError(
                    f"{taken} exists and is no checkpoint (it has no {CONFIG_FILE}), so this run could not write its own; "
                    "move it away, or give the run another folder"
                )
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.run / RESUME).absolute())
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for found in run_loggers(trainer.loggers):
                found.log_run_folder(self.run)

    def _folder(self, trainer: Trainer) -> Path:
        """The chosen folder; else that of the run it resumes; else one named after its MLflow run, or the time."""
        context = run_context(trainer)
        if context.folder is not None:
            return context.folder
        resumed = context.resumed_from
        if resumed is not None and resumed.parent.name == RESUME:
            return resumed.parent.parent
        for found in run_loggers(trainer.loggers):
            if found.run_id is not None:
                return self.root / found.run_id
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return self.root / "fast_dev_run"
        return timed_path(self.root, folder=True)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self.run is not None:
            release(self.run)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning keeps the last value of a metric that a validation does not have (all of its episodes failed).
        if self.monitor is not None:
            trainer.callback_metrics.pop(self.monitor, None)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._save(trainer, pl_module, "last")
        if self.monitor is None:
            return
        value = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if not math.isfinite(value):
            if trainer.is_global_zero:
                logger.warning(
                    "%s has no finite value at step %d, so these weights cannot be the best", self.monitor,
                    trainer.global_step,
                )  # fmt: skip
            return
        if self.best is None or (value >= self.best if self.mode == "max" else value <= self.best):
            self.best = value
            self._save(trainer, pl_module, "best")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._save(trainer, pl_module, "last")
        if not trainer.is_global_zero or self.run is None:
            return
        final = self.run / ("best" if self.best is not None else "last")
        name = f"checkpoints/step_{trainer.global_step:06d}_{final.name}"
        scores = {} if self.best is None or self.monitor is None else {self.monitor: self.best}
        for monitor, best in scores.items():
            log_best(trainer.loggers, monitor, self.mode, best, trainer.global_step)
        log_checkpoint(trainer.loggers, final, name, scores)
        score = f" ({self.monitor} {self.best:.4f})" if self.best is not None else ""
        logger.warning("checkpoint: %s%s", final, score)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        self.best = None if best is None or not math.isfinite(best) else best

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        model, config = pl_module.memgen, pl_module.config
        assert isinstance(model, MemGenModel), "every stage has a MemGenModel"
        assert isinstance(config, MemGenConfig), "and its configuration"
        # One rank writes; all take part in gathering what it writes.
        with whole_weights(trainer):
            if not trainer.is_global_zero or self.run is None:
                return
            data = trainer.datamodule  # type: ignore[attr-defined]
            text = text_settings(model, data) if isinstance(data, EnvironmentData) else None
            save_checkpoint(model, config, self.run / name, with_trigger=self.with_trigger, text=text)
            point_to(self.run.parent / "latest", self.run)


def _replaceable(folder: Path) -> bool:
    """Whether a checkpoint may take the folder's place: it is one, or empty."""
    return (folder / CONFIG_FILE).is_file() or not any(folder.iterdir())
