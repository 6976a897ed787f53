"""SIGTERM to every process of a job, as a scheduler sends it, while loader workers build batches."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil
import pytest
from lightning.pytorch import Callback

from memgen.run_context import RunContext
from memgen.running.interrupt import LISTENER, Interrupted
from memgen.running.resume import ResumeCheckpoint, StepSeeds, last_checkpoint
from rl_runs import Vowels, make_grpo, make_trigger
from rl_runs import make_data as prompts
from sft_runs import make_data as answers
from sft_runs import make_stage, make_trainer, save_tiny


class Preempt(Callback):
    """Signals this process and its children within a training step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            children = psutil.Process().children(recursive=True)
            assert children
            # Workers first: one that dies of it would have the time to.
            everyone = [*(child.pid for child in children), os.getpid()]
            subprocess.run(["kill", "-TERM", *map(str, everyone)], check=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    LISTENER.forget()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked here")
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "grpo", "trigger"])
def test_a_run_with_loader_workers_saves_itself(base, tmp_path, kind, num_workers):
    settings = {"num_workers": num_workers, "batch_size": 1}
    data = answers(base, **settings) if kind == "sft" else prompts(base, Vowels(6), **settings)
    stage = {"sft": make_stage, "grpo": make_grpo, "trigger": make_trigger}[kind](base)
    run = tmp_path / "run"
    callbacks = [Preempt(), RunContext(folder=run), ResumeCheckpoint(every_minutes=None), StepSeeds()]
    trainer = make_trainer(tmp_path, max_steps=5, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(Interrupted, match="saved at step 2"):
        trainer.fit(stage, data)
    assert last_checkpoint(run) is not None
