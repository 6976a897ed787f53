"""A run that is interrupted and resumed is the run that was not: what is kept, and when a run stops."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from memgen.objectives.policy_settings import PolicySettings
from memgen.run_context import RunContext
from memgen.running.interrupt import CONTINUES, LEFT, LISTENER, Interrupted, Wish
from memgen.running.resume import RESUME, ResumeCheckpoint, Saved, StepSeeds, last_checkpoint
from memgen.training.checkpoint import CheckpointError
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from rl_runs import make_data as make_rollout_data
from rl_runs import make_grpo, make_trigger
from sft_runs import MIXED, make_data, make_stage, make_trainer, save_tiny

STAGES = ("sft", "grpo", "trigger")
STEPS = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def nothing_asked():
    LISTENER.forget()
    before = signal.getsignal(signal.SIGTERM)
    yield
    LISTENER.forget()
    signal.signal(signal.SIGTERM, before)


def make(kind: str, base: Path):
    """A stage with everything that could differ after a resume: dropout, draws, several updates of a rollout, KL."""
    if kind == "sft":
        decay = OptimizerSettings(lr=1e-2, warmup_ratio=0.3, final_lr_ratio=0.1)
        return make_stage(base, dropout=0.3, curriculum=MIXED, optimizer=decay), make_data(base)
    settings = {"update": UpdateSettings(iterations=2), "policy": PolicySettings(kl=0.05)}
    stage = make_grpo(base, **settings) if kind == "grpo" else make_trigger(base, **settings)
    return stage, make_rollout_data(base)


class Losses(Callback):
    """The loss of every training step, and something to do at one of them."""

    def __init__(self, at: int | None = None, do=None) -> None:
        self.values: dict[int, float] = {}
        self.at, self.do = at, do

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at and self.do is not None:
            self.do()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values[trainer.global_step] = float(outputs["loss"])


def fit(kind: str, base: Path, run: Path, *, losses=None, ckpt=None, steps=STEPS, seeded=True, **settings):
    losses = losses or Losses()
    resume = settings.pop("resume", None) or ResumeCheckpoint(every_minutes=None)
    context = RunContext(folder=run, resumed_from=ckpt)
    trainer = make_trainer(
        run,
        max_steps=steps,
        callbacks=[losses, *([StepSeeds()] if seeded else []), context, resume],
        enable_checkpointing=True,
        **settings,
    )
    stage, data = make(kind, base)
    trainer.fit(stage, data, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return stage, losses


def trained(stage) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in stage.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", STAGES)
def test_a_run_that_was_asked_to_stop_goes_on_to_the_bit(kind, base, tmp_path):
    whole, expected = fit(kind, base, tmp_path / "whole")
    asked = Losses(at=2, do=lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(Interrupted, match="saved at step 3") as stopped:
        fit(kind, base, tmp_path / "run", losses=asked)
    assert stopped.value.status == CONTINUES
    ckpt = last_checkpoint(tmp_path / "run")
    assert ckpt is not None
    rest, losses = fit(kind, base, tmp_path / "run", ckpt=ckpt)
    assert asked.values | losses.values == expected.values
    assert sorted(losses.values) == [4, 5, 6, 7]
    for name, parameter in trained(whole).items():
        assert torch.equal(trained(rest)[name], parameter), name


def test_without_seeded_steps_dropout_differs_after_a_resume(base, tmp_path):
    """The comparison above can fail."""
    _, expected = fit("sft", base, tmp_path / "whole", seeded=False)
    asked = Losses(at=2, do=lambda: LISTENER.ask(Wish.REQUEUE))
    with pytest.raises(Interrupted):
        fit("sft", base, tmp_path / "run", losses=asked, seeded=False)
    ckpt = last_checkpoint(tmp_path / "run")
    torch.manual_seed(99)
    _, losses = fit("sft", base, tmp_path / "run", ckpt=ckpt, seeded=False)
    assert all(losses.values[step] != expected.values[step] for step in (4, 5, 6, 7))


def test_a_termination_saves_and_leaves(base, tmp_path):
    with pytest.raises(Interrupted, match="asked to stop: saved at step 2") as stopped:
        fit("sft", base, tmp_path, losses=Losses(at=1, do=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.value.status == LEFT == 143


def test_a_signal_that_came_before_training_is_obeyed_after_the_first_step(base, tmp_path):
    LISTENER.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while LISTENER.wish is Wish.NONE and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(Interrupted, match="saved at step 1 "):
        fit("sft", base, tmp_path)


class SignalWhileSaving(ResumeCheckpoint.__base__):  # a Checkpoint: behind the others
    """Sends SIGUSR1 in the middle of a save."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)


def test_a_signal_during_a_save_leaves_a_whole_checkpoint_and_is_obeyed_after_the_next_step(base, tmp_path):
    resume = ResumeCheckpoint(every_n_steps=2)
    resume.run = tmp_path
    trainer = make_trainer(
        tmp_path,
        max_steps=STEPS,
        callbacks=[StepSeeds(), SignalWhileSaving(), resume],
        enable_checkpointing=True,
    )
    with pytest.raises(Interrupted, match="saved at step 3 "):
        trainer.fit(*make("sft", base))
    ckpt = last_checkpoint(tmp_path)
    assert torch.load(ckpt, weights_only=True)["global_step"] == 3


def test_gradients_under_accumulation_are_never_cut(base, tmp_path):
    """A checkpoint holds no gradients, so a run only stops behind an optimizer step."""
    asked = Losses(at=1, do=lambda: LISTENER.ask(Wish.REQUEUE))
    with pytest.raises(Interrupted, match="saved at step 2 "):
        fit("sft", base, tmp_path, losses=asked, accumulate_grad_batches=2)


class Steps(Logger):
    """Keeps the steps at which a loss was logged."""

    name, version = "steps", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[int] = []

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.logged.append(step)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_every_steps_metrics_reach_the_logger_once(base, tmp_path):
    steps = Steps()
    with pytest.raises(Interrupted):
        fit("sft", base, tmp_path, losses=Losses(at=2, do=lambda: LISTENER.ask(Wish.REQUEUE)), logger=steps)
    fit("sft", base, tmp_path, ckpt=last_checkpoint(tmp_path), logger=steps)
    whole = Steps()
    fit("sft", base, tmp_path / "whole", logger=whole)
    assert steps.logged == whole.logged
    assert len(whole.logged) == STEPS


def test_the_newest_are_kept_and_last_is_the_newest(base, tmp_path):
    fit("sft", base, tmp_path, resume=ResumeCheckpoint(every_n_steps=2, every_minutes=None, keep=2))
    folder = tmp_path / RESUME
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.ckpt", "progress.json", "step_000006.ckpt", "step_000006.json", "step_000007.ckpt", "step_000007.json",
    ]  # fmt: skip
    assert (folder / "last.ckpt").resolve().name == "step_000007.ckpt"
    saved = Saved.read(folder / "last.ckpt")
    assert saved is not None
    assert (saved.step, saved.world_size) == (7, 1)


def test_checkpoints_are_written_when_the_clock_says_so(base, tmp_path):
    fit("sft", base, tmp_path, resume=ResumeCheckpoint(every_minutes=0, keep=100))
    assert len(list((tmp_path / RESUME).glob("step_*.ckpt"))) == STEPS


def test_progress_is_told(base, tmp_path):
    fit("sft", base, tmp_path)
    progress = json.loads((tmp_path / RESUME / "progress.json").read_text())
    assert (progress["step"], progress["max_steps"], progress["saved_step"]) == (STEPS, STEPS, STEPS)


def test_a_run_near_its_time_limit_saves_and_asks_to_be_continued(base, tmp_path):
    late = ResumeCheckpoint(time_limit="1:00", save_by_minutes=2)
    with pytest.raises(Interrupted, match="stop and go on later: saved at step 1 ") as stopped:
        fit("sft", base, tmp_path, resume=late)
    assert stopped.value.wish is Wish.REQUEUE
    fit("sft", base, tmp_path / "other", resume=ResumeCheckpoint(time_limit="60", save_by_minutes=2))


def test_the_end_of_the_job_is_a_time_limit(base, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    with pytest.raises(Interrupted, match="saved at step 1 "):
        fit("sft", base, tmp_path, resume=ResumeCheckpoint(save_by_minutes=2))


def test_the_last_step_is_not_the_time_to_stop(base, tmp_path):
    """What is left is a validation: a run that asked to be continued would only be started again for it."""
    stage, _ = fit("sft", base, tmp_path, losses=Losses(at=STEPS - 1, do=lambda: LISTENER.ask(Wish.REQUEUE)))
    assert stage.trainer.global_step == STEPS


@pytest.mark.parametrize("kind", STAGES)
def test_another_number_of_processes_is_refused_with_the_way_to_go_on(kind, base, tmp_path):
    fit(kind, base, tmp_path, steps=2)
    ckpt = last_checkpoint(tmp_path)
    beside = ckpt.with_suffix(".json")
    saved = json.loads(beside.read_text())
    beside.write_text(json.dumps(saved | {"world_size": 4}))
    with pytest.raises(CheckpointError, match="was written by 4 processes, this run has 1") as refused:
        fit(kind, base, tmp_path, ckpt=ckpt)
    assert f"--checkpoint {tmp_path / 'last'}" in str(refused.value)


def test_validation_that_was_due_at_the_interruption_takes_place_once(base, tmp_path):
    class Validations(Callback):
        def __init__(self):
            self.at = []

        def on_validation_end(self, trainer, pl_module):
            self.at.append(trainer.global_step)

    def run(where, **settings):
        validations, losses = Validations(), settings.pop("losses", Losses())
        resume = ResumeCheckpoint(every_minutes=None)
        resume.run = where
        trainer = make_trainer(
            where,
            max_steps=STEPS,
            callbacks=[losses, StepSeeds(), validations, resume],
            enable_checkpointing=True,
            limit_val_batches=1.0,
            val_check_interval=3,
            check_val_every_n_epoch=None,
        )
        try:
            trainer.fit(*make("sft", base), **settings)
        except Interrupted:
            assert trainer.global_step == 3
        return validations.at, losses.values

    whole, expected = run(tmp_path / "whole")
    first, before = run(tmp_path / "run", losses=Losses(at=2, do=lambda: LISTENER.ask(Wish.REQUEUE)))
    second, after = run(tmp_path / "run", ckpt_path=str(last_checkpoint(tmp_path / "run")), weights_only=True)
    assert whole == [3, 6]
    assert first + second == whole
    assert before | after == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"time_limit": "soon"}, "'soon' is no duration; write minutes"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ResumeCheckpoint(**settings)
