"""Stops a run, or skips its step, when numbers are not finite: one NaN that is learned from ruins every weight."""

from __future__ import annotations

import logging
from typing import Any, Literal, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from memgen.distributed.collectives import over_ranks
from memgen.distributed.deepspeed_internals import is_sharded

logger = logging.getLogger(__name__)

SKIPS = 10
"""Steps skipped one after the other, after which the run stops all the same."""


class NotFiniteError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite; raised on all ranks at the same step."""


@final
class FiniteNumbers(Callback):
    """Checks loss and gradients before each optimizer step, and the trained weights after it.

    So no checkpoint ever holds a weight that is not finite. With a gradient scaler (16-mixed) infinite gradients are part
    of the method and the scaler's own; DeepSpeed keeps gradients to itself, so there the loss is checked after the step.

    Args:
        action: "stop": the run ends before the step; "skip": weights and optimizer state stay as they are, and the run
            goes on. Weights that are not finite stop it in any case, and so do `SKIPS` skipped steps in a row.

    Raises:
        NotFiniteError: if the run stops.
        ValueError: at set-up, if steps shall be skipped under DeepSpeed.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        self.action = action
        self._losses: list[Tensor] = []
        self._skipped = 0
        self._step = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.action == "skip" and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "optimizer.not_finite is skip, but DeepSpeed keeps gradients to itself; set it to stop, or use another "
                "strategy"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._skipped, self._step = [], 0, trainer.global_step

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        parameters = [p for p in pl_module.parameters() if p.requires_grad and p.grad is not None]
        grads = [] if scaled else [p.grad for p in parameters if p.grad is not None]
        found = _not_finite({"the loss": self._take_losses(), "the gradient": grads})
        if found is None:
            self._skipped = 0
            return
        self._skipped += 1
        what = f"{found} of step {trainer.global_step} is not finite"
        if self.action == "stop" or self._skipped > SKIPS:
            again = f", as in the {SKIPS} steps before," if self._skipped > SKIPS else ""
            raise NotFiniteError(f"{what}{again} so training stops before it; {_advice(self.action)}")
        if trainer.is_global_zero:
            logger.warning("%s: the step is skipped (%d in a row)", what, self._skipped)
        for parameter in parameters:
            # AdamW passes over a parameter without a gradient: neither weight decay nor its moments move it.
            parameter.grad = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weights = [p.ds_tensor if is_sharded(p) else p for p in pl_module.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        found = _not_finite({"the loss": self._take_losses(), "a weight": weights})
        if found is not None:
            raise NotFiniteError(
                f"{found} is not finite after step {self._step - 1}, so training stops; {_advice(self.action)}"
            )

    def _take_losses(self) -> list[Tensor]:
        losses, self._losses = self._losses, []
        return losses


def _not_finite(tensors: dict[str, list[Any]]) -> str | None:
    """The first name with a tensor that is not finite on any rank. All ranks must call it."""
    # A sum is not finite if a term is not. In float64 a sum of finite float32 numbers cannot overflow.
    sums = [
        torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in group]).sum().cpu()
        if group
        else torch.zeros((), dtype=torch.float64)
        for group in tensors.values()
    ]
    bad = over_ranks((~torch.isfinite(torch.stack(sums))).double(), "max")
    return next((name for name, flag in zip(tensors, bad.tolist(), strict=True) if flag), None)


def _advice(action: str) -> str:
    skip = ", or skip such steps (optimizer.not_finite: skip)" if action == "stop" else ""
    return f"checkpoints saved before it are kept. Lower optimizer.lr, or set trainer.gradient_clip_val{skip}"
