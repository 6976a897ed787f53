"""The line that says how far a run is: step of steps, loss or reward, exact match, tokens per second, time left."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

WIDTH = 80
"""Columns of the line."""
EVERY_SECONDS = 30.0
"""Between two lines where there is no terminal."""
_REDRAWN_SECONDS = 0.2

_SHOWN = (
    ("train/loss", "loss", "{:.3g}"),
    ("reward", "reward", "{:.3f}"),
    ("val/exact_match", "val exact", "{:.1%}"),
    ("perf/tokens_per_second", "", "{:,.0f} tok/s"),
    ("perf/rollout_tokens_per_second", "", "{:,.0f} tok/s"),
)


def training_line(step: int, steps: float, metrics: Mapping[str, float], seconds_left: float | None) -> str:
    """One line about a training run, cut at the end to `WIDTH` columns.

    Args:
        step: optimizer steps made.
        steps: of the whole run; infinite if it has no end.
        metrics: the latest, by name; those that the line does not know, or that are not finite, are left out.
        seconds_left: None if that is not known yet.
    """
    of = f"/{steps:.0f}" if math.isfinite(steps) else ""
    parts = [f"step {step:>{len(of) - 1 if of else 0}}{of}"]
    # Rewards say more than the loss of a policy gradient.
    hidden = {"train/loss"} if "reward" in metrics else set()
    for name, label, form in _SHOWN:
        value = metrics.get(name)
        if value is not None and math.isfinite(value) and name not in hidden:
            parts.append(f"{label} {form.format(value)}".strip())
    if seconds_left is not None and math.isfinite(seconds_left):
        parts.append(f"{in_words(seconds_left)} left")
    return "  ".join(parts)[:WIDTH]


def in_words(seconds: float) -> str:
    """A duration: `42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@final
class ProgressLine(ProgressBar):
    """Shows a run's progress on standard error, in the place of Lightning's bar.

    On a terminal one line is drawn over and over; elsewhere (a file, a scheduler's log) a line of its own is written every
    `EVERY_SECONDS`. What a validation found is a line that stays in both. The time left is that of this process's
    steps so far, its validations included.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._terminal = sys.stderr.isatty()
        self._written_at = 0.0
        self._drawn = False
        self._begun: tuple[float, int] | None = None

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        self._clear()
        print(*args, **kwargs)  # noqa: T201

    # Training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = (time.monotonic(), trainer.global_step)
        self._written_at = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._due():
            return
        self._show(self._training(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all ranks, also where nothing is shown: reading metrics may reduce them.
        self._stay(self._training(trainer))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._clear()

    def _training(self, trainer: Trainer) -> str:
        steps: float = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        step, left = trainer.global_step, None
        if self._begun is not None and step > self._begun[1]:
            begun, first = self._begun
            left = (time.monotonic() - begun) / (step - first) * (steps - step)
        return training_line(step, steps, self._metrics(trainer), left)

    # Evaluation

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluating("validating", batch_idx, trainer.num_val_batches[dataloader_idx])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        shown = {
            name.removeprefix("val/"): value
            for name, value in self._metrics(trainer).items()
            if name in ("val/exact_match", "val/reward", "val/loss") and math.isfinite(value)
        }
        found = "  ".join(
            f"{name.replace('_', ' ')} {value:.1%}" if name == "exact_match" else f"{name} {value:.3f}"
            for name, value in shown.items()
        )
        self._stay(f"validated at step {trainer.global_step}: {found or 'no score'}"[:WIDTH])

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluating("testing", batch_idx, trainer.num_test_batches[dataloader_idx])

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluating("answering", batch_idx, trainer.num_predict_batches[dataloader_idx])

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()

    def _evaluating(self, what: str, index: int, batches: float) -> None:
        if self._due():
            of = f" of {batches:.0f}" if math.isfinite(batches) else ""
            self._show(f"{what}: batch {index + 1}{of}")

    # The line

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def _due(self) -> bool:
        pause = _REDRAWN_SECONDS if self._terminal else EVERY_SECONDS
        return self._enabled and time.monotonic() - self._written_at >= pause

    def _show(self, line: str) -> None:
        self._written_at = time.monotonic()
        if self._terminal:
            self._drawn = True
            _write(f"\r{line:<{WIDTH}}")
        else:
            _write(f"{line}\n")

    def _stay(self, line: str) -> None:
        if not self._enabled:
            return
        self._clear()
        self._written_at = time.monotonic()
        _write(f"{line}\n")

    def _clear(self) -> None:
        if self._drawn:
            self._drawn = False
            _write(f"\r{'':<{WIDTH}}\r")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
