"""A callback that lets a test see where a run is, and gives it time to interfere."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Callback


class Beacon(Callback):
    """Writes the loss of each step to `<folder>/rank_<rank>`, one line each, and takes its time.

    Args:
        folder: where.
        seconds: how long to wait after a step.
    """

    def __init__(self, folder: str, seconds: float = 0.0) -> None:
        self.folder = Path(folder)
        self.seconds = seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank_{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")
        time.sleep(self.seconds)
