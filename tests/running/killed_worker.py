"""Trains, and may kill itself: `killed_worker.py BASE ORDER`.

An order is JSON: the stage, the run's folder, and for a run that dies the phase and the step.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

import memgen.files
import memgen.training.playing
from memgen.objectives.policy_settings import PolicySettings
from memgen.run_context import RunContext
from memgen.running.resume import ResumeCheckpoint, StepSeeds, last_checkpoint
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from rl_runs import make_data as make_rollout_data
from rl_runs import make_grpo, make_trigger
from sft_runs import MIXED, make_data, make_stage, make_trainer

STEPS = 9


class Losses(Callback):
    """Writes the loss of each step to `<run>/losses`."""

    def __init__(self, run: Path) -> None:
        self.path = run / "losses"

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")


def stage_and_data(kind: str, base: Path):
    if kind == "sft":
        optimizer = OptimizerSettings(lr=1e-2, warmup_ratio=0.3, final_lr_ratio=0.1)
        return make_stage(base, dropout=0.3, curriculum=MIXED, optimizer=optimizer), make_data(base)
    settings = {
        "update": UpdateSettings(iterations=2, minibatches=2), "policy": PolicySettings(kl=0.05, clip_low=0.1),
    }  # fmt: skip
    stage = make_grpo(base, **settings) if kind == "grpo" else make_trigger(base, **settings)
    return stage, make_rollout_data(base)


def die_within(function, when, seed: int):
    """The function; once `when()` says so, the process is killed a random moment after it has begun, within it."""

    def dying(*args, **kwargs):
        if not when():
            return function(*args, **kwargs)
        delay = random.Random(seed).uniform(0.0, 0.03)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        result = function(*args, **kwargs)
        time.sleep(5)
        return result

    return dying


def train(order: dict, base: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run = Path(order["run"])
    run.mkdir(parents=True, exist_ok=True)
    stage, data = stage_and_data(order["kind"], base)
    resume = ResumeCheckpoint(every_n_steps=2, every_minutes=None)
    ckpt = last_checkpoint(run)
    context = RunContext(folder=run, resumed_from=ckpt)
    trainer = make_trainer(
        run, max_steps=STEPS, callbacks=[Losses(run), StepSeeds(), context, resume], enable_checkpointing=True
    )
    phase = order.get("phase")
    when = lambda: trainer.global_step >= order["step"]  # noqa: E731
    if phase == "rollout":
        memgen.training.playing.rollout = die_within(memgen.training.playing.rollout, when, order["seed"])
    elif phase == "update":
        stage.backward = die_within(stage.backward, when, order["seed"])
    elif phase == "save":
        trainer.save_checkpoint = die_within(trainer.save_checkpoint, when, order["seed"])
    elif phase == "rename":
        memgen.files._replace = die_within(memgen.files._replace, when, order["seed"])
    trainer.fit(stage, data, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    trained = {name: p.detach() for name, p in stage.named_parameters() if p.requires_grad}
    torch.save(trained, run / "trained")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(json.loads(sys.argv[2]), Path(sys.argv[1]))
