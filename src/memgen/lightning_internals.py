"""Everything of Lightning's private state that this package uses. tests/test_lightning_internals.py says what each must do."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def set_logged_step(trainer: Trainer) -> None:
    """Makes loggers receive `trainer.global_step` as the step. After some checkpoints Lightning's own count is one too high."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the Trainer validates after the batch that it has just trained on."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    assert fetcher is not None, "it has fetched this batch"
    return loop.epoch_loop._should_check_val_fx(fetcher)


def log_step_metrics(trainer: Trainer) -> None:
    """Sends the current step's metrics to the loggers now instead of after the `on_train_batch_end` hooks."""
    trainer._logger_connector.update_train_step_metrics()


def no_experiment() -> Any:
    """What a logger has for an experiment where there is none: takes every call and does nothing."""
    from lightning.fabric.loggers.logger import _DummyExperiment

    return _DummyExperiment()
