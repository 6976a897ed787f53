"""Keeps a tiny run going for as long as a test needs."""

from __future__ import annotations

import time

from lightning.pytorch import Callback


class Pace(Callback):
    """Waits a moment in each step."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.seconds)
