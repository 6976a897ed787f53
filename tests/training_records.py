"""What a reinforcement run did, step by step."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback


class Recorded(Callback):
    """Gradients of every optimizer step; metrics, micro-batches and losses of every training step."""

    def __init__(self) -> None:
        self.steps, self.metrics, self.micro_batches, self.losses = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.micro_batches.append(pl_module.buffer.micro_batch(batch.place))
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.trained().items()})


class SaveAt(Callback):
    """Writes Lightning's checkpoint after so many optimizer steps, and stops the run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not trainer.should_stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
