"""AdamW with linear warm-up and cosine decay (paper, Table 2).

transformers has two such schedules with a least rate, and neither is this one: one begins its warm-up at a rate of 0, so
that the first step is lost; the other is one step ahead in the cosine, and rises again behind its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule. Gradients are clipped by `trainer.gradient_clip_val`."""

    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running moments."""
    warmup_ratio: float = 0.1
    """Share of all steps with a linearly rising rate."""
    final_lr_ratio: float = 0.0
    """Share of the peak rate that is left at the end of the cosine."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or a gradient is NaN or infinite: the run ends, or the optimizer step is skipped."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optimizer.lr must be above 0, got {self.lr}; it must be finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay must be 0 or more and finite, got {self.weight_decay}")
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise ValueError(f"optimizer.warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if not 0.0 <= self.final_lr_ratio <= 1.0:
            raise ValueError(f"optimizer.final_lr_ratio must be in [0, 1], got {self.final_lr_ratio}")

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak rate at a step."""
        warmup = math.ceil(self.warmup_ratio * steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def build(self, parameters: Sequence[nn.Parameter], steps: int) -> dict[str, Any]:
        """Optimizer and schedule as Lightning takes them.

        Args:
            parameters: the trained ones.
            steps: optimizer steps of the whole run.
        """
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
