"""What this package expects of Lightning's private state; a release that changes it fails here."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger

from memgen.lightning_internals import log_step_metrics, set_logged_step, validation_is_due


class Steps(Logger):
    """Keeps the steps at which a metric was logged."""

    name, version = "steps", "0"

    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def log_hyperparams(self, *arguments, **settings): ...

    def log_metrics(self, metrics, step=None):
        if "x" in metrics:
            self.steps.append(step)


class Logging(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("x", float(batch_idx))
        return super().training_step(batch, batch_idx)


@pytest.fixture
def fit(tmp_path):
    def run(callback: Callback, **settings) -> Steps:
        logger = Steps()
        Trainer(
            accelerator="cpu",
            max_steps=4,
            logger=logger,
            callbacks=[callback],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **settings,
        ).fit(Logging())
        return logger

    return run


def test_the_logged_step_is_the_global_step_whatever_lightning_has_counted(fit):
    class Repairs(Callback):
        def on_train_batch_start(self, trainer, *arguments):
            trainer.fit_loop.epoch_loop._batches_that_stepped += 1
            set_logged_step(trainer)

    assert fit(Repairs(), limit_val_batches=0).steps == [0, 1, 2, 3]


def test_a_validation_that_is_due_follows(fit):
    class Expects(Callback):
        def __init__(self):
            self.due, self.validated = [], []

        def on_train_batch_end(self, trainer, *arguments):
            if validation_is_due(trainer):
                self.due.append(trainer.global_step)

        def on_validation_start(self, trainer, *arguments):
            self.validated.append(trainer.global_step)

    expects = Expects()
    fit(expects, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0)
    assert expects.due == expects.validated == [2, 4]


def test_metrics_of_a_step_are_sent_when_asked(fit):
    class Asks(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            log_step_metrics(trainer)
            assert trainer.logger.steps[-1] == trainer.global_step - 1

    assert fit(Asks(), limit_val_batches=0).steps[-1] == 3
