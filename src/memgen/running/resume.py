"""Resuming a run bit for bit: Lightning's checkpoints, written whole, and random numbers seeded by step.

A run's folder holds, besides the trained weights, `resume/step_000120.ckpt` (Lightning's checkpoint), beside it
`step_000120.json` with what is needed before reading it, and the link `last.ckpt`. Each is written whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from memgen.distributed.collectives import over_ranks, world_size
from memgen.files import hold, new_file, point_to, release, remove, remove_leftovers, write_whole
from memgen.lightning_internals import log_step_metrics, validation_is_due
from memgen.run_context import run_context
from memgen.running.interrupt import LISTENER, Agreement, Interrupted, Limit, Wish
from memgen.running.settings import CONFIGURATION
from memgen.seeds import seed_of
from memgen.tracking.run_logger import pause_runs
from memgen.training.callbacks import RESUME, AdapterCheckpoint
from memgen.training.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
"""Link to the newest checkpoint."""
PROGRESS = "progress.json"
"""File beside the checkpoints with the run's progress, for `memgen status`."""
_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Saved:
    """The record beside a .ckpt.

    Attributes:
        step: optimizer steps taken.
        epoch: epochs begun before this one.
        world_size: processes that wrote it.
        saved_at: seconds since 1970.
    """

    step: int
    epoch: int
    world_size: int
    saved_at: float

    @classmethod
    def read(cls, checkpoint: Path) -> Saved | None:
        """The record beside a .ckpt; None if there is none."""
        path = _beside(checkpoint.resolve())
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; remove it to resume without it"
            ) from error


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None.

    Raises:
        FileNotFoundError: if the folder's last checkpoint is gone, and there is no other.
    """
    link = run / RESUME / LAST
    if link.exists():
        return link.resolve()
    whole = sorted((run / RESUME).glob("step_*.ckpt"), key=lambda path: path.stat().st_mtime)
    if link.is_symlink():
        if not whole:
            raise FileNotFoundError(
                f"{link} points to {link.readlink()}, which is gone: put it back, or remove the link to start anew"
            )
        logger.warning("%s points to %s, which is gone; going on from %s", link, link.readlink(), whole[-1])
    return whole[-1] if whole else None


@final
class ResumeCheckpoint(Checkpoint):
    """Writes checkpoints to resume from, and stops the run when it is asked to.

    Checkpoints are written at the end of optimizer steps: every so many of them or minutes, at the end, and before the
    run stops because of SIGUSR1, SIGTERM or the clock (`memgen.running.interrupt`). A run that stops early raises
    `Interrupted` on all ranks.

    Args:
        every_n_steps: optimizer steps between two checkpoints; None: the clock alone decides.
        every_minutes: minutes between two checkpoints; None: the steps alone decide.
        keep: how many to keep. AdapterCheckpoint keeps the best weights.
        time_limit: how long the process may run, as SLURM's --time writes it; None: until SLURM ends the job.
        save_by_minutes: minutes before that by which the last checkpoint must be written.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_minutes: float | None = 10.0,
        keep: int = 1,
        time_limit: str | None = None,
        save_by_minutes: float = 2.0,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("every_minutes", every_minutes, 0),
            ("keep", keep, 1),
            ("save_by_minutes", save_by_minutes, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.limit = Limit.find(time_limit, 60 * save_by_minutes)
        self.run: Path | None = None
        """The run's folder, from set-up on: AdapterCheckpoint's; without one, the RunContext's or the Trainer's."""
        self._agreement: Agreement | None = None
        self._step = self._saved_step = -1
        self._saved_at = self._told_at = time.monotonic()
        self._save_seconds = 0.0
        self._metrics: dict[str, float] = {}
        self._validation_due = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        LISTENER.listen()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterCheckpoint):
                self.run = callback.run
        context = run_context(trainer)
        if self.run is None:
            self.run = context.folder or Path(trainer.default_root_dir)
        if trainer.is_global_zero and context.folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            hold(self.run)
        if context.resumed_from is not None:
            require_ranks(context.resumed_from, trainer.world_size)
        if trainer.is_global_zero and (self.run / RESUME).is_dir():
            for path in remove_leftovers(self.run / RESUME):
                logger.info("%s was left by a killed process: removed", path)
        kept = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if context.configuration is not None and kept:
            write_whole(self.run / RESUME / CONFIGURATION, context.configuration)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Replaces Lightning's handler, which runs a collective wherever a rank is.
        LISTENER.listen_to_termination()
        self._step = self._saved_step = trainer.global_step
        steps = _over_ranks([trainer.global_step, -trainer.global_step])
        if steps[0] != -steps[1]:
            raise CheckpointError(
                f"ranks go on from different checkpoints: one from step {int(-steps[1])}, another from step "
                f"{int(steps[0])}; is {self.run} the same folder on every node?"
            )
        resumed = run_context(trainer).resumed_from
        if resumed is not None and trainer.is_global_zero:
            logger.warning("the run goes on from step %d (%s)", trainer.global_step, resumed)
        if self._validation_due:
            self._validate(trainer)
        self._agreement = Agreement(_over_ranks if world_size() > 1 else None, self.limit)
        self._saved_at = time.monotonic()

    def _validate(self, trainer: Trainer) -> None:
        """Runs the validation that was due after the step of the checkpoint; Lightning skips it."""
        self._validation_due = False
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Within an accumulation window: gradients are not part of a checkpoint.
            return
        assert self._agreement is not None, "training has started"
        self._step = trainer.global_step
        self._validation_due = validation_is_due(trainer)
        minutes = (time.monotonic() - self._saved_at) / 60
        due = trainer.is_global_zero and self.every_minutes is not None and minutes >= self.every_minutes
        verdict = self._agreement.after_step(due, self._save_seconds)
        by_count = self.every_n_steps is not None and self._step % self.every_n_steps == 0
        if verdict.wish or verdict.save or by_count:
            self.save(trainer)
        self._tell(trainer)
        # After the last step only validation is left; the run finishes.
        if verdict.wish and trainer.global_step != trainer.max_steps:
            LISTENER.forget()
            # Lightning would send this step's metrics to the loggers after this hook.
            log_step_metrics(trainer)
            if verdict.wish is Wish.REQUEUE:
                pause_runs(trainer.loggers)
            raise Interrupted(
                verdict.wish,
                f"asked to {'stop and go on later' if verdict.wish is Wish.REQUEUE else 'stop'}: saved at step "
                f"{self._step} in {self.run}",
            )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_due = False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)
        self._tell(trainer, at_once=True)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.run is not None:
            release(self.run)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.run is not None:
            release(self.run)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self._validation_due}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_due = state_dict["validation_due"]

    def save(self, trainer: Trainer) -> Path:
        """Writes a checkpoint now. All ranks must call it.

        Returns:
            The checkpoint.
        """
        assert self.run is not None, "set up"
        begun = time.monotonic()
        folder = (self.run / RESUME).absolute()
        path = folder / f"step_{trainer.global_step:06d}.ckpt"
        with new_file(path) if trainer.is_global_zero else nullcontext(path) as temporary:
            # Under some strategies every process writes a part of it.
            shared = Path(trainer.strategy.broadcast(str(temporary)))
            trainer.save_checkpoint(shared)
            if trainer.is_global_zero:
                saved = Saved(
                    step=trainer.global_step,
                    epoch=trainer.current_epoch,
                    world_size=trainer.world_size,
                    saved_at=time.time(),
                )
                write_whole(_beside(path), json.dumps(asdict(saved)) + "\n")
        if trainer.is_global_zero:
            keep_newest(path, self.keep)
        trainer.strategy.barrier("ResumeCheckpoint.save")
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - begun
        if self._agreement is not None:
            self._agreement.paused()
        return path

    def _tell(self, trainer: Trainer, *, at_once: bool = False) -> None:
        """Writes the run's progress for `memgen status`, a few times a minute."""
        if not trainer.is_global_zero or self.run is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not at_once and time.monotonic() - self._told_at < _PROGRESS_SECONDS:
            return
        self._told_at = time.monotonic()
        if not at_once:
            # After the last step these would be reduced over ranks that are not all here.
            self._metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        folder = self.run / RESUME
        progress = {
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "epoch": trainer.current_epoch,
            "saved_step": self._saved_step,
            "time": time.time(),
            "metrics": self._metrics,
        }
        write_whole(folder / PROGRESS, json.dumps(progress) + "\n")


@final
class StepSeeds(Callback):
    """Seeds every training step by (seed, rank, epoch, step within the epoch).

    So the random numbers of a step (dropout is all that our stages sample without a generator of their own) depend on its
    number alone, not on what was sampled before: validations, loaders, or whether the run was interrupted. No generator's
    state needs to be saved.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.seed is None:
            chosen = os.environ.get("PL_GLOBAL_SEED")
            self.seed = int(chosen) if chosen else torch.initial_seed()
        self.seed = int(trainer.strategy.broadcast(self.seed))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = seed_of("step", self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - code without a generator of its own uses this one
        random.seed(seed)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]


def keep_newest(checkpoint: Path, keep: int) -> None:
    """Points `last.ckpt` to a new checkpoint, and removes the oldest of the others and the records beside them.

    Args:
        checkpoint: the new one, `step_<number>.ckpt`. Other files in its folder are left alone.
        keep: how many to keep.
    """
    folder = checkpoint.parent
    point_to(folder / LAST, checkpoint)
    others = [other for other in folder.glob("step_*.ckpt") if other != checkpoint]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for old in others[keep - 1 :]:
        remove(old)
    for record in folder.glob("step_*.json"):
        if not record.with_suffix(".ckpt").exists():
            record.unlink()


def require_ranks(checkpoint: Path, ranks: int) -> None:
    """Refuses a checkpoint that another number of processes wrote.

    Raises:
        CheckpointError: which says how to go on.
    """
    saved = Saved.read(checkpoint)
    if saved is None or saved.world_size == ranks:
        return
    run = checkpoint.resolve().parent.parent
    raise CheckpointError(
        f"{checkpoint} was written by {saved.world_size} processes, this run has {ranks}: which items come next, and "
        f"each process's rollout, would not be the same. Resume with {saved.world_size} (--trainer.devices x "
        f"--trainer.num_nodes), or start a new run from its weights: --checkpoint {run / 'last'}"
    )


def _over_ranks(values: Any) -> list[float]:
    largest: list[float] = over_ranks(torch.tensor(values, dtype=torch.float64), "max").tolist()
    return largest


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".json")
